"""Messages in recordings of small steps that are written here: their memory, and that of what runs meanwhile."""

from collections.abc import Callable

import torch
from equal_ranks import EqualRanks
from torch import Tensor

from bam_kernels.engine.recorded_ranks import RecordedRanks
from bam_kernels.engine.recorder import Recorder
from bam_kernels.engine.recording import Recording
from bam_kernels.engine.workspace import NO_BASE
from bam_kernels.ranks import Ranks
from bam_kernels.simulated import ThreadRanks, run_ranks

W = 3


def integers(seed: int) -> Tensor:
    """(8,) whole numbers, whose sums are exact."""
    return torch.randint(100, (8,), generator=torch.Generator().manual_seed(seed), device="cpu").float()


def recorded(step: Callable[[RecordedRanks, Tensor], list[Tensor]], ranks: Ranks, x: Tensor) -> Recording:
    recorder = Recorder([x])
    with recorder:
        outputs = step(RecordedRanks(ranks, recorder), x)
    return recorder.finish(outputs)


def sum_of_contributions(ranks: RecordedRanks, x: Tensor) -> list[Tensor]:
    """Contributions 3x + r, each made in memory that nothing uses afterwards; then 2x + 7 beside their sum."""

    def contribution(rank: int) -> Tensor:
        tripled = torch.mul(x, 3.0, out=torch.empty_like(x))
        return torch.add(tripled, float(rank), out=torch.empty_like(x))

    total = ranks.scatter(contribution)
    doubled = torch.mul(x, 2.0, out=torch.empty_like(x))
    shifted = torch.add(doubled, 7.0, out=torch.empty_like(x))
    return [torch.add(total, shifted, out=torch.empty_like(x))]


def test_a_sum_of_contributions_lies_in_the_last_of_them():
    """A ring adds what arrives to the contribution, whose memory later operations leave alone."""
    group = EqualRanks(W, 1)
    recording = recorded(sum_of_contributions, group, integers(0))
    assert all(place.base != NO_BASE for place in recording.places)  # each tensor lies in memory of the recording
    for seed in (1, 2):
        (found,) = recording.run(integers(seed), ranks=group)
        assert torch.equal(found, 3 * W * integers(seed) + (0 + 1 + 2) + 2 * integers(seed) + 7)


def test_a_sum_of_contributions_is_new_memory():
    recordings = run_ranks(W, lambda group: recorded(sum_of_contributions, group, integers(group.rank)))

    def run(group: ThreadRanks) -> Tensor:
        return recordings[group.rank].run(integers(10 + group.rank), ranks=group)[0]

    found, given = run_ranks(W, run), [integers(10 + rank) for rank in range(W)]
    for rank in range(W):
        assert torch.equal(found[rank], 3 * sum(given) + W * rank + 2 * given[rank] + 7)


def test_blocks_of_keys_are_read_as_another_type():
    """Each block of keys has its own memory, also where it is read as whole numbers."""

    def sum_of_bits(ranks: RecordedRanks, x: Tensor) -> list[Tensor]:
        total = x.new_zeros(len(x), dtype=torch.int32)
        for _, block in ranks.gather(x, lambda unit: unit):
            total.add_(block.view(torch.int32))
        return [total]

    recordings = run_ranks(W, lambda group: recorded(sum_of_bits, group, integers(group.rank)))

    def run(group: ThreadRanks) -> Tensor:
        return recordings[group.rank].run(integers(10 + group.rank), ranks=group)[0]

    expected = sum(integers(10 + rank).view(torch.int32) for rank in range(W))
    for found in run_ranks(W, run):
        assert torch.equal(found, expected)
