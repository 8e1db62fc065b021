"""Recordings of operators, and the workspace in which their tensors share places.

bam_kernels/layout.py defines the dimension letters.
"""

import math
import random

import pytest
import torch
from peak_memory import PeakMemory
from problems import needs_cpu_kernels
from repeated_steps import Case, check_equal, engine_peak, kept_recordings, record
from torch import Tensor

from bam_kernels.backends import cpu
from bam_kernels.backends.extension import _C
from bam_kernels.engine import recorder as recorder_module
from bam_kernels.engine.noted import NotRecordable
from bam_kernels.engine.recorder import Recorder
from bam_kernels.engine.recording import Recording
from bam_kernels.engine.workspace import ALIGNMENT, Block, place

FLOAT32 = {"dtype": torch.float32, "device": "cpu"}


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(6, 8, generator=generator, **FLOAT32) for _ in range(2))
    return x, y


def recording_of(function, *given: Tensor) -> Recording:
    recorder = Recorder(given)
    with recorder:
        outputs = function(*given)
    return recorder.finish(outputs)


def check_repeats(function, *, of=inputs) -> Recording:
    """A recording of the function gives what the function gives, for other inputs, twice each."""
    recording = recording_of(function, *of(0))
    for seed in (1, 2):
        expected = function(*of(seed))
        results = [recording.run(*of(seed)) for _ in range(2)]
        for found in results:
            check_equal(found, expected)
        memory = {x.untyped_storage().data_ptr() for found in results for x in found if x.numel()}
        assert len(memory) == sum(x.numel() > 0 for found in results for x in found)
    return recording


# Operators


def with_memory_that_is_freed(x: Tensor, y: Tensor) -> list[Tensor]:
    """Rooms of one size, freed one after another, so that the allocator lends their memory again."""
    last = x
    for i in range(8):
        room = torch.empty(6, 8, **FLOAT32)
        torch.addcmul(last, x, y, value=i, out=room)
        last = room
    return [torch.sub(last, y, out=torch.empty(6, 8, **FLOAT32))]


def with_lists_and_keywords(x: Tensor, y: Tensor) -> list[Tensor]:
    out = torch.empty(12, 8, **FLOAT32)
    torch.cat([x, y], out=out)
    parts = torch.cat([out[::2], x * 2, y.T.contiguous().T], 1)
    stacked = torch.stack([parts[:, :8], y], dim=0)
    return [out, torch.clamp(stacked, min=x, max=None)]


def with_several_results(x: Tensor, y: Tensor) -> list[Tensor]:
    least, most = x.aminmax()
    mantissa, exponent = torch.frexp(y)
    values, order = torch.sort(x * most - least, dim=1, descending=True)
    return [mantissa + least, exponent, values, torch.gather(y, 1, order)]


def with_views_and_other_types(x: Tensor, y: Tensor) -> list[Tensor]:
    fixed = torch.empty(7, 8, dtype=torch.int16, device="cpu")
    half = fixed.view(torch.float16)[1:]
    half.copy_(x)
    out = torch.empty(6, 8, **FLOAT32)
    torch.add(half, y, out=out)
    out[1:3].zero_()
    out[:, ::2] += y[:, 1::2]
    out.view(-1)[5:9].mul_(x.flatten()[:4])
    return [out, half.double()]


def with_empty_tensors(x: Tensor, y: Tensor) -> list[Tensor]:
    nothing = torch.empty(0, 8, **FLOAT32)
    out = torch.cat([nothing, x[6:], y])
    return [out, nothing, x.new_empty(0)]


def with_constants(x: Tensor, y: Tensor) -> list[Tensor]:
    zeros, ones = torch.zeros(8, **FLOAT32), x.new_full((6, 1), 1.5)
    return [zeros.add_(x.sum(0)), torch.arange(8, **FLOAT32) * ones + y]


OPERATORS = [
    with_memory_that_is_freed,
    with_lists_and_keywords,
    with_several_results,
    with_views_and_other_types,
    with_empty_tensors,
    with_constants,
]


@pytest.mark.parametrize("function", OPERATORS)
def test_operators(function):
    check_repeats(function)


@pytest.mark.parametrize("function", OPERATORS)
def test_operators_of_parts_of_larger_tensors(function):
    """Inputs have gaps, and do not begin where their storage begins."""

    def part(seed: int) -> list[Tensor]:
        return [torch.full((11, 13), torch.nan)[3:, 5:11].T.copy_(x) for x in inputs(seed)]

    check_repeats(function, of=part)


@pytest.mark.skipif(_C is None, reason="launches are the extension's")
def test_launches_between_operators():
    """A launch uses memory before and after an operator lends it to another tensor."""
    kernels = cpu.kernels("plain")

    def steps(x: Tensor, y: Tensor, kernels=kernels) -> list[Tensor]:
        unit = kernels.normalize(x)
        mean = kernels.mean_row(unit.read)
        centred = unit.read - mean
        norm = unit.norm.float()
        del unit, mean
        again = kernels.normalize(centred)
        return [kernels.mean_row(again.read).add_(norm.sum()), kernels.normalize(y).read]

    given = inputs(0)
    recorder = Recorder(given)
    with recorder:
        outputs = steps(*given, kernels=kernels.recorded(recorder))
    recording = recorder.finish(outputs)
    for seed in (1, 2):
        check_equal(recording.run(*inputs(seed)), steps(*inputs(seed)))


def test_results_are_freed_after_their_last_use():
    """A chain of results holds two at a time while it is repeated, not all; an input is never freed."""

    def chain(x: Tensor, y: Tensor) -> list[Tensor]:
        for _ in range(40):
            x = x + y
        return [x]

    recording = check_repeats(chain)
    given = inputs(3)
    with PeakMemory() as memory:
        recording.run(*given)
    size = given[0].nbytes
    assert memory.total == 40 * size and memory.peak <= 3 * size
    check_equal(recording.run(*given), chain(*given))


# What cannot be recorded

OUTSIDE = torch.ones(6, 8)
REFUSED = {
    "a tensor from outside": (lambda x, y: [x + OUTSIDE], "from outside of the step"),
    "output from outside": (lambda x, y: [OUTSIDE], "from outside of the step"),
    "a tensor made of numbers": (lambda x, y: [x + torch.tensor([1.0] * 8)], "from outside of the step"),
    "a number": (lambda x, y: [x * x.sum().item()], "depends on the contents"),
    "a truth value": (lambda x, y: [x if torch.equal(x, y) else y], "depends on the contents"),
    "places of numbers": (lambda x, y: [(x > 0).nonzero()], "depends on the contents"),
    "chosen numbers": (lambda x, y: [x[x > 0]], "depends on the contents"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded(name):
    function, words = REFUSED[name]
    with pytest.raises(NotRecordable, match=words):
        recording_of(function, *inputs(0))


def test_outputs_that_overlap_or_are_parts():
    def parts(x: Tensor, y: Tensor) -> list[Tensor]:
        room = torch.empty(2, 6, 8, **FLOAT32)
        return [torch.add(x, y, out=room[0]), torch.sub(x, y, out=room[1])]

    def twice(x: Tensor, y: Tensor) -> list[Tensor]:
        room = torch.empty(6, 8, **FLOAT32)
        return [torch.add(x, y, out=room), room]

    with pytest.raises(NotRecordable, match="an output is a part of a tensor"):
        recording_of(parts, *inputs(0))
    with pytest.raises(NotRecordable, match="two outputs share their memory"):
        recording_of(twice, *inputs(0))
    x, _ = inputs(0)
    with pytest.raises(NotRecordable, match="two inputs share their memory"):
        recording_of(lambda x, part: [x * 2], x, x[2:])


# The workspace


def block(size: int, first: int, last: int) -> Block:
    return Block(0, size, allocated=True, first=first, last=last)


def size_of(x: Block) -> int:
    return x.end - x.begin


def check_places(blocks: list[Block], total: int, base: int) -> None:
    """No two blocks meet in time and place; all are aligned, and within the workspace."""
    for i, x in enumerate(blocks):
        assert x.base == base and x.offset % ALIGNMENT == 0 and 0 <= x.offset and x.offset + size_of(x) <= total
        for y in blocks[:i]:
            together = x.first <= y.last and y.first <= x.last
            overlap = x.offset < y.offset + size_of(y) and y.offset < x.offset + size_of(x)
            assert not (together and overlap), (x, y)


def least_bytes(blocks: list[Block]) -> int:
    """Bytes of the blocks that are in use at the busiest moment."""
    return max(
        sum(size_of(x) for x in blocks if x.first <= t <= x.last) for t in range(max(x.last for x in blocks) + 1)
    )


@pytest.mark.parametrize("seed", range(30))
def test_places_of_random_blocks(seed):
    draw = random.Random(seed)
    blocks = []
    for _ in range(draw.randint(1, 60)):
        first = draw.randint(0, 40)
        size = draw.choice([1, 4, 255, 256, 257, 1000, draw.randint(1, 10_000)])
        blocks.append(block(size, first, first + draw.choice([0, 1, draw.randint(0, 40)])))
    total = place(blocks, 2)
    check_places(blocks, total, 2)
    assert total % ALIGNMENT == 0
    # No placement is smaller than `least`; largest first is near it.
    least = least_bytes(blocks)
    assert least <= total <= 1.5 * least + ALIGNMENT * len(blocks)


def test_places_are_shared_one_after_another():
    for size, aligned in ((1000, 1024), (1024, 1024), (1025, 1280)):
        for lasting, count in ((0, 1), (1, 2), (3, 4)):
            blocks = [block(size, i, i + lasting) for i in range(20)]
            total = place(blocks, 0)
            check_places(blocks, total, 0)
            assert total == count * aligned


def test_small_blocks_fill_the_place_of_a_large_one():
    blocks = [block(4096, 0, 3), *(block(1024, 4, 9) for _ in range(4)), block(4096, 10, 11)]
    total = place(blocks, 1)
    check_places(blocks, total, 1)
    assert total == 4096


def test_a_gap_is_used_only_if_it_is_wide_enough():
    """Between two blocks that last, a gap of 1024 bytes opens; 1280 bytes go behind."""
    low, gap, high = block(4096, 0, 9), block(1024, 0, 1), block(2048, 0, 9)
    fits, wide = block(1000, 5, 9), block(1300, 5, 9)
    total = place([low, gap, high, fits, wide], 0)
    check_places([low, gap, high, fits, wide], total, 0)
    assert total <= 4096 + 2048 + 1536 + 1024
    assert place([], 3) == 0


SLACK = 20 * ALIGNMENT  # the blocks that a step uses at once are rounded up
WIDE = {"V": 4, "B": 50, "D": 32}
BUDGET = {"memory_budget": 20_000}
CASES = {
    "whole": Case(**WIDE),
    "teacher": Case(**WIDE, R=3),
    "slabs": Case(**WIDE, options=BUDGET),
    "slabs, teacher": Case(**WIDE, R=3, options=BUDGET),
    "slabs, top_k": Case(**WIDE, options=BUDGET | {"top_k": 4}),
    "float16": Case(**WIDE, dtype=torch.float16),
    "float16, slabs, teacher": Case(**WIDE, R=3, dtype=torch.float16, options=BUDGET),
}


@needs_cpu_kernels
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_places_of_a_step(case, monkeypatch):
    """The workspace holds what is in use at the busiest moment, with little between; slabs share much."""
    placed = []

    def noted_place(blocks: list[Block], base: int) -> int:
        placed.append((blocks, place(blocks, base), base))
        return placed[-1][1]

    monkeypatch.setattr(recorder_module, "place", noted_place)
    record(*case.inputs(0), **case.options)
    ((blocks, total, base),) = placed
    check_places(blocks, total, base)
    assert total <= least_bytes(blocks) + SLACK
    if case.options:
        assert total <= 0.85 * sum(map(size_of, blocks))


@needs_cpu_kernels
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_repeated_step_takes_no_more_memory_than_the_engine(case):
    """The workspace and the outputs: as much as is alive at once in the engine, besides the inputs."""
    peak = engine_peak(*case.inputs(0), **case.options)
    record(*case.inputs(0), **case.options)
    (recording,) = kept_recordings()
    outputs = sum(math.prod(size) * dtype.itemsize for size, dtype in recording.allocated)
    held = recording.workspace_bytes + outputs
    assert case.V * case.B * case.D * 4 < held <= peak + SLACK
    if case.options:
        scores = (case.V + case.R) * case.B * 2 * case.B * 4  # of two key views
        assert recording.workspace_bytes < scores
    student, teacher = case.inputs(1)
    with PeakMemory() as repeated:
        recording.run(*((student,) if teacher is None else (student, teacher)))
    results = repeated.total - held
    assert repeated.peak <= peak + SLACK + results
