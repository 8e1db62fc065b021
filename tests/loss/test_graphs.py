"""CUDA graphs of steps on a stand-in for torch.cuda: results, and what is copied, captured, waited for and refused."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from recorded_operators import RecordedOperators
from stand_in_graphs import StandInCuda, StandInStream

from bam_kernels import graphs
from bam_kernels.graphs import MOST_GRAPHS, StepGraphs

KEY = ("cpu slab", 0.1, True)


def step(student: torch.Tensor, teacher: torch.Tensor | None):
    """Loss |z - y|^2 / 2, its multiples as statistics, and its gradient z - y."""
    difference = (student - teacher if teacher is not None else student * 1.0).flatten(0, -2)
    loss = (difference * difference).sum() / 2
    return loss, loss * torch.arange(6, dtype=torch.float32), difference


def embeddings(seed: int, *shape: int) -> torch.Tensor:
    """Small whole numbers, whose sums and products are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape or (2, 5, 3), generator=generator).float()


def check(found, student, teacher) -> None:
    difference = student.double() - (teacher.double() if teacher is not None else 0)
    loss = difference.square().sum() / 2
    expected = loss, loss * torch.arange(6, dtype=torch.float64), difference.flatten(0, -2)
    for x, exact in zip(found, expected, strict=True):
        assert x.shape == exact.shape and (x.double() == exact).all()


@pytest.fixture
def cuda(monkeypatch) -> StandInCuda:
    cuda = StandInCuda()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: cuda.log.append(f"held for {stream.name}"))
    return cuda


@pytest.fixture
def step_graphs(cuda) -> StepGraphs:
    return StepGraphs(cuda, "cpu")


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("with_teacher", [False, True])
def test_every_call_has_the_results_of_its_inputs(step_graphs, cuda, with_teacher):
    kept = []
    for seed in range(5):
        student, teacher = embeddings(seed), embeddings(100 + seed) if with_teacher else None
        kept.append((step_graphs(KEY, step, student, teacher), student, teacher))
    for found, student, teacher in kept:  # afterwards: no call changes the results of another
        check(found, student, teacher)
    assert [line.partition(" ")[0] for line in cuda.log] == ["capture", *["replay", "event"] * 3]


def test_operators_of_a_replay(step_graphs, cuda):
    for seed in range(3):
        step_graphs(KEY, step, embeddings(seed), embeddings(seed))
    student, teacher = embeddings(8), embeddings(9)
    cuda.log.clear()
    with RecordedOperators(cuda.log):
        step_graphs(KEY, step, student, teacher)
    assert cuda.log == ["copy_", "copy_", "replay on main", "clone", "clone", "clone", "event 2 on main"]


def test_the_step_runs_twice_and_is_captured_once(step_graphs):
    calls = []

    def counted(student, teacher):
        calls.append((torch.is_grad_enabled(), student.requires_grad))
        return step(student, teacher)

    with torch.enable_grad():
        for seed in range(5):
            step_graphs(KEY, counted, embeddings(seed), None)
    assert calls == [(False, False)] * 3


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, step_graphs):
        loss, _, dz = step_graphs(KEY, step, student.detach(), None)
        ctx.save_for_backward(dz)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def test_two_forward_passes_before_their_backward_passes(step_graphs):
    for seed in (0, 1):
        step_graphs(KEY, step, embeddings(seed, 10, 3), None)
    leaves = [embeddings(seed, 10, 3).requires_grad_() for seed in (2, 3)]
    losses = [Loss.apply(leaf, step_graphs) for leaf in leaves]
    for leaf, loss in zip(leaves, losses, strict=True):
        loss.backward()
        assert (leaf.grad == leaf.detach()).all()


def test_each_problem_has_its_graph(step_graphs, cuda):
    """Another key, shape, dtype or presence of a teacher; all in one pool of memory."""

    def halved(student, teacher):
        return step(student / 2, teacher)

    problems = [
        (KEY, step, embeddings(0), None),
        (KEY, step, embeddings(1), embeddings(2)),
        (KEY, step, embeddings(3, 2, 4, 3), None),
        (KEY, step, embeddings(3).double(), None),
        ("another epsilon", halved, embeddings(4), None),
    ]
    for _ in range(4):
        for key, function, student, teacher in problems:
            found = step_graphs(key, function, student, teacher)
            check(found, student / 2 if function is halved else student, teacher)
            assert found[2].dtype == student.dtype
    assert len(cuda.pools) == len(problems) and len(set(cuda.pools)) == 1


def test_other_strides_use_the_same_graph(step_graphs, cuda):
    """A graph reads contiguous rows, because nothing can be copied into the strides of an expanded tensor."""
    captured = []

    def noted(student, teacher):
        captured.extend([student.is_contiguous()] * cuda.capturing)
        return step(student, teacher)

    students = embeddings(0), embeddings(1, 3, 5, 2).permute(2, 1, 0), embeddings(2, 1, 1, 3).expand(2, 5, 3)
    for student in students * 3:
        check(step_graphs(KEY, noted, student, None), student, None)
    assert captured == [True] and len(cuda.pools) == 1


def test_captured_in_inference_mode_and_replayed_outside(step_graphs):
    with torch.inference_mode():
        for seed in (0, 1, 2):
            student = embeddings(seed)
            check(step_graphs(KEY, step, student, None), student, None)
    check(step_graphs(KEY, step, embeddings(3), None), embeddings(3), None)


def test_no_more_graphs_than_the_most(step_graphs, cuda):
    for images in range(1, MOST_GRAPHS + 1):
        step_graphs(KEY, step, embeddings(0, 2, images, 3), None)
    more = [embeddings(0, 2, MOST_GRAPHS + i, 3) for i in (1, 2)]
    with pytest.warns(UserWarning, match=f"without a graph: it had {MOST_GRAPHS} different shapes"):
        check(step_graphs(KEY, step, more[0], None), more[0], None)
    for student in more * 3:
        check(step_graphs(KEY, step, student, None), student, None)
    assert cuda.log == []
    for _ in range(2):
        step_graphs(KEY, step, embeddings(5, 2, 1, 3), None)
    assert cuda.log == ["capture on side", "replay on main", "event 1 on main"]


def test_part_of_the_callers_own_capture(step_graphs, cuda):
    cuda.capturing = True
    for seed in range(4):
        check(step_graphs(KEY, step, embeddings(seed), None), embeddings(seed), None)
    assert cuda.log == []
    cuda.capturing = False
    step_graphs(KEY, step, embeddings(0), None)  # the first call of its own
    assert cuda.log == []


def test_another_stream_waits_for_the_last_replay(step_graphs, cuda):
    other = StandInStream(cuda, "other")
    for seed in range(3):
        step_graphs(KEY, step, embeddings(seed), None)
    student = embeddings(7)
    cuda.log.clear()
    for stream in (other, other, cuda.main):
        with cuda.stream(stream), RecordedOperators(cuda.log):
            step_graphs(KEY, step, student, None)
    work = ["copy_", "replay on {}", "clone", "clone", "clone"]
    assert cuda.log == [
        *["other waits for event 1", "held for other", *(line.format("other") for line in work), "event 2 on other"],
        *["held for other", *(line.format("other") for line in work), "event 3 on other"],
        *["main waits for event 3", *(line.format("main") for line in work), "event 4 on main"],
    ]


def test_another_graph_on_another_stream_waits_too(step_graphs, cuda):
    for seed in range(3):
        step_graphs(KEY, step, embeddings(seed), None)
    with cuda.stream(StandInStream(cuda, "other")):
        for seed in range(3):
            step_graphs(KEY, step, embeddings(seed, 2, 7, 3), None)
    assert cuda.log[-3:] == ["other waits for event 1", "replay on other", "event 2 on other"]


def check_after_failure(step_graphs, cuda, broken, message: str) -> None:
    """The failing call is right and says why; nothing is captured later; an older graph is still replayed."""
    older = embeddings(0, 2, 2, 3)
    for _ in range(3):
        step_graphs(KEY, step, older, None)
    student = embeddings(1)
    check(step_graphs("broken", broken, student, None), student, None)
    with pytest.warns(UserWarning) as caught:
        check(step_graphs("broken", broken, student, None), student, None)
    assert [str(warning.message) for warning in caught] == [f"BAMLoss: cuda_graph=True runs without a graph: {message}"]
    assert cuda.current is cuda.main and not cuda.capturing and cuda.log[-1] == "reset on main"
    cuda.log.clear()
    for key, function in [("broken", broken), ("later", step)] * 3:
        check(step_graphs(key, function, student, None), student, None)
    assert cuda.log == []
    check(step_graphs(KEY, step, older, None), older, None)
    assert cuda.log == ["replay on main", "event 2 on main"]


def test_a_step_that_cannot_be_captured(step_graphs, cuda):
    def broken(student, teacher):
        if cuda.capturing:
            raise ValueError("the step reads a number")
        return step(student, teacher)

    message = "the capture of a step failed with ValueError: the step reads a number"
    check_after_failure(step_graphs, cuda, broken, message)


@pytest.mark.parametrize("step_fails", [False, True])
def test_a_capture_whose_end_fails(step_graphs, cuda, step_fails):
    """The warning names the step's error, from which the other follows, if there is one."""

    def broken(student, teacher):
        if cuda.capturing:
            cuda.broken_end = RuntimeError("capture invalidated")
            if step_fails:
                raise ValueError("the step reads a number")
        return step(student, teacher)

    cause = "ValueError: the step reads a number" if step_fails else "RuntimeError: capture invalidated"
    check_after_failure(step_graphs, cuda, broken, f"the capture of a step failed with {cause}")


def test_an_interrupted_capture_is_tried_again(step_graphs, cuda):
    def interrupted(student, teacher):
        if cuda.capturing:
            raise KeyboardInterrupt
        return step(student, teacher)

    step_graphs(KEY, interrupted, embeddings(0), None)
    with pytest.raises(KeyboardInterrupt):
        step_graphs(KEY, interrupted, embeddings(0), None)
    assert cuda.current is cuda.main
    for seed in (1, 2):
        check(step_graphs(KEY, step, embeddings(seed), None), embeddings(seed), None)
    assert cuda.log[-2:] == ["replay on main", "event 1 on main"]


def test_an_error_of_the_step_is_the_callers(step_graphs, cuda):
    def wrong(student, teacher):
        raise ValueError("student must be finite")

    for _ in range(3):
        with pytest.raises(ValueError, match=r"^student must be finite$"):
            step_graphs(KEY, wrong, embeddings(0), None)
    assert cuda.log == []


def check_refused(step_graphs, reason: str, refusal: str | None = None) -> None:
    with pytest.warns(UserWarning) as caught:
        for seed in range(4):
            check(step_graphs(KEY, step, embeddings(seed), None, refusal), embeddings(seed), None)
    assert [str(warning.message) for warning in caught] == [f"BAMLoss: cuda_graph=True runs without a graph: {reason}"]


def test_reasons_are_given_once_each(cuda, step_graphs, monkeypatch):
    check_refused(step_graphs, "2 ranks exchange numbers", "2 ranks exchange numbers")
    check_refused(step_graphs, "a reference has none", "a reference has none")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    check_refused(step_graphs, "on ROCm a capture may hang")
    assert cuda.log == []


def test_cpu_tensors_are_refused():
    check_refused(StepGraphs(), "the embeddings are on cpu, not on a CUDA device")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_no_graphs(step_graphs, copied):
    for seed in range(3):
        step_graphs(KEY, step, embeddings(seed), None)
    module = torch.nn.Linear(2, 2)
    module.graphs = step_graphs
    other = copied(module).graphs if copied is not copy.copy else copied(step_graphs)
    assert type(other) is StepGraphs and vars(other).keys() == vars(step_graphs).keys()
    assert other._graphs == {} and other._cuda is torch.cuda and len(step_graphs._graphs) == 1


class ObservedLock:
    """A lock that says when somebody finds it taken."""

    def __init__(self) -> None:
        self.lock, self.found_taken = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        if self.lock.locked():
            self.found_taken.set()
        self.lock.acquire()

    def __exit__(self, *_) -> None:
        self.lock.release()


def test_a_second_thread_waits_until_results_are_copied_out(cuda, monkeypatch):
    locks = []
    monkeypatch.setattr(graphs, "Lock", lambda: locks.append(ObservedLock()) or locks[-1])
    step_graphs = StepGraphs(cuda, "cpu")
    for seed in (0, 1):
        step_graphs(KEY, step, embeddings(seed), None)
    of_second = []

    def second() -> None:
        try:
            of_second.append(step_graphs(KEY, step, embeddings(3), None))
        finally:
            locks[0].found_taken.set()  # also if it found the lock free: then it has replayed in between

    thread = threading.Thread(target=second)

    def between() -> None:
        cuda.after_replay = lambda: None
        locks[0].found_taken.clear()
        thread.start()
        locks[0].found_taken.wait()

    cuda.after_replay = between
    check(step_graphs(KEY, step, embeddings(2), None), embeddings(2), None)
    thread.join()
    check(of_second[0], embeddings(3), None)


def test_one_capture_at_a_time(monkeypatch):
    """PyTorch allows no two in a process, whatever modules they belong to."""
    lock = ObservedLock()
    monkeypatch.setattr(graphs, "_capture_lock", lock)
    devices = StandInCuda(), StandInCuda()  # a current stream belongs to a thread
    first, second = (StepGraphs(cuda, "cpu") for cuda in devices)
    overlaps = []

    def of_second(student, teacher):
        overlaps.extend([devices[0].capturing] * devices[1].capturing)
        return step(student, teacher)

    def capture_second() -> None:
        try:
            second(KEY, of_second, embeddings(1), None)
        finally:
            lock.found_taken.set()  # also if it found the lock free

    thread = threading.Thread(target=capture_second)

    def of_first(student, teacher):
        if devices[0].capturing:
            thread.start()
            lock.found_taken.wait()
        return step(student, teacher)

    second(KEY, of_second, embeddings(0), None)
    for seed in (0, 1):
        first(KEY, of_first, embeddings(seed), None)
    thread.join()
    assert overlaps == [False]
