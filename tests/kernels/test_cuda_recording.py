"""Steps of the CUDA kernels that repeat a recording. Where there is no GPU, the kernels are emulated on CPU tensors.

bam_kernels/layout.py defines the dimension letters.
"""

import emulated
import pytest
import torch
from cuda_device import DEVICE, kernels_on, pytestmark  # noqa: F401
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

from bam_kernels import bam_loss, reference
from bam_kernels.backends import cuda
from bam_kernels.engine.step import NEVER

CUDA = {"backend": "cuda"}
EXACT = CUDA | {"precision": "exact"}
BUDGET = {"memory_budget": 1200}
KINDS = {"one launch": {}, "a launch a pass": {"cluster": 1}}


@pytest.fixture(autouse=True, params=KINDS)
def in_use(request, monkeypatch):
    """All Sinkhorn iterations in one launch, and what a device without clusters does."""
    made = kernels_on(**KINDS[request.param])
    monkeypatch.setattr(cuda, "kernels", lambda: made)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    return made


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Without the look for rows that are not finite, which reads CPU tensors and so ends a recording."""
    monkeypatch.setattr("bam_kernels.engine.rows.check_finite", lambda *_: None)


CASES = {
    "two views": Case(options=EXACT),
    "teacher": Case(V=4, R=2, options=EXACT),
    "target rows of the student": Case(R=2, options=EXACT | {"target_rows": "student"}),
    "top_k": Case(V=3, R=2, options=EXACT | {"top_k": 3}),
    "one iteration": Case(options=EXACT | {"iterations": 1}),
    "one key view, no mask": Case(V=3, options=EXACT | {"key_views": 1, "mask_positives": False}),
    "slabs": Case(V=4, B=14, options=EXACT | BUDGET),
    "slabs, teacher": Case(B=14, R=2, options=EXACT | BUDGET),
    "bfloat16 embeddings, exact": Case(V=3, dtype=torch.bfloat16, options=EXACT),
    "float16": Case(V=3, dtype=torch.float16, options=CUDA),
    "float16, teacher": Case(R=2, D=16, dtype=torch.float16, options=CUDA),
    "float16, one iteration, top_k": Case(dtype=torch.float16, options=CUDA | {"iterations": 1, "top_k": 2}),
    "float16, slabs": Case(V=4, B=14, dtype=torch.float16, options=CUDA | BUDGET),
    "float16, slabs, teacher": Case(B=14, R=2, dtype=torch.float16, options=CUDA | BUDGET),
    "bfloat16, float32 scores": Case(R=2, dtype=torch.bfloat16, options=CUDA | {"epsilon": 0.002}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_repeated_step_is_the_engines(case, as_on_a_gpu):
    record(*case.inputs(0, DEVICE), **case.options)
    for seed in (1, 2):
        given = case.inputs(seed, DEVICE)
        found = repeated(*given, **case.options)
        check_equal(found, by_engine(*given, **case.options))
        student, teacher = (x.double().cpu() if x is not None else None for x in case.inputs(seed))
        options = {name: value for name, value in case.options.items() if name not in ("backend", "precision")}
        expected = reference.bam_loss(student, teacher, **options)
        exact = "precision" in case.options
        assert_close(found[0].cpu(), expected, (1e-5 if exact else 2e-3) * expected.item())


RING = {
    "float32": Case(V=3, options=EXACT),
    "float32, slabs, teacher": Case(B=14, R=2, options=EXACT | {"memory_budget": 2000}),
    "float16": Case(V=3, dtype=torch.float16, options=CUDA),
    "float16, slabs": Case(B=14, dtype=torch.float16, options=CUDA | BUDGET),
    "float16, teacher, least epsilon": Case(R=2, dtype=torch.float16, options=CUDA | {"epsilon": 1e-3}),
}


@pytest.mark.parametrize("case", RING.values(), ids=RING)
def test_a_repeated_step_of_ranks_is_the_engines(case, as_on_a_gpu):
    check_ring(case, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inputs_with_gaps_and_other_memory(dtype, as_on_a_gpu):
    """Strides of all kinds; inputs are overwritten and freed after each call, and results keep their values."""
    case, kept = Case(R=2, dtype=dtype), []
    options = EXACT if dtype == torch.float32 else CUDA
    for seed in range(5):
        student, teacher = case.inputs(seed, DEVICE)
        room = torch.full((2, 14, 20), torch.nan, dtype=dtype, device=DEVICE)
        given = room[:, ::2, :13].copy_(student), teacher.transpose(0, 1).contiguous().transpose(0, 1)
        found = (repeated if seed > 1 else result)(*given, **options)
        kept.append((found, [x.clone() for x in found]))
        room.fill_(torch.nan)
        given[1].fill_(torch.nan)
    for seed, (found, copy) in enumerate(kept):
        check_equal(found, copy)
        contiguous = by_engine(*case.inputs(seed, DEVICE), **options)
        assert torch.equal(found[0], contiguous[0]) and torch.equal(found[2], contiguous[2])


def test_products_as_the_flags_say(as_on_a_gpu, matmul_precision):
    """float32 embeddings: float32 scores, or 16 bit; each flag that comes back repeats its own recording."""
    case, losses = Case(V=3, R=2), {}
    for call in range(4):
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            given = case.inputs(0, DEVICE)
            found = (repeated if call > 1 else result)(*given, **CUDA)
            check_equal(found, by_engine(*given, **CUDA))
            exact = result(*given, **EXACT)
            check_equal(exact, by_engine(*given, **EXACT))
            losses[precision] = found[0].item()
            assert (losses[precision] == exact[0].item()) == (precision == "highest")
    assert len(set(losses.values())) == 2


def test_kernels_of_another_device(as_on_a_gpu, monkeypatch):
    """A recording belongs to the kernels that made it: sizes of launches follow from the device."""
    given, others = Case().inputs(0, DEVICE), [kernels_on(), kernels_on(cluster=1)]
    for _ in range(4):
        for kernels in others:
            monkeypatch.setattr(cuda, "kernels", lambda kernels=kernels: kernels)
            check_equal(result(*given, **EXACT), by_engine(*given, **EXACT))
    assert len(kept_recordings()) == 2


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the emulator counts launches")
def test_a_repeated_step_launches_what_the_engine_launches(as_on_a_gpu):
    case, count = Case(V=3, R=2), emulated.library().emulator_launches
    record(*case.inputs(0), **EXACT)
    before = count()
    by_engine(*case.inputs(1), **EXACT)
    between = count()
    repeated(*case.inputs(1), **EXACT)
    assert count() - between == between - before > 0


def test_rows_that_are_not_finite_give_nan(as_on_a_gpu):
    for dtype, options in ((torch.float32, EXACT), (torch.float16, CUDA)):
        case = Case(V=3, R=2, dtype=dtype, options=options)
        record(*case.inputs(0, DEVICE), **options)
        for which in (0, 1):
            given = case.inputs(1, DEVICE)
            given[which][0, 2, 3] = torch.inf
            loss, _, grad = repeated(*given, **options)
            assert loss.isnan() and not grad.isfinite().all()
        check_equal(repeated(*case.inputs(1, DEVICE), **options), by_engine(*case.inputs(1, DEVICE), **options))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="rows on a GPU are not looked at")
@pytest.mark.parametrize("case", [CASES["teacher"], CASES["float16"]], ids=["exact", "float16"])
def test_a_look_at_the_rows_ends_a_recording(case):
    """The look on CPU tensors depends on their contents. The engine computes every step, and finds bad rows."""
    for seed in range(4):
        check_equal(result(*case.inputs(seed), **case.options), by_engine(*case.inputs(seed), **case.options))
    assert kept_recordings() == [NEVER]
    with recordings_alone(), pytest.raises(AssertionError, match="the engine ran"):
        bam_loss(*case.inputs(0), **case.options)
    student, teacher = case.inputs(0)
    student[1, 3, 0] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match=r"student has 1 row\(s\) with non-finite values, the first is row 10"):
            bam_loss(student, teacher, **case.options)
