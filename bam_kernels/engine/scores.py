"""Scores of unit rows against the gathered keys, computed in slabs: kept whole, or computed again in every sweep.

In 16 bit, rows and keys are fp16 times HALF_UNIT and scores are int16; else all are float32. layout.py defines the
dimension letters.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.interface import HALF_UNIT, DeviceNumber, Positives, Potential, RowKernels, SixteenBitKernels
from ..layout import Layout
from ..ranges import named_range
from .memory import use_huge_pages
from .plan import SlabPlan
from .rows import Keys, Rows


class Scores:
    """Computes scores of rows against the keys, and owns the buffer for scores that are not kept.

    row_bias: biases of all rows that get int16 scores, from which their common fixed-point step follows.
    """

    def __init__(
        self,
        keys: Keys,
        layout: Layout,
        masked: bool,
        plan: SlabPlan,
        kernels: RowKernels,
        row_bias: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        self.keys, self.layout, self.masked, self.kernels = keys, layout, masked, kernels
        self.dtype = torch.int16 if keys.sixteen_bit else torch.float32
        self._row_bias = row_bias
        self._made = self.empty(plan.product_rows, torch.float32)
        self._buffer = self.empty(plan.slab_rows)

    @classmethod
    def of(cls, rows: Rows, layout: Layout, masked: bool, plan: SlabPlan, kernels: RowKernels) -> "Scores":
        """Make Scores for the student's and the target rows."""
        other = rows.target.bias if rows.target is not rows.z else None
        return cls(rows.keys, layout, masked, plan, kernels, (rows.z.bias, other))

    @cached_property
    def product_step(self) -> DeviceNumber:
        """Size of one int16 step, as a product of fp16 rows. Needs all keys, so it gathers them."""
        bias, other = self._row_bias
        assert self.keys.whole is not None and self.keys.bias is not None and bias is not None
        return self._half_kernels.product_step(self.keys.centre, self.keys.bias, bias, other)

    @cached_property
    def step(self) -> Any:
        """Score of one step of the stored scores, as a Number; 1 for float32 scores."""
        return self.product_step * HALF_UNIT**-2 if self.keys.sixteen_bit else 1.0

    def empty(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for scores (rows, N), of the type of stored scores or of `dtype`."""
        return use_huge_pages(self.keys.centre.new_empty(rows, self.layout.N, dtype=dtype or self.dtype))

    def buffer(self, rows: int, after: int = 0) -> Tensor:
        """Rows after .. after + rows - 1 of the buffer."""
        return self._buffer[after : after + rows]

    @named_range("scores")
    def make(self, unit: Tensor, first: int, into: Tensor, *, period: int | None = None) -> Tensor:
        """Compute scores of unit rows (m, D) into `into` (m, N), with positives masked.

        The rows begin at row `first` of all rows; with `period` they are `period` rows of each of several views, which
        begin at image `first`.
        """
        positives = self._positives(first, period)
        if not self.keys.sixteen_bit:
            self.multiply(unit, into)
            return self.kernels.mask_positives_(into, positives) if positives is not None else into
        products = self.multiply(unit, self._made[: len(unit)])
        return self._half_kernels.quantize(products, self.product_step, into, positives, self.keys.bias)

    def make_and_sum(
        self, unit: Tensor, first: int, into: Tensor, scale: float, row: Potential, shift: Tensor, sums: Tensor
    ) -> None:
        """Compute scores as `make` for rows first .., and add these rows to the first column step."""
        if not self.keys.sixteen_bit:
            self.make(unit, first, into)
            self.kernels.column_lse(into, scale, row, shift, sums, accumulate=first > 0)
            return
        with named_range("scores"):
            products = self.multiply(unit, self._made[: len(unit)])
            self._half_kernels.finish_scores(
                products,
                self.keys.bias,
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
        """Products of unit rows (m, D) with all keys, as they arrive, into `out` (m, N) float32."""
        for column, block in self.keys.blocks():
            self.kernels.multiply(unit, block.T, out[:, column : column + len(block)])
        return out

    @named_range("scores")
    def make_both(self, first: Tensor, second: Tensor, out_first: Tensor, out_second: Tensor) -> None:
        """Compute float32 scores of all rows of two tensors of unit rows, while reading the keys once."""
        for column, block in self.keys.blocks():
            columns = slice(column, column + len(block))
            self.kernels.multiply(first, block.T, out_first[:, columns])
            self.kernels.multiply(second, block.T, out_second[:, columns])
        positives = self._positives(0, None)
        if positives is not None:
            self.kernels.mask_positives_(out_first, positives)
            self.kernels.mask_positives_(out_second, positives)

    def _positives(self, first: int, period: int | None) -> Positives | None:
        """Positives of a slab; without a period its rows are consecutive view-major rows, from `first` on."""
        if not self.masked:
            return None
        layout = self.layout
        return Positives(layout, first, period or max(layout.M, layout.R * layout.B))

    @property
    def _half_kernels(self) -> SixteenBitKernels:
        kernels: Any = self.kernels
        return kernels


class Sweeps(Protocol):
    """Scores of the Sinkhorn problem, read some rows at a time; `step` is the score of one fixed-point step."""

    kernels: RowKernels
    columns: int

    @property
    def step(self) -> Any: ...

    @property
    def kept_type(self) -> torch.dtype | None:
        """Dtype of the scores if all are kept after a sweep, else None."""

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, scores of some rows) for all rows in order."""

    def column_step(self, scale: float, row: Potential, shift: Tensor, sums: Tensor) -> None:
        """Per column, write Σ_i 2^(scale*s_ij) row_i as sums_j * 2^shift_j; the first sweep."""


class KeptScores:
    """Sweeps over scores that are given as one tensor."""

    def __init__(self, scores: Tensor, step: Any, kernels: RowKernels) -> None:
        self.scores, self.step, self.kernels, self.columns = scores, step, kernels, scores.shape[1]
        self.kept_type = scores.dtype

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.scores

    def column_step(self, scale: float, row: Potential, shift: Tensor, sums: Tensor) -> None:
        self.kernels.column_lse(self.scores, scale * self.step, row, shift, sums, accumulate=False)


class TargetScores:
    """Sweeps over target scores of embeddings, kept whole after the first sweep or computed again in every sweep."""

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
        """Yield (first row, unit rows, tensor for their scores) for all rows; sets `kept` if the plan keeps scores."""
        rows, size = len(self.unit), self.plan.sweep_rows
        kept = self.scores.empty(rows) if self.plan.cached else None
        for first in range(0, rows, size):
            unit = self.unit[first : first + size]
            yield first, unit, self.scores.buffer(len(unit)) if kept is None else kept[first : first + size]
        self.kept = kept


class SourceScores:
    """Source scores of a student with a teacher, kept whole, computed in portions during the column all-reduces."""

    def __init__(self, unit: Tensor, scores: Scores, plan: SlabPlan, sums: int) -> None:
        """sums: number of all-reduces of column sums, over which the slabs are spread evenly."""
        self.unit, self.scores = unit, scores
        self.kept = scores.empty(len(unit))
        self._sums, self._portions = sums, 0
        self._slab = plan.product_rows or -(-len(unit) // sums)
        self._done = 0

    def next_portion(self) -> None:
        """Compute slabs until as large a share of the rows is done as of the all-reduces."""
        self._portions += 1
        self._compute(len(self.unit) * self._portions // self._sums)

    def finish(self) -> Tensor:
        self._compute(len(self.unit))
        return self.kept

    def mark_made(self) -> None:
        """Mark all of `kept` as computed."""
        self._done = len(self.unit)

    def _compute(self, rows: int) -> None:
        """Compute whole slabs until at least the first `rows` rows are done."""
        while self._done < rows:
            part = slice(self._done, min(self._done + self._slab, len(self.unit)))
            self.scores.make(self.unit[part], self._done, self.kept[part])
            self._done = part.stop
