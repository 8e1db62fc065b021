"""Every form of a kernel that the public functions launch is among those that are compiled ahead of time.

Which arguments are None and how switches are set decides which lines a GPU's compiler sees; the interpreter does not
look at lines that it does not run.
"""

import pytest
import torch
from problems import features
from recorded_forms import leave_out_arithmetic
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels import bam_loss, bam_targets, sinkhorn_attention
from bam_kernels.backends import triton as backend
from bam_kernels.backends.triton import compile as ahead

TRITON = {"backend": "triton"}
PRECISIONS = ((torch.float16, "default"), (torch.float32, "exact"))


def compiled() -> set[tuple[str, ...]]:
    found = set()

    def recorded(label):
        return lambda kernel, grid, *args, **options: found.add(ahead.form(kernel, args, options))

    ahead.call_all(recorded, small=True)
    return found


@pytest.fixture
def launched(monkeypatch) -> set[tuple[str, ...]]:
    """Forms of all launches, none of which runs: no launch depends on what another has computed."""
    found = set()

    def recorded(kernel, grid, *args, **options):
        found.add(ahead.form(kernel, args, options))

    leave_out_arithmetic(monkeypatch)
    monkeypatch.setattr(backend.kernels(), "run", recorded)
    return found


def test_what_is_launched_is_compiled_ahead(launched):
    for dtype, precision in PRECISIONS:
        given = TRITON | {"precision": precision}
        student = features(3, 4, 8).to(DEVICE, dtype)
        teacher = features(2, 4, 8, seed=1).to(DEVICE, dtype)
        for y in (None, teacher):
            for options in (
                {},
                {"mask_positives": False},
                {"top_k": 2},
                {"memory_budget": 600},
                {"engine": "flash"},
                {"engine": "flash", "mask_positives": False},
                {"iterations": 1},
                {"target_rows": "student"},
                {"epsilon": 0.001},
            ):
                bam_loss(student.clone().requires_grad_(), y, **given, **options).backward()
                bam_loss(student, y, **given, **options)  # no gradient
                if "memory_budget" not in options:
                    bam_targets(student, y, **given, **options)
        q, k = student.flatten(0, 1), teacher.flatten(0, 1)
        for mask, keys in (("none", k), ("self", None), ("block", k)):
            views = {"views": 3, "key_views": 2} if mask == "block" else {}
            for output in ("plan", "potentials"):
                options = {"mask": mask, "output": output, **views, **given}
                sinkhorn_attention(q, keys, **options)
                leaves = [x.clone().requires_grad_() for x in (q, keys) if x is not None]
                found = sinkhorn_attention(*leaves, differentiable=True, **options)
                for one in (found,) if output == "plan" else found:
                    torch.autograd.grad(one.sum(), leaves, retain_graph=True)
    assert len(launched) > 20
    assert launched <= compiled(), sorted(launched - compiled())
