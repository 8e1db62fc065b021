"""Steps that repeat a recording while options, flags, modes and threads change from call to call.

bam_kernels/layout.py defines the dimension letters.
"""

import sys
import threading
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import pytest
import torch
from problems import needs_cpu_kernels
from recorded_operators import RecordedOperators
from repeated_steps import (
    SLABS,
    Case,
    by_engine,
    check_equal,
    kept_recordings,
    record,
    recordings_alone,
    repeated,
    result,
    stats_of,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bam_kernels import BAMLoss, bam_loss, checked_call
from bam_kernels.engine import step as step_module
from bam_kernels.engine.recording import Recording
from bam_kernels.options import Options

pytestmark = needs_cpu_kernels


LARGE = Case(V=3, B=67, D=48, R=2)  # on two threads, where there are two


def test_options_that_change_between_calls():
    """Each combination comes back after all others."""
    student, teacher = Case(V=4, R=2).inputs(0)
    every = [{}, {"epsilon": 0.1}, {"temperature": 0.2}, {"iterations": 1}, {"top_k": 3}, {"mask_positives": False}]
    every += [{"key_views": 1}, {"target_views": 1}, {"target_rows": "student"}, SLABS, {"precision": "exact"}]
    for call in range(4):
        for options in every:
            check_equal(
                (repeated if call > 1 else result)(student, teacher, **options),
                by_engine(student, teacher, **options),
            )
    losses = {bam_loss(student, teacher, **options).item() for options in every}
    assert len(losses) == len(every) - 2  # slabs and exact products change no number here


def test_epsilon_of_a_module_changes():
    student, teacher = Case(R=2).inputs(0)
    criterion = BAMLoss()
    for epsilon in (0.05, 0.1, 0.05, 0.02):
        criterion.epsilon = epsilon
        for _ in range(3):
            assert torch.equal(criterion(student, teacher), by_engine(student, teacher, epsilon=epsilon)[0])


def test_a_schedule_of_epsilon(monkeypatch):
    """A new epsilon in every step; what is kept stays bounded, and values that come back are right."""
    monkeypatch.setattr(checked_call, "MOST_CALLS", 5)
    criterion, most = BAMLoss(epsilon=lambda step: 0.02 + 0.001 * (step % 40)), 0
    for step in range(90):
        student, _ = Case().inputs(step)
        expected = by_engine(student, epsilon=0.02 + 0.001 * (step % 40))[0]
        assert torch.equal(criterion(student, step=step), expected)
        most = max(most, len(checked_call._calls))
    assert most == 5


def test_a_call_in_use_outlasts_others(monkeypatch):
    """A call between those of a schedule goes on repeating its recording."""
    monkeypatch.setattr(checked_call, "MOST_CALLS", 5)
    student, _ = Case().inputs(0)
    expected = by_engine(student)
    record(student)
    for step in range(20):
        bam_loss(student, epsilon=0.06 + 0.001 * step)
        check_equal(repeated(student), expected)


def test_recordings_of_a_step_stay_bounded(monkeypatch):
    """Strides differ from call to call."""
    monkeypatch.setattr(step_module, "MOST_RECORDINGS", 4)
    kept = 0
    for gap in (*range(12), *range(12)):
        student, _ = Case().inputs(gap)
        wide = torch.full((2, 7, 13 + gap), torch.nan)[..., :13].copy_(student)
        for _ in range(3):
            assert torch.equal(bam_loss(wide), by_engine(student)[0])
        kept = max(kept, len(kept_recordings()))
    assert kept == 4


def test_recordings_are_kept_and_checks_too_at_most():
    """The constants themselves: a recording may hold compiled kernels, a check holds a dozen numbers."""
    assert 1 < step_module.MOST_RECORDINGS <= 64 and 1 < checked_call.MOST_CALLS <= 1024


def test_number_of_threads(threads):
    case = LARGE
    expected = None
    for count in (1, 2, 1, 2, 1, 2):
        torch.set_num_threads(count)
        found = result(*case.inputs(0))
        check_equal(found, by_engine(*case.inputs(0)))
        assert expected is None or torch.allclose(found[0], expected[0], rtol=1e-6, atol=0)
        expected = found
    assert len(kept_recordings()) == 2  # launches are recorded with their number of threads


def test_precision_of_products(matmul_precision):
    case = LARGE
    for precision in ("highest", "medium", "high", "highest", "medium", "high", "highest", "medium", "high"):
        torch.set_float32_matmul_precision(precision)
        for options in ({}, {"precision": "exact"}):
            check_equal(result(*case.inputs(0), **options), by_engine(*case.inputs(0), **options))
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("R", [0, 2])
def test_gradients_are_wanted_or_not(R):
    """The leaf asks for a gradient, does not, or asks in vain, in one order after another."""
    student, teacher = Case(R=R).inputs(0)
    expected = by_engine(student, teacher)
    ways = {
        "gradient": (True, torch.enable_grad()),
        "none": (False, torch.enable_grad()),
        "no_grad": (True, torch.no_grad()),
        "inference_mode": (True, torch.inference_mode()),
    }
    for way in [*ways] * 3 + [*reversed(ways)] * 3:
        requires_grad, mode = ways[way]
        leaf = student.detach().requires_grad_(requires_grad)
        with mode:
            loss, stats = bam_loss(leaf, teacher, return_stats=True)
        assert loss.requires_grad == (way == "gradient")
        grad = torch.autograd.grad(loss, leaf)[0] if way == "gradient" else expected[2]
        check_equal((loss.detach(), stats_of(stats), grad), expected)
    with recordings_alone():
        for requires_grad, mode in ways.values():
            with mode:
                bam_loss(student.detach().requires_grad_(requires_grad), teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tensors_of_inference_mode(dtype):
    """Recorded in inference mode and repeated outside, and the other way round."""
    case = Case(R=2, dtype=dtype)
    with torch.inference_mode():
        made = [case.inputs(seed) for seed in range(3)]
        for given in made:
            bam_loss(*given)
    for given in made:
        assert torch.equal(bam_loss(*given), by_engine(*(x.clone() for x in given))[0])
    for seed in range(3):
        given = case.inputs(seed)
        check_equal(result(*given), by_engine(*given))
    checked_call.forget()
    for seed in range(3):
        bam_loss(*case.inputs(seed))
    with torch.inference_mode():
        assert torch.equal(bam_loss(*made[0]), bam_loss(*case.inputs(0)))


@pytest.fixture
def switch_threads_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_several_threads_use_one_module():
    case, calls = Case(R=2), 20
    expected = [[by_engine(*case.inputs(100 * i + call)) for call in range(calls)] for i in range(4)]
    criterion, found = BAMLoss(return_stats=True), [[] for _ in range(4)]
    together = threading.Barrier(4)

    def train(number: int) -> None:
        together.wait()
        for call in range(calls):
            student, teacher = case.inputs(100 * number + call)
            student.requires_grad_()
            loss, stats = criterion(student, teacher)
            loss.backward()
            found[number].append((loss.detach(), stats_of(stats), student.grad))

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for of_thread, truth in zip(found, expected, strict=True):
        assert len(of_thread) == calls
        for x, y in zip(of_thread, truth, strict=True):
            check_equal(x, y)
    repeated(*case.inputs(0))  # they were recorded


def test_threads_find_the_call_that_is_kept(switch_threads_often):
    """None misses it while another has found it: a second one would have to record its steps again."""
    student, _ = Case().inputs(0)
    kept, found = checked_call.checked_call("bam_loss", student, None, Options()), []

    def look() -> None:
        found.extend(checked_call.checked_call("bam_loss", student, None, Options()) for _ in range(5000))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20000 and all(call is kept for call in found)


# Compilers, transforms and modes that watch operators


@pytest.fixture
def compile_afresh():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("R", [0, 2])
def test_a_compiled_function(R, compile_afresh):
    """A compiled function has recordings of its own; eager calls go on repeating theirs."""
    case = Case(V=3, R=R)
    compiled = torch.compile(bam_loss, fullgraph=True, backend="aot_eager")
    record(*case.inputs(0))
    for seed in range(4):
        student, teacher = case.inputs(seed)
        student.requires_grad_()
        expected = by_engine(student, teacher)
        with recordings_alone() if seed > 1 else nullcontext():
            loss = compiled(student, teacher)
        loss.backward()
        assert torch.equal(loss.detach(), expected[0]) and torch.equal(student.grad, expected[2])
        check_equal(repeated(*case.inputs(seed)), expected)
    with pytest.raises(ValueError, match=r"student has 21 row"):
        compiled(torch.full_like(student, torch.nan), teacher)


def test_the_gradient_of_a_compiled_function_is_its_own(compile_afresh):
    """The compiler may take dz's memory for something else, so the operator returns no part of it."""
    (dz, _), (student, _) = Case().inputs(0), Case().inputs(1)
    one = torch.ones(())
    grad = torch.ops.bam_kernels.loss_backward(one, dz, student)
    assert torch.equal(grad, dz) and grad.data_ptr() != dz.data_ptr()
    torch.library.opcheck(torch.ops.bam_kernels.loss_backward.default, (one, dz, student))


def test_transforms_of_functions():
    case = Case(V=3)
    record(*case.inputs(0))
    several = [case.inputs(seed)[0] for seed in range(1, 4)]
    expected = [by_engine(student) for student in several]
    for _ in range(3):
        for student, (loss, _, grad) in zip(several, expected, strict=True):
            assert torch.equal(torch.func.grad(bam_loss)(student), grad)
            gradient, value = torch.func.grad_and_value(bam_loss)(student)
            assert torch.equal(gradient, grad) and torch.equal(value, loss)
        losses = torch.func.vmap(bam_loss)(torch.stack(several))
        assert torch.equal(losses, torch.stack([loss for loss, _, _ in expected]))
        grads = torch.func.vmap(torch.func.grad(bam_loss))(torch.stack(several))
        assert torch.equal(grads, torch.stack([grad for _, _, grad in expected]))
    check_equal(repeated(several[0]), expected[0])


@contextmanager
def nothing_is_repeated():
    """In the block a recording that runs is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recording, "run", lambda *_: pytest.fail("a recording ran"))
        yield


def test_fake_tensors_run_nothing():
    case = Case(V=3, R=2)
    record(*case.inputs(0))
    with nothing_is_repeated(), recordings_alone():
        with FakeTensorMode():
            fake = [torch.empty(x.shape) for x in case.inputs(0)]
            loss = bam_loss(fake[0].requires_grad_(), fake[1])
            loss.backward()
            assert type(loss) is FakeTensor and fake[0].grad.shape == fake[0].shape
        with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):  # outside of their mode
            bam_loss(*fake)
        assert bam_loss(*(x.to("meta") for x in case.inputs(0))).is_meta
    check_equal(repeated(*case.inputs(1)), by_engine(*case.inputs(1)))


def test_a_traced_step_takes_new_inputs():
    case = Case(V=3, R=2)
    record(*case.inputs(0))

    def gradient(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = student.detach().requires_grad_()
        loss = bam_loss(leaf, teacher)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    traced = make_fx(gradient)(*case.inputs(1))
    assert torch.ops.bam_kernels.loss.default in [node.target for node in traced.graph.nodes]
    for seed in range(2, 6):
        loss, _, grad = by_engine(*case.inputs(seed))
        found = traced(*case.inputs(seed))
        assert torch.equal(found[0], loss) and torch.equal(found[1], grad)


def test_a_mode_of_the_user_sees_one_operator():
    case, names = Case(V=3, R=2), []
    record(*case.inputs(0))
    for seed in range(4):
        with RecordedOperators(names):
            found = result(*case.inputs(seed))
        check_equal(found, by_engine(*case.inputs(seed)))
    assert names.count("loss") == 4 and not {"mm", "addmm_", "empty"} & set(names)
    check_equal(repeated(*case.inputs(1)), by_engine(*case.inputs(1)))


class Wrapped(torch.Tensor):
    """A subclass, which may mean anything; this one sees each function that takes it."""

    called: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        cls.called.append(function)
        return super().__torch_function__(function, types, arguments, options or {})


def test_subclasses_of_tensors():
    case = Case(V=3, R=2)
    record(*case.inputs(0))
    for seed in range(4):
        student, teacher = case.inputs(seed)
        expected = by_engine(student, teacher)
        assert torch.equal(bam_loss(nn.Parameter(student), teacher).detach(), expected[0])
        assert torch.equal(torch.Tensor(bam_loss(student.as_subclass(Wrapped), teacher)), expected[0])
    assert Wrapped.called
