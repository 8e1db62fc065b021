"""Centred keys as they arrive, and scores against them in slabs. Letters are those of layout.py."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.interface import FIXED_STEPS, RowKernels
from ..layout import Layout
from ..ranks import Ranks
from .plan import SlabPlan


class Keys:
    """The centred keys k - centre of all ranks, in gathered order.

    The centre is the mean of this rank's own keys, known before any other has arrived: any vector will do, since it
    adds a constant to every row of scores, and this one is within the sampling error of the mean of all.
    regather: they are not held, but gathered again whenever they are read.
    """

    def __init__(self, own: Tensor, ranks: Ranks, regather: bool = False) -> None:
        self.own, self.ranks = own, ranks
        self.centre = own.mean(0)
        n, D = own.shape
        self._held = None if regather and ranks.W > 1 else own.new_empty(ranks.W * n, D)
        self._complete = False

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first column, centred keys): rank by rank as they arrive, this rank's first; once all are here, in one."""
        if self._held is not None and self._complete:
            yield 0, self._held
            return
        for first, block in self.ranks.gather(self.own):
            if self._held is None:
                yield first, block - self.centre
            else:
                yield first, torch.sub(block, self.centre, out=self._held[first : first + len(block)])
        self._complete = True

    @property
    def whole(self) -> Tensor:
        """(N, D), once all have arrived."""
        assert self._held is not None
        if not self._complete:
            for _ in self.blocks():
                pass
        return self._held


class Scores:
    """Makes scores of unit rows against the keys, in slabs of one buffer that all sweeps and the match share.

    A slab is a pair of (rows, N) tensors: float32, and what the kernels read, which is the same tensor or its int16
    fixed-point copy (`step` is the value of one step). The float32 slab of an int16 one takes the gradient.
    """

    def __init__(
        self, keys: Keys, layout: Layout, masked: bool, fixed: bool, plan: SlabPlan, kernels: RowKernels
    ) -> None:
        self.keys, self.layout, self.masked, self.fixed, self.kernels = keys, layout, masked, fixed, kernels
        self.step: Any = 1.0
        if fixed:
            step = keys.whole.norm(dim=1).max() / FIXED_STEPS  # |z·k| <= max_j |k_j| for unit z
            self.step = step.item() if step.device.type == "cpu" else step
        self._made = keys.own.new_empty(plan.slab_rows, layout.N)
        self._read = torch.empty_like(self._made, dtype=torch.int16) if fixed else self._made

    def slab(self, rows: int, after: int = 0) -> tuple[Tensor, Tensor]:
        """`rows` rows of the buffer, past the first `after`."""
        return self._made[after : after + rows], self._read[after : after + rows]

    def make(self, unit: Tensor, first_row: int, slab: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of (m, D) unit rows first_row .. first_row + m - 1 into the slab's first m rows."""
        made, read = slab[0][: len(unit)], slab[1][: len(unit)]
        self._multiply(unit, made)
        if self.masked:
            self.kernels.mask_positives_(made, self.layout, first_row)
        if self.fixed:
            self.kernels.quantize(made, self.step, read)
        return made, read

    def make_images(self, unit: Tensor, first: int, slab: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of (views, b, D) unit rows of images first .. first + b - 1, as (views, b, N) tensors."""
        views, b, _ = unit.shape
        shape = (views, b, self.layout.N)
        made, read = slab[0][: views * b], slab[1][: views * b]
        self._multiply(unit.reshape(views * b, -1), made)
        if self.masked:
            for view in made.view(shape):
                self.kernels.mask_positives_(view, self.layout, first)
        if self.fixed:
            self.kernels.quantize(made, self.step, read)
        return made.view(shape), read.view(shape)

    def make_both(self, first: Tensor, second: Tensor, out_first: Tensor, out_second: Tensor) -> None:
        """Scores of all rows of two sets of unit rows, in one reading of the keys."""
        for column, block in self.keys.blocks():
            columns = slice(column, column + len(block))
            torch.mm(first, block.T, out=out_first[:, columns])
            torch.mm(second, block.T, out=out_second[:, columns])
        if self.masked:
            self.kernels.mask_positives_(out_first, self.layout, 0)
            self.kernels.mask_positives_(out_second, self.layout, 0)

    def _multiply(self, unit: Tensor, out: Tensor) -> None:
        for column, block in self.keys.blocks():
            torch.mm(unit, block.T, out=out[:, column : column + len(block)])


class Sweeps(Protocol):
    """The scores of the Sinkhorn problem, some rows at a time; `step` is the value of one step of fixed point."""

    step: Any
    kernels: RowKernels
    columns: int

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, scores of some rows) until all rows have been seen."""


class KeptScores:
    """Scores that are there already."""

    def __init__(self, scores: Tensor, step: Any, kernels: RowKernels) -> None:
        self.scores, self.step, self.kernels, self.columns = scores, step, kernels, scores.shape[1]

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.scores


class TargetScores:
    """Scores from embeddings: kept whole after the first sweep, or made again in every sweep."""

    def __init__(self, unit: Tensor, scores: Scores, plan: SlabPlan) -> None:
        self.unit = unit
        self.scores = scores
        self.plan = plan
        self.kept: Tensor | None = None
        self.step, self.kernels, self.columns = scores.step, scores.kernels, scores.layout.N

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        if self.kept is not None:
            yield 0, self.kept
            return
        rows, size = len(self.unit), self.plan.sweep_rows
        if not self.plan.cached:
            slab = self.scores.slab(size)
            for first in range(0, rows, size):
                yield first, self.scores.make(self.unit[first : first + size], first, slab)[1]
            return
        kept = self.unit.new_empty(rows, self.columns, dtype=torch.int16 if self.scores.fixed else torch.float32)
        for first in range(0, rows, size):
            part = kept[first : first + size]
            slab = (self.scores.slab(size)[0] if self.scores.fixed else part, part)
            yield first, self.scores.make(self.unit[first : first + size], first, slab)[1]
        self.kept = kept


class SourceScores:
    """The student's scores beside a teacher's, kept whole: made in portions while the ranks add up columns."""

    def __init__(self, unit: Tensor, scores: Scores, portions: int) -> None:
        self.unit, self.scores = unit, scores
        self.kept = unit.new_empty(len(unit), scores.layout.N)
        self._portion = -(-len(unit) // portions)
        self._done = 0

    def next_portion(self) -> None:
        first, last = self._done, min(self._done + self._portion, len(self.unit))
        if first < last:
            part = self.kept[first:last]
            self.scores.make(self.unit[first:last], first, (part, part))
            self._done = last

    def finish(self) -> Tensor:
        while self._done < len(self.unit):
            self.next_portion()
        return self.kept

    def mark_made(self) -> None:
        """All of `kept` has been written."""
        self._done = len(self.unit)
