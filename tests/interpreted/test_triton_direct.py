"""Recorded launches on memory that is given as addresses, and what the interpreter prepares for a launch."""

import pytest
import torch
from row_problems import assert_close
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels.backends import triton as backend
from bam_kernels.backends.triton import plan, sinkhorn
from bam_kernels.backends.triton.direct import direct
from bam_kernels.backends.triton.launch import launch


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream if DEVICE.type == "cuda" else 0


def test_a_recorded_launch_runs_on_other_memory():
    n = 300
    first, second = (torch.rand(3, n, device=DEVICE) + 0.5 for _ in range(2))
    options = {"BLOCK": 256, "num_warps": 4}
    args = (first[0], first[1], first[2], n)
    launch(sinkhorn.divide_potential_kernel, (2,), *args, **options)
    recorded = direct(sinkhorn.divide_potential_kernel, (2,), args, options)
    exponent, mantissa, c = second.double().cpu()
    rows = [row.clone() for row in second]  # each at an address of its own
    pointers = [x.data_ptr() for x in rows]
    kept = first.clone()
    recorded.run(pointers, stream())
    assert torch.equal(first, kept)
    found = torch.exp2(rows[0].double()) * rows[1].double()
    assert_close(found.cpu(), torch.exp2(exponent) * mantissa / c, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides_types_and_no_tensor(dtype):
    """A matrix whose rows lie apart; u and v one after the other None."""
    m, n = 5, 40
    s = torch.randint(-50, 50, (m, 64), dtype=torch.int16, device=DEVICE)[:, :n]
    row, col = torch.zeros(2, m, device=DEVICE), torch.zeros(2, n, device=DEVICE)
    row[1], col[1] = 1.0, 1.0
    u = torch.rand(m, device=DEVICE)
    x = torch.rand(2, m, n, device=DEVICE).to(dtype)
    args = (x[0], s, *row, *col, u, None, 0.01, None, n, s.stride(0), x.stride(1))
    options = {"BLOCK_N": 64, "num_warps": 4}
    recorded = direct(plan.plan_subtract_kernel, (m, 1), args, options)
    before = x[1].double()
    recorded.run([t.data_ptr() for t in (x[1], s, *row, *col, u)], stream())
    expected = before - torch.exp2(s.double() * 0.01) * u.double()[:, None]
    assert_close(x[1].cpu(), expected.cpu(), 1e-6 if dtype == torch.float32 else 2**-10, 1e-6)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="not interpreted")
def test_the_interpreter_replaces_its_language_once_a_launch(monkeypatch):
    """However many programs call functions; after the launch the language is Triton's own again."""
    from triton import language
    from triton.runtime import interpreter

    kernels, replace, modules = backend.kernels(), interpreter._patch_builtin, []

    def counted(module, *rest):
        modules.append(module)
        return replace(module, *rest)

    kernels.normalize(torch.rand(1, 3))  # functions of Triton's own library stay replaced from their first call on
    monkeypatch.setattr(interpreter, "_patch_builtin", counted)
    for rows in (1, 40):
        modules.clear()
        x = torch.rand(rows, 3) + 0.5
        assert_close(kernels.normalize(x).norm, x.double().norm(dim=1), 1e-12)
        assert modules.count(language) == 1
        assert language.core.is_builtin(language.load) and language.core.is_builtin(language.tensor.__add__)
