"""Launchers of the Triton row kernels: this module checks shapes and passes tensors with their strides.

backends/cpu.py documents the methods. Scores are (m, N) or (views, images, N), float32 or int16, with contiguous
columns; potentials are pairs of (n,) float32 tensors. A `scale` or `step` is a number or a device scalar. Kernels run
on the device of their arguments, on the current stream, without host synchronisation. Results are equal from run to
run.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from ...layout import Layout
from ..interface import (
    FIXED_STEPS,
    HALF_UNIT,
    DeviceNumber,
    Number,
    Positives,
    Potential,
    UnitRows,
)
from ..unit_rows import Reading, UnitRowsKernels
from . import embed, plan, scores, stats
from .launch import check_scores, image_index, number
from .launch_match import MatchKernels
from .launch_sinkhorn import SinkhornKernels
from .tiles import block_of, warps

MEAN_TILE = 512, 16  # rows and features of a tile of the mean row


class TritonKernels(UnitRowsKernels, SinkhornKernels, MatchKernels):
    """The Triton row kernels."""

    backend = "triton"

    def _read_rows(self, to: Reading) -> None:
        assert to.centre is None or to.centre.dtype == torch.float32
        block = block_of(to.x.shape[-1])
        self.run(
            embed.unit_rows_kernel,
            (len(to.norm),),
            to.x,
            to.centre,
            to.read,
            to.norm,
            to.bias,
            *(to.row if to.row is not None else (None, None)),
            to.message,
            *(to.message.shape if to.message is not None else (0, 0)),
            to.scale,
            *_rows_of(to.x),
            UNIT=1.0 if to.centre is None else HALF_UNIT,
            BLOCK=block,
            HELD=block >= to.x.shape[-1],
            num_warps=warps(block, 8),
        )

    def _mean_row(self, x: Tensor, norm: Tensor | None, ranks: int) -> Tensor:
        m, d = x.shape[:-1].numel(), x.shape[-1]
        mean = torch.empty(d, dtype=torch.float32, device=x.device)
        self.run(
            embed.mean_row_kernel,
            (-(-d // MEAN_TILE[1]),),
            x,
            norm,
            mean,
            m,
            ranks,
            *_rows_of(x),
            BLOCK_M=MEAN_TILE[0],
            BLOCK_D=MEAN_TILE[1],
            num_warps=16,
        )
        return mean

    def product_step(
        self, centre: Tensor, key_bias: Tensor, row_bias: Tensor, other_bias: Tensor | None = None
    ) -> DeviceNumber:
        """Size of one fixed-point step, as a product of fp16 rows plus bias.

        key_bias (N,), row_bias (m,): biases of all keys and of all rows whose scores share the step.
        other_bias: biases of further such rows.
        """
        step = torch.empty(1, dtype=torch.float32, device=centre.device)
        d, n, m, other = len(centre), len(key_bias), len(row_bias), len(other_bias) if other_bias is not None else 0
        block = block_of(max(d, n, m, other), 4096)
        self.run(
            embed.product_step_kernel,
            (1,),
            centre,
            key_bias,
            row_bias,
            other_bias,
            step,
            d,
            n,
            m,
            other,
            UNIT=HALF_UNIT,
            STEPS=FIXED_STEPS,
            BLOCK=block,
            num_warps=warps(block, 16),
        )
        return DeviceNumber(1.0, step)

    def _centre_potential(self, read: Tensor, centre: Tensor, scale: float, row: Potential) -> None:
        assert read.stride(1) == 1
        m, d = read.shape
        block = block_of(d)
        self.run(
            embed.centre_potential_kernel,
            (m,),
            read,
            centre,
            *row,
            d,
            read.stride(0),
            scale,
            BLOCK=block,
            num_warps=warps(block, 8),
        )

    def _project(self, d: Tensor, rows: UnitRows, factor: float) -> None:
        block = block_of(d.shape[1])
        self.run(
            embed.project_kernel,
            (len(d),),
            d,
            rows.x,
            rows.norm,
            factor,
            *_rows_of(rows.x),
            BLOCK=block,
            HELD=block >= d.shape[1],
            num_warps=warps(block, 8),
        )

    def symmetrize_(self, G: Tensor) -> Tensor:
        """Replace G (m, m), float32 or fp16, by G + Gᵀ; returns the column sums (m,) float32 that G had."""
        m, tile = len(G), 64
        assert G.shape == (m, m) and G.stride(1) == 1
        tiles = -(-m // tile)
        partial = torch.empty(tiles, m, dtype=torch.float32, device=G.device)
        sums = torch.empty(m, dtype=torch.float32, device=G.device)
        self.run(plan.symmetrize_kernel, (tiles, tiles), G, partial, m, G.stride(0), TILE=tile, num_warps=8)
        self._add_chunks(partial, None, sums, False)
        return sums

    def mask_positives_(self, s: Tensor, positives: Positives) -> Tensor:
        """Write the masked score where rows of (m, N) float32 scores meet keys of their own image."""
        assert s.stride(1) == 1 and s.dtype == torch.float32
        block, m = 256, len(s)
        self.run(
            scores.mask_positives_kernel,
            (-(-m * positives.layout.T // block),),
            s,
            m,
            s.stride(0),
            *image_index(positives),
            BLOCK=block,
            num_warps=4,
        )
        return s

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
        assert s.stride(1) == 1 and out.stride(1) == 1
        m, n = s.shape
        block = block_of(n, 2048)
        self.run(
            scores.quantize_kernel,
            (m, -(-n // block)),
            s,
            bias,
            out,
            *number(step),
            n,
            s.stride(0),
            out.stride(0),
            *image_index(positives),
            MASK_POSITIVES=positives is not None,
            BLOCK=block,
            num_warps=warps(block, 16),
        )
        return out

    def loss_and_stats(
        self, images: Tensor, column_sums: Tensor, norm: Tensor | None, layout: Layout, uniform_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Compute `loss_and_stats` of engine/sums.py in one launch, rounded to float32 at the end."""
        assert images.is_contiguous() and column_sums.is_contiguous() and column_sums.dtype == torch.float32
        loss = torch.empty((), dtype=torch.float32, device=images.device)
        out = torch.empty(6, dtype=torch.float32, device=images.device)
        count, n, m = images.shape[1], len(column_sums), len(norm) if norm is not None else 0
        block = block_of(max(count, n, m), 4096)
        rounded = ctypes.c_float(uniform_loss).value
        self.run(
            stats.loss_and_stats_kernel,
            (1,),
            images,
            column_sums,
            norm,
            loss,
            out,
            rounded,
            uniform_loss - rounded,
            count,
            n,
            m,
            layout.B,
            layout.L,
            layout.V,
            BLOCK=block,
            num_warps=warps(block, 16),
        )
        return loss, out

    def plan_products(
        self, s: Tensor, scale: Number, row: Potential, col: Potential, v: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Products E v (m,) and Eᵀ u (N,) with E_ij = 2^(scale*s_ij) row_i col_j; empty if v or u is None."""
        check_scores(s)
        m, n = s.shape
        y = torch.empty(m if v is not None else 0, dtype=torch.float32, device=s.device)
        w = torch.empty(n if u is not None else 0, dtype=torch.float32, device=s.device)
        if v is not None:
            block = block_of(n)
            self.run(
                plan.row_products_kernel,
                (m,),
                s,
                *row,
                *col,
                v,
                y,
                *number(scale),
                n,
                s.stride(0),
                BLOCK_N=block,
                num_warps=warps(block, 16),
            )
        if u is not None:
            self._column_products(s, scale, row, col, u, w, False)
        return y, w

    def plan_subtract_(
        self,
        x: Tensor,
        s: Tensor,
        scale: Number,
        row: Potential,
        col: Potential,
        u: Tensor | None,
        v: Tensor | None,
    ) -> None:
        """Subtract E_ij (u_i + v_j) from x_ij (m, N), in place, with E as in `plan_products`; u or v None: 0."""
        check_scores(s)
        m, n = s.shape
        block = block_of(n, 2048)
        self.run(
            plan.plan_subtract_kernel,
            (m, -(-n // block)),
            x,
            s,
            *row,
            *col,
            u,
            v,
            *number(scale),
            n,
            s.stride(0),
            x.stride(0),
            BLOCK_N=block,
            num_warps=warps(block, 16),
        )


def _rows_of(x: Tensor) -> tuple[int, ...]:
    """Rows (m, D) or (V, B, D) as kernels take them: rows of a view, features, strides of view, row and feature."""
    strides = (0, *x.stride()) if x.dim() == 2 else x.stride()
    return x.shape[-2], x.shape[-1], *strides


@cache
def kernels() -> TritonKernels:
    """The Triton row kernels, made once."""
    return TritonKernels()
