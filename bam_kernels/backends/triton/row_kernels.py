"""The Triton row kernels: shapes checked here, tensors handed over with their strides.

The interface is that of backends/cpu.py: scores are (m, N) or (views, images, N), float32 or int16, with contiguous
columns; potentials are pairs of (n,) float32 tensors. Everything runs on the device of its arguments, on the current
stream, without a host synchronisation: a `scale` or `step` is a number or a device scalar. Results do not differ from
run to run.
"""

from functools import cache

import torch
from torch import Tensor

from ...layout import Layout
from ..interface import LOG2_E, Potential
from . import embed, plan, scores
from .launch import Number, check_scores, number
from .launch_match import MatchKernels
from .launch_sinkhorn import SinkhornKernels
from .tiles import block_of, warps


class TritonKernels(SinkhornKernels, MatchKernels):
    """The row kernels."""

    backend = "triton"

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (m, D) of any float type -> unit rows (m, D) float32 and norms (m,) float64."""
        m, d = x.shape
        unit = torch.empty(m, d, device=x.device)
        norm = torch.empty(m, dtype=torch.float64, device=x.device)
        block = block_of(d)
        self._run(embed.normalize_kernel, (m,), x, unit, norm, d, *x.stride(), BLOCK=block, num_warps=warps(block, 8))
        return unit, norm

    def centre_potential(self, unit: Tensor, centre: Tensor, epsilon: float) -> Potential:
        """The row potential exp(<unit_i, centre>/eps) that scores against centred keys start from."""
        m, d = unit.shape
        assert unit.stride(1) == 1 and centre.is_contiguous()
        row = Potential(torch.empty(m, device=unit.device), torch.empty(m, device=unit.device))
        block = block_of(d)
        self._run(
            embed.centre_potential_kernel,
            (m,),
            unit,
            centre,
            *row,
            d,
            unit.stride(0),
            LOG2_E / epsilon,
            BLOCK=block,
            num_warps=warps(block, 8),
        )
        return row

    def project_(self, d: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
        """d (m, D) <- (d - unit <unit, d>) / norm, 0 for a row with norm below 1e-12."""
        m, features = d.shape
        assert d.is_contiguous() and unit.is_contiguous()
        block = block_of(features)
        self._run(embed.project_kernel, (m,), d, unit, norm, features, BLOCK=block, num_warps=warps(block, 8))
        return d

    def symmetrize_(self, G: Tensor) -> Tensor:
        """G (m, m) <- G + Gᵀ; returns its row sums (m,)."""
        m, tile = len(G), 64
        assert G.shape == (m, m) and G.stride(1) == 1
        tiles = -(-m // tile)
        partial, sums = torch.empty(tiles, m, device=G.device), torch.empty(m, device=G.device)
        self._run(plan.symmetrize_kernel, (tiles, tiles), G, partial, m, G.stride(0), TILE=tile, num_warps=8)
        self._add_chunks(partial, None, sums, False)
        return sums

    def mask_positives_(self, s: Tensor, layout: Layout, first_row: int) -> Tensor:
        """Write the masked score where rows first_row .. of (m, N) scores meet keys of their own image."""
        check_scores(s)
        block = 256
        m = len(s)
        self._run(
            scores.mask_positives_kernel,
            (-(-m * layout.T // block),),
            s,
            m,
            s.stride(0),
            first_row,
            layout.B,
            layout.T,
            layout.own_columns,
            BLOCK=block,
            num_warps=4,
        )
        return s

    def quantize(self, s: Tensor, step: Number, out: Tensor) -> Tensor:
        """rint(scores/step) clamped to +-32767 into `out` (m, N) int16; masked scores as -32768."""
        assert s.stride(1) == 1 and out.stride(1) == 1
        m, n = s.shape
        block = block_of(n, 2048)
        self._run(
            scores.quantize_kernel,
            (m, -(-n // block)),
            s,
            out,
            *number(step),
            n,
            s.stride(0),
            out.stride(0),
            BLOCK=block,
            num_warps=warps(block, 16),
        )
        return out

    def plan_products(
        self, s: Tensor, scale: Number, row: Potential, col: Potential, v: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """E v (m,) and Eᵀ u (N,), E_ij = 2^(scale*s_ij) row_i col_j; empty where v or u is None."""
        check_scores(s)
        m, n = s.shape
        y = torch.empty(m if v is not None else 0, device=s.device)
        w = torch.empty(n if u is not None else 0, device=s.device)
        if v is not None:
            block = block_of(n)
            self._run(
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
        """x_ij <- x_ij - E_ij (u_i + v_j)."""
        check_scores(s)
        m, n = s.shape
        block = block_of(n, 2048)
        self._run(
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


@cache
def kernels() -> TritonKernels:
    """The row kernels."""
    return TritonKernels()
