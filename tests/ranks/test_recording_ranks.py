"""Steps of several ranks that repeat a recording: equal to the engine bit for bit, whatever the other ranks do.

Ranks are threads here, or a ring in one thread; test_process_groups.py has real processes.
bam_kernels/layout.py defines the dimension letters.
"""

import pytest
import torch
from equal_ranks import EqualRanks
from peak_memory import PeakMemory
from problems import features, needs_cpu_kernels
from repeated_steps import (
    BEFORE_REPEATS,
    Case,
    by_engine,
    check_equal,
    engine_alone,
    engine_peak,
    kept_recordings,
    record,
    recordings_alone,
    repeated,
    result,
)

from bam_kernels import bam_loss
from bam_kernels.engine import recorded_ranks, recording, slab
from bam_kernels.engine.noted import NotRecordable
from bam_kernels.engine.recorder import Recorder
from bam_kernels.engine.recording import NoRoom, Recording
from bam_kernels.engine.step import NEVER
from bam_kernels.simulated import SimulatedRanks, ThreadRanks, run_ranks

pytestmark = needs_cpu_kernels

CASES = {
    "no teacher": Case(),
    "one view": Case(V=1),
    "large": Case(V=3, B=67, D=48),
    "teacher": Case(V=4, R=2),
    "target rows of the student": Case(V=4, R=2, options={"target_rows": "student"}),
    "one key view": Case(V=3, options={"key_views": 1}),
    "top_k": Case(V=3, options={"top_k": 3}),
    "no mask": Case(options={"mask_positives": False}),
    "one iteration": Case(R=2, options={"iterations": 1}),
    "epsilon that needs a maximum": Case(options={"epsilon": 1e-3}),
    "slabs": Case(V=3, B=20, options={"memory_budget": 6000}),
    "slabs, teacher": Case(V=3, B=20, R=2, options={"memory_budget": 9000}),
    "regather": Case(V=3, options={"regather": True}),
    "regather, teacher": Case(V=3, R=2, options={"regather": True}),
    "float16": Case(V=3, dtype=torch.float16),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
CALLS = BEFORE_REPEATS + 2


def on_ranks(W: int, case: Case, calls: range) -> list:
    """Results of each call on each rank; every rank and every call has other embeddings."""

    def run(group: ThreadRanks) -> list:
        given = [case.inputs(100 * seed + group.rank) for seed in calls]
        return [result(*embeddings, group=group, **case.options) for embeddings in given]

    return run_ranks(W, run)


def check_all_equal(found: list, expected: list) -> None:
    """Results of each call on each rank, bit for bit."""
    for of_rank, truth in zip(found, expected, strict=True):
        for x, y in zip(of_rank, truth, strict=True):
            check_equal(x, y)


class CountedEngine:
    """In its block, counts evaluations by the slab engine, by rank."""

    def __enter__(self) -> list[int]:
        ranks, evaluate = [], slab.evaluate

        def counted(call):
            ranks.append(call.ranks.rank)
            return evaluate(call)

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(slab, "evaluate", counted)
        return ranks

    def __exit__(self, *_) -> None:
        self._patch.undo()


@every_case
@pytest.mark.parametrize("W", [2, 3])
def test_repeated_steps_of_ranks_are_the_engines(W, case):
    with engine_alone():
        expected = on_ranks(W, case, range(CALLS))
    with CountedEngine() as evaluations:
        found = on_ranks(W, case, range(CALLS))
    assert sorted(evaluations) == sorted([*range(W)] * BEFORE_REPEATS)
    check_all_equal(found, expected)


@every_case
@pytest.mark.parametrize("rank", [0, 2])
def test_messages_are_intact_until_they_are_read(rank, case):
    """Ranks of a ring copy what they send when the receiver waits, after further work of the sender."""
    group = EqualRanks(4, rank)
    record(*case.inputs(0), group=group, **case.options)
    for seed in (1, 2):
        found = repeated(*case.inputs(seed), group=group, **case.options)
        with engine_alone():
            check_equal(found, result(*case.inputs(seed), group=group, **case.options))


WIDE = {"V": 2, "B": 8, "D": 512}  # messages are much of the memory
SLACK = 4096  # bytes
REGATHER = {"regather": True}


@pytest.mark.parametrize(
    ("R", "options", "messages"), [(0, {}, 1), (2, {}, 1), (0, REGATHER, 1), (2, REGATHER, 0)], ids=str
)
def test_a_repeated_step_of_ranks_takes_no_more_memory_than_the_engine(R, options, messages):
    """A repeated step holds what the engine holds at its busiest moment. Where keys are kept, one message comes on top,
    because messages lie outside of the workspace. Where keys are gathered again, their blocks are freed once read; but
    dz, which is as large as a message where keys are the student's, is there from the beginning of a repeated step.
    """
    case, group = Case(**WIDE, R=R), EqualRanks(8, 3)
    options = options | {"group": group}
    peak = engine_peak(*case.inputs(0), **options)
    record(*case.inputs(0), **options)
    (made,) = kept_recordings()
    given = [x for x in case.inputs(1) if x is not None]
    with PeakMemory() as again:
        made.run(*given, ranks=group)
    message = 2 * case.B * case.D * 4
    assert 0 < again.peak <= peak + messages * message + SLACK


def test_a_ring_holds_two_blocks_at_once():
    """One that is read and sent, and one that arrives."""
    own = torch.ones(64, 64, dtype=torch.float32)
    with PeakMemory() as used:
        blocks = EqualRanks(5, 1).gather(own, lambda unit: unit)
        while next(blocks, None) is not None:
            pass
    assert used.total == 4 * own.nbytes and used.peak == 2 * own.nbytes


# One rank does otherwise


def outcomes(call) -> list:
    """What `call(group, time)` returns or raises at each time, on each of two ranks."""

    def run(group: ThreadRanks) -> list:
        seen = []
        for time in range(CALLS + 2):
            try:
                seen.append(call(group, time))
            except ValueError as error:
                seen.append(error)
        return seen

    return run_ranks(2, run)


FAULTY = CALLS - 1  # time of the fault, when both ranks repeat


@pytest.mark.parametrize("R", [0, 2])
def test_a_row_that_is_not_finite_on_one_rank(R):
    """Both ranks say so, exactly as the engine does, and go on afterwards."""
    case = Case(V=3, R=R)

    def call(group: ThreadRanks, time: int):
        given = [x for x in case.inputs(group.rank) if x is not None]
        if time == FAULTY and group.rank == 1:
            given[-1][1, 2] = torch.inf
        return result(*given, group=group)

    with engine_alone():
        expected = outcomes(call)
    with CountedEngine() as evaluations:
        found = outcomes(call)
    assert sorted(evaluations) == [0, 0, 1, 1, 1]  # the rank of the row has the engine look for it
    for rank in range(2):
        for time in range(CALLS + 2):
            x, y = found[rank][time], expected[rank][time]
            if time == FAULTY:
                assert type(x) is type(y) is ValueError and str(x) == str(y) and "finite" in str(x)
            else:
                check_equal(x, y)


def test_a_row_that_is_not_finite_on_one_rank_makes_both_nan():
    case = Case(V=3)

    def call(group: ThreadRanks, time: int):
        student, _ = case.inputs(group.rank)
        if time == FAULTY and group.rank == 1:
            student[1, 2] = torch.nan
        return result(student, group=group, non_finite="nan")

    with engine_alone():
        expected = outcomes(call)
    found = outcomes(call)
    for rank in range(2):
        assert found[rank][FAULTY][0].isnan() and found[rank][FAULTY][2].isnan().all()
        for x, y in zip(found[rank], expected[rank], strict=True):
            check_equal(x, y)


def test_an_option_that_one_rank_changes():
    """Ranks that repeat compare the problem as well."""

    def call(group: ThreadRanks, time: int):
        student, _ = Case().inputs(group.rank)
        return result(student, group=group, epsilon=0.06 if time == FAULTY and group.rank == 1 else 0.05)

    for seen in outcomes(call):
        assert isinstance(seen[FAULTY], ValueError)
        assert "ranks disagree on epsilon: 0.05 on rank 0; 0.06 on rank 1" in str(seen[FAULTY])
        check_equal(seen[-1], seen[0])


def test_a_rank_that_cannot_record():
    """On one rank the teacher's rows lie in the student's memory. The other rank repeats, and both are right."""
    case = Case(R=2)

    def call(group: ThreadRanks, time: int):
        student, _ = case.inputs(10 * time + group.rank)
        return result(student, student[:2] if group.rank else student[:2].clone(), group=group)

    with engine_alone():
        expected = outcomes(call)
    with CountedEngine() as evaluations:
        found = outcomes(call)
    assert sorted(evaluations) == [0] * BEFORE_REPEATS + [1] * (CALLS + 2)
    check_all_equal(found, expected)


def test_a_step_goes_on_where_its_recording_is_given_up(monkeypatch):
    """One rank meets what cannot be noted in the midst of its messages, for which the other rank waits."""
    sum_of, case = recorded_ranks.RecordedRanks.sum, Case(V=3)

    def refused_on_rank_1(self, x, meanwhile=None):
        if self.rank == 1:
            self._recorder.refuse("a reason")
        return sum_of(self, x, meanwhile)

    with engine_alone():
        expected = on_ranks(2, case, range(CALLS))
    monkeypatch.setattr(recorded_ranks.RecordedRanks, "sum", refused_on_rank_1)
    with CountedEngine() as evaluations:
        found = on_ranks(2, case, range(CALLS))
    assert sorted(evaluations) == [0] * BEFORE_REPEATS + [1] * CALLS
    check_all_equal(found, expected)


def test_too_little_memory_on_one_rank(monkeypatch):
    """Where the workspace does not fit, the engine computes, which may need less, while the other rank repeats."""
    begin, case = Recording._begin, Case(V=3, R=2)

    def crowded(self, inputs, device, ranks):
        if ranks.rank == 1:
            raise NoRoom("no memory")
        return begin(self, inputs, device, ranks)

    with engine_alone():
        expected = on_ranks(2, case, range(CALLS))
    monkeypatch.setattr(Recording, "_begin", crowded)
    with CountedEngine() as evaluations:
        found = on_ranks(2, case, range(CALLS))
    assert sorted(evaluations) == [0] * BEFORE_REPEATS + [1] * CALLS
    check_all_equal(found, expected)


def test_no_memory_in_the_midst_of_a_repeated_step(monkeypatch):
    """Several ranks: an error, since the engine would send messages again that other ranks have. One rank: computed."""

    def full(self, run) -> None:
        raise torch.OutOfMemoryError("no memory for an operator")

    case, group = Case(V=3, R=2), EqualRanks(2, 0)
    for options in ({"group": group}, {}):
        record(*case.inputs(0), **options)
    expected = [by_engine(*case.inputs(1), **options) for options in ({"group": group}, {})]
    with monkeypatch.context() as patch:
        patch.setattr(recording.Operator, "__call__", full)
        with CountedEngine() as evaluations, pytest.raises(torch.OutOfMemoryError, match="for an operator"):
            result(*case.inputs(1), group=group)
        assert evaluations == []
        check_equal(result(*case.inputs(1)), expected[1])
    check_equal(repeated(*case.inputs(1), group=group), expected[0])


# Simulated ranks


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("R", [0, 2])
def test_simulated_ranks_that_keep_what_others_send(R, rank):
    case = Case(V=3, R=R)
    keys = torch.nn.functional.normalize(features(1, 3 * 2 * case.B, case.D, seed=9)[0], dim=1)
    group = SimulatedRanks(3, rank, keys, keep_sent=True)
    record(*case.inputs(0), group=group)
    for seed in (1, 2):
        with engine_alone():
            expected = result(*case.inputs(seed), group=group)
        check_equal(repeated(*case.inputs(seed), group=group), expected)


def test_simulated_ranks_that_make_messages_at_every_call_are_not_recorded():
    """The engine makes the other ranks' messages, from what it has computed in the same call."""
    student, _ = Case().inputs(0)
    keys = torch.nn.functional.normalize(features(1, 28, 13, seed=9)[0], dim=1)
    group = SimulatedRanks(2, 0, keys)
    record(student, group=group)
    assert kept_recordings() == [NEVER]
    with recordings_alone(), pytest.raises(AssertionError, match="the engine ran"):
        bam_loss(student, group=group)


def test_the_reason_against_simulated_ranks():
    own, keys = (torch.ones(n, 3, dtype=torch.float32) for n in (4, 8))
    recorder = Recorder([own])
    ranks = recorded_ranks.RecordedRanks(SimulatedRanks(2, 0, keys), recorder)
    with recorder:
        assert [first for first, _ in ranks.gather(own, lambda unit: unit.clone())] == [0, 4]
    with pytest.raises(NotRecordable, match="messages of simulated ranks are made anew"):
        recorder.finish([])
