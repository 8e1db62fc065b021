"""Scores of unit rows against the gathered keys, made in slabs: kept whole, or made again in every sweep.

In 16 bit rows and keys are fp16 times HALF_UNIT and scores int16, else all are float32. Letters are those of layout.py.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.interface import (
    FIXED_STEPS,
    HALF_UNIT,
    DeviceNumber,
    Positives,
    Potential,
    RowKernels,
    SixteenBitKernels,
    UnitRows,
)
from ..layout import Layout
from ..precision import multiply
from ..ranges import each, named
from ..ranks import Ranks
from .plan import SlabPlan


class Keys:
    """The centred keys k - centre of all ranks, in gathered order; float32, or fp16 times `unit`.

    Any vector will do for the centre, since it adds a constant to every row of scores. Float32 keys are sent as they
    are and centred where they arrive, on the mean of that rank's own, known before any other has come: it is within the
    sampling error of the mean of all. fp16 keys are rounded, so they are centred before, on a mean that ranks share.
    regather: they are not held, but gathered again whenever they are read.
    """

    def __init__(self, own: Tensor, centre: Tensor, ranks: Ranks, regather: bool = False) -> None:
        self.own, self.centre, self.ranks = own, centre, ranks
        self.sixteen_bit = own.dtype == torch.float16
        self.unit = HALF_UNIT if self.sixteen_bit else 1.0
        self._complete = ranks.W == 1 and self.sixteen_bit
        n, D = own.shape
        if self._complete:
            self._held: Tensor | None = own
        else:
            self._held = None if regather and ranks.W > 1 else own.new_empty(ranks.W * n, D)

    @classmethod
    def of(
        cls, rows: UnitRows, ranks: Ranks, kernels: Any, *, sixteen_bit: bool = False, regather: bool = False
    ) -> "Keys":
        """rows: this rank's keys, as their products with other keys read them."""
        if not sixteen_bit:
            return cls(rows.read, rows.read.mean(0), ranks, regather)
        centre = ranks.sum(rows.read.mean(0, dtype=torch.float32)) / (HALF_UNIT * ranks.W)
        return cls(kernels.half_rows(rows.x, centre).read, centre, ranks)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first column, centred keys): rank by rank as they arrive, this rank's first; once all are here, in one."""
        if self._held is not None and self._complete:
            yield 0, self._held
            return
        for first, block in each("gather", iter(self.ranks.gather(self.own, self._as_sent))):
            if self._held is None:
                yield first, block - self.centre
            elif self.sixteen_bit:
                yield first, self._held[first : first + len(block)].copy_(block)
            else:
                yield first, torch.sub(block, self.centre, out=self._held[first : first + len(block)])
        self._complete = True

    def _as_sent(self, unit: Tensor) -> Tensor:
        """What a rank with these unit rows would send."""
        if self.sixteen_bit:
            return ((unit - self.centre) * HALF_UNIT).half()
        return unit.to(self.own.dtype)

    @property
    def whole(self) -> Tensor:
        """(N, D), once all have arrived."""
        assert self._held is not None
        if not self._complete:
            for _ in self.blocks():
                pass
        return self._held


class Scores:
    """Makes scores of unit rows against the keys, and has a buffer for those that are not kept."""

    def __init__(self, keys: Keys, layout: Layout, masked: bool, plan: SlabPlan, kernels: RowKernels) -> None:
        self.keys, self.layout, self.masked, self.kernels = keys, layout, masked, kernels
        self.dtype = torch.int16 if keys.sixteen_bit else torch.float32
        self._made = keys.own.new_empty(plan.product_rows, layout.N, dtype=torch.float32)
        self._buffer = keys.own.new_empty(plan.slab_rows, layout.N, dtype=self.dtype)

    @cached_property
    def product_step(self) -> DeviceNumber:
        """The product of fp16 rows that is one step of int16: |z·k| <= max_j |k_j| for unit z. Waits for all keys."""
        largest = torch.linalg.vector_norm(self.keys.whole, dim=1, dtype=torch.float32).max()
        # Where all keys are the centre every product is 0, of whatever steps.
        return DeviceNumber(HALF_UNIT / FIXED_STEPS, largest.clamp_min(1e-20))

    @cached_property
    def step(self) -> Any:
        """The score that is one step of what is read, a Number."""
        return self.product_step * HALF_UNIT**-2 if self.keys.sixteen_bit else 1.0

    def buffer(self, rows: int, after: int = 0) -> Tensor:
        """`rows` rows of the buffer, past the first `after`."""
        return self._buffer[after : after + rows]

    @named("scores")
    def make(self, unit: Tensor, first: int, into: Tensor, *, period: int | None = None) -> Tensor:
        """Scores of (m, D) unit rows into (m, N), positives masked: rows first .. of all, or of images first .. of
        several views with `period` images of each."""
        positives = self._positives(first, period)
        if not self.keys.sixteen_bit:
            self.multiply(unit, into)
            return self.kernels.mask_positives_(into, positives) if positives is not None else into
        made = self.multiply(unit, self._made[: len(unit)])
        return self._half_kernels.quantize(made, self.product_step, into, positives)

    def make_and_sum(
        self, unit: Tensor, first: int, into: Tensor, scale: float, row: Potential, shift: Tensor, sums: Tensor
    ) -> None:
        """`make` of rows first .. of all, and the first column step over them."""
        if not self.keys.sixteen_bit:
            self.make(unit, first, into)
            self.kernels.column_lse(into, scale, row, shift, sums, accumulate=first > 0)
            return
        with named("scores"):
            made = self.multiply(unit, self._made[: len(unit)])
            self._half_kernels.finish_scores(
                made,
                self.product_step,
                into,
                self._positives(first, None),
                scale * self.step,
                row,
                shift,
                sums,
                accumulate=first > 0,
            )

    def multiply(self, unit: Tensor, out: Tensor) -> Tensor:
        """Products (m, N) float32 with the keys, as they arrive."""
        for column, block in self.keys.blocks():
            multiply(unit, block.T, out[:, column : column + len(block)])
        return out

    @named("scores")
    def make_both(self, first: Tensor, second: Tensor, out_first: Tensor, out_second: Tensor) -> None:
        """Scores of all rows of two sets of unit rows, in one reading of the keys; float32."""
        for column, block in self.keys.blocks():
            columns = slice(column, column + len(block))
            multiply(first, block.T, out_first[:, columns])
            multiply(second, block.T, out_second[:, columns])
        positives = self._positives(0, None)
        if positives is not None:
            self.kernels.mask_positives_(out_first, positives)
            self.kernels.mask_positives_(out_second, positives)

    def _positives(self, first: int, period: int | None) -> Positives | None:
        """Rows are view-major: without a period those of a slab go through all images, again and again."""
        if not self.masked:
            return None
        layout = self.layout
        return Positives(layout, first, period or max(layout.M, layout.R * layout.B))

    @property
    def _half_kernels(self) -> SixteenBitKernels:
        kernels: Any = self.kernels
        return kernels


class Sweeps(Protocol):
    """The scores of the Sinkhorn problem, some rows at a time; `step` is the value of one step of fixed point."""

    kernels: RowKernels
    columns: int

    @property
    def step(self) -> Any: ...

    @property
    def kept_type(self) -> torch.dtype | None:
        """The type of the scores if all are kept after a sweep."""

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, scores of some rows) until all rows have been seen."""

    def column_step(self, scale: float, row: Potential, shift: Tensor, sums: Tensor) -> None:
        """Per column Σ_i 2^(scale*s_ij) row_i = sums_j * 2^shift_j, in the first sweep."""


class KeptScores:
    """Scores that are there already."""

    def __init__(self, scores: Tensor, step: Any, kernels: RowKernels) -> None:
        self.scores, self.step, self.kernels, self.columns = scores, step, kernels, scores.shape[1]
        self.kept_type = scores.dtype

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.scores

    def column_step(self, scale: float, row: Potential, shift: Tensor, sums: Tensor) -> None:
        self.kernels.column_lse(self.scores, scale * self.step, row, shift, sums, accumulate=False)


class TargetScores:
    """Scores from embeddings: kept whole after the first sweep, or made again in every sweep."""

    def __init__(self, unit: Tensor, scores: Scores, plan: SlabPlan) -> None:
        self.unit, self.scores, self.plan = unit, scores, plan
        self.kept: Tensor | None = None
        self.kernels, self.columns = scores.kernels, scores.layout.N

    @property
    def step(self) -> Any:
        return self.scores.step

    @property
    def kept_type(self) -> torch.dtype | None:
        return self.scores.dtype if self.plan.cached else None

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        if self.kept is not None:
            yield 0, self.kept
            return
        for first, unit, into in self._slabs():
            yield first, self.scores.make(unit, first, into)

    def column_step(self, scale: float, row: Potential, shift: Tensor, sums: Tensor) -> None:
        if self.kept is not None:
            self.kernels.column_lse(self.kept, scale * self.step, row, shift, sums, accumulate=False)
            return
        for first, unit, into in self._slabs():
            self.scores.make_and_sum(unit, first, into, scale, row.rows(first, first + len(unit)), shift, sums)

    def _slabs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, unit rows, where their scores go): all of them; kept from then on where the plan says so."""
        rows, size = len(self.unit), self.plan.sweep_rows
        kept = self.unit.new_empty(rows, self.columns, dtype=self.scores.dtype) if self.plan.cached else None
        for first in range(0, rows, size):
            unit = self.unit[first : first + size]
            yield first, unit, self.scores.buffer(len(unit)) if kept is None else kept[first : first + size]
        self.kept = kept


class SourceScores:
    """The student's scores beside a teacher's, kept whole: made in portions while the ranks add up columns."""

    def __init__(self, unit: Tensor, scores: Scores, plan: SlabPlan, sums: int) -> None:
        """sums: how many times the ranks add up columns."""
        self.unit, self.scores, self.plan = unit, scores, plan
        self.kept = unit.new_empty(len(unit), scores.layout.N, dtype=scores.dtype)
        self._portion = -(-len(unit) // sums)
        self._done = 0

    def next_portion(self) -> None:
        last = min(self._done + self._portion, len(self.unit))
        while self._done < last:
            size = min(last - self._done, self.plan.product_rows or len(self.unit))
            part = slice(self._done, self._done + size)
            self.scores.make(self.unit[part], self._done, self.kept[part])
            self._done += size

    def finish(self) -> Tensor:
        while self._done < len(self.unit):
            self.next_portion()
        return self.kept

    def mark_made(self) -> None:
        """All of `kept` has been written."""
        self._done = len(self.unit)
