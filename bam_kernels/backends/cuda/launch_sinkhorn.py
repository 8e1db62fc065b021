"""Launchers of the CUDA Sinkhorn kernels, on scores of m rows and n columns."""

import math

import torch
from torch import Tensor

from ..addresses import FLOAT32, FLOAT64, INT16, SCORES, address, pair, scores_of
from ..interface import Number, Positives, Potential
from .launch import Launcher, number, positives_of
from .shapes import QUANTIZE_AT_ONCE, SUMS_AT_ONCE, column_rows, on_chip, pass_rows, pass_shape, sum_rows


class SinkhornKernels(Launcher):
    """Row kernels of Sinkhorn steps; sums over rows are partial sums, added in a fixed order."""

    def column_lse(
        self, s: Tensor, scale: Number, row: Potential, shift: Tensor, sums: Tensor, accumulate: bool
    ) -> None:
        """Write column sums Σ_i 2^(scale*s_ij) row_i as sums_j * 2^shift_j; with `accumulate`, add to the old sums."""
        self._column_lse(s, scale, row, shift, sums, accumulate, None, None, 1.0, None)

    def quantize(
        self,
        s: Tensor,
        step: Number,
        out: Tensor,
        positives: Positives | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Write rint((scores + bias)/step), clamped to +-32767, to `out` (m, N) int16.

        bias (N,) or None: 0. Masked scores and positives become -32768.
        """
        self._column_lse(s, 1.0, None, None, None, False, bias, out, step, positives)
        return out

    def finish_scores(
        self,
        s: Tensor,
        bias: Tensor | None,
        step: Number,
        out: Tensor,
        positives: Positives | None,
        scale: Number,
        row: Potential,
        shift: Tensor,
        sums: Tensor,
        *,
        accumulate: bool,
    ) -> None:
        """Epilogue of a product, in one read of s (m, N) float32: `quantize` to `out`, then `column_lse` of `out`."""
        self._column_lse(s, scale, row, shift, sums, accumulate, bias, out, step, positives)

    def _column_lse(
        self,
        s: Tensor,
        scale: Number,
        row: Potential | None,
        shift: Tensor | None,
        sums: Tensor | None,
        accumulate: bool,
        bias: Tensor | None,
        out: Tensor | None,
        step: Number,
        positives: Positives | None,
    ) -> None:
        """Column sums, quantisation, or both in one launch. out None: no quantisation; shift None: no sums."""
        assert out is None or out.stride(1) == 1
        m, n = s.shape
        device = s.device
        rows = sum_rows(m, n, QUANTIZE_AT_ONCE if shift is None else SUMS_AT_ONCE, self._device(s))
        chunks = -(-m // rows)
        needs_merge = shift is not None and chunks > 1
        partial = torch.empty(2, chunks if needs_merge else 0, n, dtype=torch.float32, device=device)
        self._kernels.column_lse(
            scores_of(s, device, SCORES if out is None else FLOAT32),
            m,
            n,
            number(scale, device),
            pair(row, device),
            address(shift, device),
            address(sums, device),
            accumulate,
            address(partial, device),
            rows,
            address(bias, device),
            address(out, device, INT16),
            out.stride(0) if out is not None else 0,
            number(step, device),
            positives_of(positives),
            self._launch_context(s),
        )

    def reciprocal_potential(self, shift: Tensor, sums: Tensor) -> Potential:
        """Column potential 1 / (sums_j * 2^shift_j)."""
        device, n = shift.device, len(shift)
        col = Potential(torch.empty_like(shift), torch.empty_like(shift))
        at = address(shift, device), address(sums, device), pair(col, device)
        self._kernels.reciprocal_potential(*at, n, self._launch_context(shift))
        return col

    def column_totals(self, shift: Tensor, sums: Tensor, common: int) -> Tensor:
        """Column sums as multiples of 2^common, which can be added up: sums_j * 2^(shift_j - common) (n,) float64."""
        device, n = shift.device, len(shift)
        total = torch.empty(n, dtype=torch.float64, device=device)
        at = address(shift, device), address(sums, device)
        self._kernels.column_totals(*at, common, address(total, device, FLOAT64), n, self._launch_context(shift))
        return total

    def total_potential(self, total: Tensor, common: int) -> Potential:
        """Column potential 1 / (total_j * 2^common) of column sums as `column_totals` writes them."""
        device, n = total.device, len(total)
        col = Potential(*torch.empty(2, n, dtype=torch.float32, device=device).unbind())
        at = address(total, device, FLOAT64)
        self._kernels.total_potential(at, common, pair(col, device), n, self._launch_context(total))
        return col

    def divide_potential_(self, col: Potential, c: Tensor) -> None:
        """Divide the column potential by c, in place."""
        self._kernels.divide_potential(pair(col, c.device), address(c, c.device), len(c), self._launch_context(c))

    def sinkhorn_pass(
        self,
        s: Tensor,
        scale: Number,
        row: Potential,
        col: Potential,
        c: Tensor,
        accumulate: bool,
        divide: bool = False,
    ) -> None:
        """One Sinkhorn iteration: row_i = 1 / Σ_j 2^(scale*s_ij) col_j, then c_j = Σ_i 2^(scale*s_ij) row_i col_j.

        accumulate: c_j is increased by the sum. divide: these are the last rows, so that the kernel that adds up the
        sums of blocks also divides col by c. One read of the scores if a row fits in a block or a cluster, else two.
        """
        m, n = s.shape
        attributes, device, context = self._device(s), s.device, self._launch_context(s)
        arguments = scores_of(s, device), m, n, number(scale, device), pair(row, device), pair(col, device)
        shape = pass_shape(n, s.element_size(), attributes)
        if shape is None:
            self._kernels.row_step(*arguments, context)
            self._column_products(s, scale, row, col, None, c, accumulate)
            if divide:
                self.divide_potential_(col, c)
            return
        rows = pass_rows(m, shape, attributes)
        partial = torch.empty(-(-m // rows), n, dtype=torch.float32, device=device)
        self._kernels.sinkhorn_pass(
            *arguments,
            address(c, device),
            accumulate,
            divide,
            address(partial, device),
            rows,
            shape.team,
            shape.group,
            context,
        )

    def fits_on_chip(self, m: int, n: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `sinkhorn` takes scores (m, n), which it keeps as float32: one cluster is faster than launches."""
        return on_chip(m, n, self._query_device(device.index or 0)) is not None

    def sinkhorn(self, s: Tensor, scale: Number, row: Potential, iterations: int) -> tuple[Potential, Tensor]:
        """Run all Sinkhorn iterations in one launch, on scores that fit on chip.

        row: in, the potential that the first column step starts from; out, the potential of the last row step but one.
        Returns the column potential, and the column sums before the last column step (NaN if iterations = 1).
        """
        m, n = s.shape
        shape = on_chip(m, n, self._device(s))
        assert shape is not None
        device = s.device
        col = Potential.empty(n, device)
        c = torch.empty(n, dtype=torch.float32, device=device)
        if iterations == 1:
            c.fill_(math.nan)
        self._kernels.sinkhorn_on_chip(
            scores_of(s, device),
            m,
            n,
            number(scale, device),
            pair(row, device),
            pair(col, device),
            address(c, device),
            shape.rows,
            shape.cluster,
            iterations,
            self._launch_context(s),
        )
        return col, c

    def _column_products(
        self, s: Tensor, scale: Number, row: Potential, col: Potential, u: Tensor | None, w: Tensor, accumulate: bool
    ) -> None:
        self._plan_products(s, scale, row, col, None, u, None, w, accumulate)

    def _plan_products(
        self,
        s: Tensor,
        scale: Number,
        row: Potential,
        col: Potential,
        v: Tensor | None,
        u: Tensor | None,
        y: Tensor | None,
        w: Tensor | None,
        accumulate: bool,
    ) -> None:
        m, n = s.shape
        device = s.device
        rows = column_rows(m, n, self._device(s))
        partial = torch.empty(-(-m // rows) if w is not None else 0, n, dtype=torch.float32, device=device)
        self._kernels.plan_products(
            scores_of(s, device),
            m,
            n,
            number(scale, device),
            pair(row, device),
            pair(col, device),
            address(v, device),
            address(u, device),
            address(y, device),
            address(w, device),
            accumulate,
            address(partial, device),
            rows,
            self._launch_context(s),
        )
