"""Launchers of the Triton Sinkhorn kernels."""

import torch
from torch import Tensor

from ..interface import Number, Positives, Potential
from . import plan, sinkhorn
from .launch import check_scores, image_index, number
from .launcher import Launcher
from .tiles import LONGEST_ROW, block_of, column_tile, row_tile


class SinkhornKernels(Launcher):
    """Row kernels of Sinkhorn steps; sums over rows are partial sums, added in a fixed order."""

    def column_lse(
        self, s: Tensor, scale: Number, row: Potential, shift: Tensor, sums: Tensor, accumulate: bool
    ) -> None:
        """Write column sums Σ_i 2^(scale*s_ij) row_i as sums_j * 2^shift_j; with `accumulate`, add to the old sums."""
        self._column_lse(s, scale, row, shift, sums, accumulate, None, None, 1.0, None)

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
        assert s.dtype == torch.float32 and out.dtype == torch.int16 and out.stride(1) == 1
        self._column_lse(s, scale, row, shift, sums, accumulate, bias, out, step, positives)

    def _column_lse(
        self,
        s: Tensor,
        scale: Number,
        row: Potential,
        shift: Tensor,
        sums: Tensor,
        accumulate: bool,
        bias: Tensor | None,
        out: Tensor | None,
        step: Number,
        positives: Positives | None,
    ) -> None:
        check_scores(s)
        m, n = s.shape
        tile = column_tile(m, n)
        partial = torch.empty(2, tile.chunks, n, dtype=torch.float32, device=s.device)
        self.run(
            sinkhorn.column_lse_kernel,
            (-(-n // tile.block_n), tile.chunks),
            s,
            *row,
            *partial,
            *number(scale),
            bias,
            out,
            *number(step),
            m,
            n,
            s.stride(0),
            out.stride(0) if out is not None else 0,
            tile.rows,
            *image_index(positives),
            MASK_POSITIVES=positives is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
        )
        self._merge_lse(partial, shift, sums, None, accumulate)

    def _merge_lse(
        self, partial: Tensor, shift: Tensor | None, sums: Tensor | None, potential: Potential | None, accumulate: bool
    ) -> None:
        """Add up partial sums (2, chunks, n) into `shift` and `sums`, or into `potential`, their reciprocal."""
        chunks, n = partial.shape[1:]
        block = block_of(n, 64)
        self.run(
            sinkhorn.merge_lse_kernel,
            (-(-n // block),),
            *partial,
            shift,
            sums,
            *(potential if potential is not None else (None, None)),
            chunks,
            n,
            ACCUMULATE=accumulate,
            CHUNKS=64,
            BLOCK=block,
            num_warps=4,
        )

    def _add_chunks(
        self,
        partial: Tensor,
        factor: Tensor | None,
        out: Tensor,
        accumulate: bool,
        divide: Potential | None = None,
    ) -> None:
        """Add up partial sums (chunks, n) into `out`, times `factor`; then divide the potential `divide` by `out`."""
        chunks, n = partial.shape
        block = block_of(n, 64)
        self.run(
            sinkhorn.add_chunks_kernel,
            (-(-n // block),),
            partial,
            factor,
            out,
            *(divide if divide is not None else (None, None)),
            chunks,
            n,
            ACCUMULATE=accumulate,
            CHUNKS=128,
            BLOCK=block,
            num_warps=4,
        )

    def reciprocal_potential(self, shift: Tensor, sums: Tensor) -> Potential:
        """Column potential 1 / (sums_j * 2^shift_j)."""
        n = len(shift)
        col = Potential(torch.empty_like(shift), torch.empty_like(shift))
        self.run(sinkhorn.reciprocal_potential_kernel, (-(-n // 256),), shift, sums, *col, n, BLOCK=256, num_warps=4)
        return col

    def column_totals(self, shift: Tensor, sums: Tensor, common: int) -> Tensor:
        """Column sums as multiples of 2^common, which can be added up: sums_j * 2^(shift_j - common) (n,) float64."""
        n = len(shift)
        total = torch.empty(n, dtype=torch.float64, device=shift.device)
        grid = (-(-n // 256),)
        self.run(sinkhorn.column_totals_kernel, grid, shift, sums, float(common), total, n, BLOCK=256, num_warps=4)
        return total

    def total_potential(self, total: Tensor, common: int) -> Potential:
        """Column potential 1 / (total_j * 2^common) of column sums as `column_totals` writes them."""
        n = len(total)
        col = Potential(*torch.empty(2, n, dtype=torch.float32, device=total.device).unbind())
        grid = (-(-n // 256),)
        self.run(sinkhorn.total_potential_kernel, grid, total, float(common), *col, n, BLOCK=256, num_warps=4)
        return col

    def divide_potential_(self, col: Potential, c: Tensor) -> None:
        """Divide the column potential by c, in place."""
        n = len(c)
        self.run(sinkhorn.divide_potential_kernel, (-(-n // 256),), *col, c, n, BLOCK=256, num_warps=4)

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
        sums of chunks also divides col by c. One read of the scores if a row fits on chip (LONGEST_ROW columns), else
        two.
        """
        check_scores(s)
        m, n = s.shape
        if n > LONGEST_ROW:
            block = 4096
            self.run(
                sinkhorn.row_step_kernel,
                (m,),
                s,
                *row,
                *col,
                *number(scale),
                n,
                s.stride(0),
                BLOCK_N=block,
                num_warps=8,
            )
            self._column_products(s, scale, row, col, None, c, accumulate, divide)
            return
        tile = row_tile(m, n)
        partial = torch.empty(tile.chunks, n, dtype=torch.float32, device=s.device)
        self.run(
            sinkhorn.sinkhorn_pass_kernel,
            (tile.chunks,),
            s,
            *row,
            *col,
            partial,
            *number(scale),
            m,
            n,
            s.stride(0),
            tile.rows,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
        )
        self._add_chunks(partial, col.mantissa, c, accumulate, col if divide else None)

    def _column_products(
        self,
        s: Tensor,
        scale: Number,
        row: Potential,
        col: Potential,
        u: Tensor | None,
        w: Tensor,
        accumulate: bool,
        divide: bool = False,
    ) -> None:
        m, n = s.shape
        tile = column_tile(m, n)
        partial = torch.empty(tile.chunks, n, dtype=torch.float32, device=s.device)
        self.run(
            plan.column_products_kernel,
            (-(-n // tile.block_n), tile.chunks),
            s,
            *row,
            col.exponent,
            u,
            partial,
            *number(scale),
            m,
            n,
            s.stride(0),
            tile.rows,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=2 * tile.num_warps,  # row weights and column sums need registers: with fewer warps sm_100 spills
        )
        self._add_chunks(partial, col.mantissa, w, accumulate, col if divide else None)
