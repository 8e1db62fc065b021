"""Steps that repeat a recording: equal to the engine bit for bit, on other memory in each call.

bam_kernels/layout.py defines the dimension letters.
"""

import gc
from types import SimpleNamespace

import pytest
import torch
from problems import assert_close, needs_cpu_kernels
from repeated_steps import (
    SLABS,
    Case,
    by_engine,
    check_equal,
    engine_alone,
    kept_recordings,
    record,
    recordings_alone,
    repeated,
    result,
    stats_of,
)
from torch import Tensor

from bam_kernels import bam_loss, checked_call, reference
from bam_kernels.backends.cpu import CpuKernels
from bam_kernels.engine import recording as recording_module
from bam_kernels.engine import slab
from bam_kernels.engine import step as step_module
from bam_kernels.engine.step import NEVER, Step

pytestmark = needs_cpu_kernels


# Sizes are no multiples of a vector; LARGE takes two threads, and rows and columns of several vectors.
LARGE = {"B": 67, "D": 48}
CASES = {
    "two views": Case(),
    "one view": Case(V=1),
    "large": Case(V=3, **LARGE),
    "large, teacher": Case(V=3, R=2, **LARGE),
    "local views": Case(V=5),
    "teacher": Case(V=4, R=2),
    "more teacher views": Case(R=3),
    "target rows of the student": Case(V=4, R=2, options={"target_rows": "student"}),
    "one key view": Case(V=3, options={"key_views": 1}),
    "more key views than targets": Case(V=3, options={"key_views": 3, "target_views": 1}),
    "key views of a teacher": Case(R=3, options={"key_views": 3}),
    "top_k": Case(V=3, options={"top_k": 3}),
    "top_k, teacher": Case(R=2, options={"top_k": 2}),
    "one iteration": Case(options={"iterations": 1}),
    "one iteration, teacher": Case(R=2, options={"iterations": 1}),
    "no mask": Case(options={"mask_positives": False}),
    "slabs": Case(V=4, B=20, options=SLABS),
    "slabs, teacher": Case(V=4, B=20, R=2, options=SLABS),
    "slabs, one iteration": Case(V=4, B=20, R=2, options=SLABS | {"iterations": 1}),
    "slabs, top_k": Case(V=3, B=20, options=SLABS | {"top_k": 5}),
    "regather": Case(V=3, options={"regather": True}),
    "float16": Case(V=3, dtype=torch.float16),
    "float16, teacher, slabs": Case(B=20, R=2, dtype=torch.float16, options=SLABS),
    "bfloat16": Case(R=2, dtype=torch.bfloat16),
    "exact": Case(V=3, R=2, options={"precision": "exact"}),
    "other scales": Case(options={"temperature": 0.3, "epsilon": 0.002}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_a_repeated_step_is_the_engines(case):
    """Results equal the engine's bit for bit, and the float64 reference shows that both are not equally wrong."""
    record(*case.inputs(0), **case.options)
    for seed in (1, 2):
        given = case.inputs(seed)
        found = repeated(*given, **case.options)
        check_equal(found, by_engine(*given, **case.options))
        student, teacher = (x.double() if x is not None else None for x in given)
        expected = reference.bam_loss(student, teacher, **case.options)
        assert_close(found[0], expected, 1e-5 * expected.item())


@pytest.mark.parametrize("R", [0, 2])
def test_results_without_a_gradient(R):
    case = Case(V=3, R=R)
    for seed in range(4):
        student, teacher = case.inputs(seed)
        with engine_alone():
            expected, stats = bam_loss(student, teacher, return_stats=True)
        if seed < 2:
            bam_loss(student, teacher)
            continue
        with recordings_alone():
            loss, found = bam_loss(student, teacher, return_stats=True)
        assert not loss.requires_grad
        check_equal((loss, stats_of(found)), (expected, stats_of(stats)))


def spread(x: Tensor) -> Tensor:
    """x with gaps between its rows, views and columns."""
    return x.new_full([2 * n for n in x.shape], torch.nan)[tuple(slice(0, 2 * n, 2) for n in x.shape)].copy_(x)


FORMS = {
    "2-D": lambda x: x.flatten(0, 1),
    "features first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "images first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": spread,
    "2-D, columns contiguous": lambda x: x.flatten(0, 1).T.contiguous().T,
    "2-D, gaps": lambda x: spread(x.flatten(0, 1)),
    "one row": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("R", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input(form, R, dtype):
    case = Case(V=3, R=R, dtype=dtype)
    formed = [[FORMS[form](x) if x is not None else None for x in case.inputs(seed)] for seed in range(4)]
    record(*formed[0], views=3)
    for given in formed[1:]:
        check_equal(repeated(*given, views=3), by_engine(*given, views=3))
    contiguous = [x.contiguous() if x is not None else None for x in formed[-1]]
    with engine_alone():
        expected = bam_loss(*contiguous, views=3)
    assert torch.equal(bam_loss(*formed[-1], views=3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("elements", [8, 1])  # multiples of 16 bytes, and any multiple of an entry's size
def test_views_of_one_tensor_at_other_offsets(elements, dtype):
    """Student and teacher lie in one storage, in either order. Where alignment differs, the engine runs first."""
    case, count = Case(D=16, R=2, dtype=dtype), 2 * 7 * 16
    whole = torch.full((4 * count,), torch.nan, dtype=dtype)
    for call in range(30):
        places = elements * call, elements * call + count + elements * (call % 5)
        if call % 2:
            places = places[::-1]
        given = []
        for place, x in zip(places, case.inputs(call), strict=True):
            given.append(whole[place : place + count].view(2, 7, 16))
            given[-1].copy_(x)
        function = repeated if elements == 8 and call >= 2 else result
        found = function(*given)
        whole_again = [x.clone() for x in given]
        check_equal(found, by_engine(*whole_again))
        whole.fill_(torch.nan)


# Memory


@pytest.mark.parametrize("case", [CASES[name] for name in ("two views", "teacher", "slabs, teacher", "float16")])
def test_no_result_depends_on_memory_of_other_calls(case):
    """Inputs are overwritten and freed after each call; results of earlier calls keep their values."""
    kept = []
    for seed in range(6):
        given = case.inputs(seed)
        found = (repeated if seed > 1 else result)(*given, **case.options)
        kept.append((found, [x.clone() for x in found]))
        for x in given:
            if x is not None:
                x.fill_(torch.nan)
        del given
        gc.collect()
    for seed, (found, copy) in enumerate(kept):
        check_equal(found, copy)
        check_equal(found, by_engine(*case.inputs(seed), **case.options))
    memory = [x.untyped_storage().data_ptr() for found, _ in kept for x in found]
    assert len(set(memory)) == len(memory)


def test_written_results_change_no_later_call():
    case = Case(V=3)
    record(*case.inputs(0))
    for seed in (1, 2, 3):
        found = repeated(*case.inputs(seed))
        check_equal(found, by_engine(*case.inputs(seed)))
        for x in found:
            x.fill_(torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_calls_before_two_backward_passes(dtype):
    case = Case(R=2, dtype=dtype)
    record(*case.inputs(0))
    leaves = [case.inputs(seed)[0].requires_grad_() for seed in (1, 2)]
    with recordings_alone():
        losses = [bam_loss(leaf, case.inputs(seed)[1]) for seed, leaf in zip((1, 2), leaves, strict=True)]
    for loss in losses:
        loss.backward()
    for seed, leaf in zip((1, 2), leaves, strict=True):
        assert torch.equal(leaf.grad, by_engine(*case.inputs(seed))[2])


@pytest.mark.parametrize("factor", [1.0, 2.5, -0.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_factor_that_comes_in(dtype, factor):
    case = Case(V=3, dtype=dtype)
    record(*case.inputs(0))
    found = repeated(*case.inputs(1), factor=factor)
    check_equal(found, by_engine(*case.inputs(1), factor=factor))
    _, _, grad = by_engine(case.inputs(1)[0].float())
    expected = grad.double() * factor
    relative, floor = (1e-6, 1e-9) if dtype == torch.float32 else (2**-10, 2**-24)
    assert_close(found[2], expected, relative * expected.abs() + floor)


CHANGES = {
    "zeroed": lambda grad: grad.zero_(),
    "scaled": lambda grad: grad.mul_(3),
    "behind autograd's back": lambda grad: grad.data.fill_(torch.nan),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_written_gradient_changes_no_later_backward_pass(dtype, change):
    """In the engine's steps and in repeated ones."""
    case = Case(dtype=dtype)
    for seed in range(4):
        student = case.inputs(seed)[0].requires_grad_()
        expected = by_engine(student)[2]
        loss = bam_loss(student)
        for retain_graph in (True, True, False):
            student.grad = None
            loss.backward(retain_graph=retain_graph)
            assert torch.equal(student.grad, expected)
            change(student.grad)


def test_gradients_add_up():
    """Also over three backward passes of one graph, which add to the gradient of the first."""
    case = Case()
    record(*case.inputs(0))
    student = case.inputs(1)[0].requires_grad_()
    expected = by_engine(student)[2]
    loss = bam_loss(student)
    for count in (1, 2, 3):
        loss.backward(retain_graph=count < 3)
        assert_close(student.grad, count * expected.double(), 1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("target_rows", ["teacher", "student"])
def test_inputs_that_share_memory(target_rows):
    """The teacher is the student's own tensor: before a recording, and in place of a teacher of its own."""
    (student, teacher), options = Case(R=2).inputs(0), {"target_rows": target_rows}
    expected = by_engine(student, student.clone(), **options)
    for _ in range(4):
        check_equal(result(student, student, **options), expected)
    checked_call.forget()
    record(student, teacher, **options)
    check_equal(repeated(student, student, **options), expected)


# What cannot be recorded

OUTSIDE = torch.zeros(())


def with_outside_tensor(evaluate, call):
    found = evaluate(call)
    found.loss = found.loss + OUTSIDE
    return found


def with_number_read(evaluate, call):
    found = evaluate(call)
    found.loss = found.loss * (2.0 if found.loss.item() < 0 else 1.0)
    return found


def with_search(evaluate, call):
    found = evaluate(call)
    found.loss = found.loss + found.dz.flatten()[found.dz.isnan().flatten().nonzero()[:, 0]].sum()
    return found


def with_shared_outputs(evaluate, call):
    found = evaluate(call)
    both = torch.cat([found.loss.view(1), found.stats])
    found.loss, found.stats = both[0], both[1:]
    return found


def with_part_of_a_tensor(evaluate, call):
    found = evaluate(call)
    room = torch.empty(8, dtype=torch.float32)
    found.loss = room[3].copy_(found.loss)
    return found


OBSTACLES = [with_outside_tensor, with_number_read, with_search, with_part_of_a_tensor]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_step_that_cannot_be_recorded_is_computed(obstacle, monkeypatch):
    case, evaluate, calls = Case(V=3), slab.evaluate, []

    def evaluated(call):
        calls.append(call)
        return obstacle(evaluate, call)

    expected = [by_engine(*case.inputs(seed)) for seed in range(5)]
    monkeypatch.setattr(slab, "evaluate", evaluated)
    for seed in range(5):
        check_equal(result(*case.inputs(seed)), expected[seed])
    assert len(calls) == 5  # giving up a recording does not end the call, since other ranks may wait for it
    assert kept_recordings() == [NEVER]


def test_outputs_that_are_views_of_one_result_are_kept_apart(monkeypatch):
    """The outputs come from an operator of torch, whose result is new memory in every run."""
    case, evaluate = Case(V=3), slab.evaluate
    expected = [by_engine(*case.inputs(seed)) for seed in range(5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slab, "evaluate", lambda call: with_shared_outputs(evaluate, call))
        record(*case.inputs(0))
    found = [repeated(*case.inputs(seed)) for seed in range(5)]
    for actual, truth in zip(found, expected, strict=True):
        check_equal(actual, truth)


def test_a_kernel_that_reads_memory_from_outside(monkeypatch):
    """A launch, not an operator, uses a tensor that the step did not make."""
    norms, require_finite, case = torch.ones(5, dtype=torch.float64), CpuKernels.require_finite, Case()

    def require_both(self, norm: Tensor) -> None:
        require_finite(self, norms)
        require_finite(self, norm)

    expected = [by_engine(*case.inputs(seed)) for seed in range(4)]
    monkeypatch.setattr(CpuKernels, "require_finite", require_both)
    for seed in range(4):
        check_equal(result(*case.inputs(seed)), expected[seed])
    with pytest.raises(AssertionError, match="the engine ran"):
        repeated(*case.inputs(0))


def test_too_little_memory_for_a_workspace(monkeypatch):
    """The engine computes, which may need less memory at once."""

    def full(*_, **__) -> None:
        raise torch.OutOfMemoryError("no memory")

    case = Case(V=3, R=2)
    record(*case.inputs(0))
    monkeypatch.setattr(recording_module, "torch", SimpleNamespace(**vars(torch) | {"empty": full}))
    check_equal(result(*case.inputs(1)), by_engine(*case.inputs(1)))
    with pytest.raises(AssertionError, match="the engine ran"):
        repeated(*case.inputs(1))


def test_large_problems_are_not_recorded(monkeypatch):
    monkeypatch.setattr(step_module, "MOST_RECORDED_SCORES", 14 * 14 - 1)
    monkeypatch.setattr(Step, "_set", lambda *_: pytest.fail("recorded"))
    student, _ = Case().inputs(0)
    for _ in range(3):
        check_equal(result(student), by_engine(student))
