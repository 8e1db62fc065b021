"""Steps of the Triton kernels that repeat a recording, in both engines.

bam_kernels/layout.py defines the dimension letters.
"""

import pytest
import torch
from problems import assert_close
from repeated_steps import (
    Case,
    by_engine,
    check_equal,
    check_ring,
    kept_recordings,
    record,
    recordings_alone,
    repeated,
    result,
)
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels import bam_loss, reference
from bam_kernels.backends import triton
from bam_kernels.engine.step import NEVER

TRITON = {"backend": "triton", "engine": "slab"}
FLASH = {"backend": "triton", "engine": "flash"}
EXACT = {"precision": "exact"}
SMALL = {"B": 3, "D": 5}  # the interpreter takes a millisecond for each operation of each program
CASES = {
    "teacher, top_k": Case(V=3, R=2, **SMALL, options=TRITON | EXACT | {"top_k": 3}),
    "slabs, rows of the student": Case(
        R=2, **SMALL, options=TRITON | EXACT | {"memory_budget": 100, "target_rows": "student"}
    ),
    "float16": Case(V=3, **SMALL, dtype=torch.float16, options=TRITON),
    "float16, slabs": Case(**SMALL, dtype=torch.float16, options=TRITON | {"memory_budget": 100, "iterations": 1}),
    "flash": Case(V=3, **SMALL, options=FLASH | EXACT),
    "flash, teacher, float16": Case(R=2, **SMALL, dtype=torch.float16, options=FLASH),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Without the look for rows that are not finite, which reads CPU tensors and so ends a recording."""
    monkeypatch.setattr("bam_kernels.engine.rows.check_finite", lambda *_: None)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_repeated_step_is_the_engines(case, as_on_a_gpu):
    record(*case.inputs(0, DEVICE), **case.options)
    given = case.inputs(1, DEVICE)
    found = repeated(*given, **case.options)
    check_equal(found, by_engine(*given, **case.options))
    student, teacher = (x.double().cpu() if x is not None else None for x in given)
    options = {name: value for name, value in case.options.items() if name not in ("backend", "precision", "engine")}
    expected = reference.bam_loss(student, teacher, **options)
    assert_close(found[0].cpu(), expected, (1e-5 if "precision" in case.options else 2e-3) * expected.item())


RING = {
    "float16": Case(**SMALL, dtype=torch.float16, options=TRITON),
    "flash": Case(**SMALL, options=FLASH | EXACT),
}


@pytest.mark.parametrize("case", RING.values(), ids=RING)
def test_a_repeated_step_of_ranks_is_the_engines(case, as_on_a_gpu):
    check_ring(case, DEVICE)


def test_inputs_with_gaps_and_other_memory(as_on_a_gpu):
    """Inputs are overwritten and freed after each call, and results keep their values."""
    case, options, kept = Case(**SMALL, R=2), TRITON | EXACT, []
    for seed in range(4):
        student, teacher = case.inputs(seed, DEVICE)
        room = torch.full((2, 6, 9), torch.nan, dtype=torch.float32, device=DEVICE)
        given = room[:, ::2, :5].copy_(student), teacher.transpose(0, 1).contiguous().transpose(0, 1)
        found = (repeated if seed > 1 else result)(*given, **options)
        kept.append((found, [x.clone() for x in found]))
        room.fill_(torch.nan)
        given[1].fill_(torch.nan)
    for found, copy in kept:
        check_equal(found, copy)
    for seed in (2, 3):
        contiguous = by_engine(*case.inputs(seed, DEVICE), **options)
        assert torch.equal(kept[seed][0][0], contiguous[0]) and torch.equal(kept[seed][0][2], contiguous[2])


def test_memory_that_is_aligned_otherwise(as_on_a_gpu):
    """A kernel is compiled for the alignment of its addresses, so a recording serves inputs of one alignment."""
    case = Case(B=3, D=8)
    options, whole = TRITON | EXACT, torch.full((100,), torch.nan, dtype=torch.float32, device=DEVICE)
    (given,) = case.inputs(0)[:1]
    expected = by_engine(given.to(DEVICE), **options)
    for function, first in ((result, 0), (result, 4), (result, 1), (repeated, 8), (result, 5)):
        student = whole[first : first + 48].view(2, 3, 8).copy_(given)
        check_equal(function(student, **options), expected)
        whole.fill_(torch.nan)
    assert len(kept_recordings()) == 2


def test_a_kernel_without_a_compiled_form_ends_a_recording(as_on_a_gpu, monkeypatch):
    given = Case(**SMALL).inputs(0, DEVICE)
    monkeypatch.setattr(triton.kernels(), "_repeat", lambda *_: None)
    expected = by_engine(*given, **TRITON)
    for _ in range(3):
        check_equal(result(*given, **TRITON), expected)
    assert kept_recordings() == [NEVER]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="rows on a GPU are not looked at")
def test_a_look_at_the_rows_ends_a_recording():
    """The look on CPU tensors depends on their contents. The engine computes every step, and finds bad rows."""
    (student, _), options = Case(**SMALL).inputs(0), TRITON | EXACT
    expected = by_engine(student, **options)
    for _ in range(3):
        check_equal(result(student, **options), expected)
    with recordings_alone(), pytest.raises(AssertionError, match="the engine ran"):
        bam_loss(student, **options)
    student[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"student has 1 row\(s\) with non-finite values, the first is row 5"):
        bam_loss(student, **options)
