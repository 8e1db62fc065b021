"""Results of a step by the engine, whatever has been recorded, and by a recording, which no engine may help."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from equal_ranks import EqualRanks
from peak_memory import PeakMemory
from problems import features
from torch import Tensor

from bam_kernels import BAMStats, bam_loss, checked_call
from bam_kernels.engine import flash, slab
from bam_kernels.engine.recording import Recording
from bam_kernels.engine.step import Step

BEFORE_REPEATS = 2  # the first call runs as it is, the second is recorded
SLABS = {"memory_budget": 3000}  # of a few rows of 20 to 80 images
Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A problem of B images; R: views of the teacher, or 0."""

    V: int = 2
    B: int = 7
    D: int = 13
    R: int = 0
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)

    def inputs(self, seed: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        teacher = features(self.R, self.B, self.D, seed=1000 + seed).to(device, self.dtype) if self.R else None
        return features(self.V, self.B, self.D, seed=seed).to(device, self.dtype), teacher


@contextmanager
def engine_alone() -> Iterator[None]:
    """In the block every call goes through the engine, and none is counted or recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "_key", lambda *_: None)
        yield


@contextmanager
def recordings_alone() -> Iterator[None]:
    """In the block a call that needs the engine fails."""

    def refuse(call: Any) -> None:
        raise AssertionError("the engine ran, not a recording")

    with pytest.MonkeyPatch.context() as patch:
        for engine in (slab, flash):
            patch.setattr(engine, "evaluate", refuse)
        yield


def result(student: Tensor, teacher: Tensor | None = None, *, factor: float = 1.0, **options: Any) -> Result:
    """Loss, statistics (6,) and the gradient of factor * loss, for a leaf on the student's memory."""
    leaf = student.detach().requires_grad_()
    loss, stats = bam_loss(leaf, teacher, return_stats=True, **options)
    (grad,) = torch.autograd.grad(loss * factor if factor != 1.0 else loss, leaf)
    return loss.detach(), stats_of(stats), grad


def stats_of(stats: BAMStats) -> Tensor:
    return torch.stack(list(vars(stats).values()))


def by_engine(*given: Any, **options: Any) -> Result:
    with engine_alone():
        return result(*given, **options)


def repeated(*given: Any, **options: Any) -> Result:
    with recordings_alone():
        return result(*given, **options)


def record(*given: Any, **options: Any) -> None:
    """Call often enough that calls like these repeat a recording."""
    for _ in range(BEFORE_REPEATS):
        result(*given, **options)


def kept_recordings() -> list[Recording | str]:
    """Recordings of the one step that is kept, and what stands in their place."""
    (call,) = checked_call._calls.values()
    (step,) = call._steps.values()
    return [*step._recordings.values()]


def engine_peak(*given: Any, **options: Any) -> int:
    """Most bytes that are alive at once in the slab engine, besides its inputs."""
    evaluate, memory = slab.evaluate, PeakMemory()

    def watched(call: Any) -> Any:
        with memory:
            return evaluate(call)

    with engine_alone(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(slab, "evaluate", watched)
        result(*given, **options)
    return memory.peak


def check_equal(found: Result, expected: Result) -> None:
    """Bit for bit, in values, types and strides; NaN equals NaN."""
    for actual, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=0.0, atol=0.0, equal_nan=True)
        assert actual.stride() == truth.stride()


def check_ring(case: Case, device: torch.device) -> None:
    """A repeated step of three ranks is the engine's. Messages are read late, after further work of the sender."""
    group = EqualRanks(3, 1)
    record(*case.inputs(0, device), group=group, **case.options)
    given = case.inputs(1, device)
    found = repeated(*given, group=group, **case.options)
    check_equal(found, by_engine(*given, group=group, **case.options))
