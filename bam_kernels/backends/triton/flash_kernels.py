"""Launchers of the flash kernels, which compute scores of rows against keys in registers wherever they are needed.

Memory besides rows, keys, dz and dk: O(M + N), and partial sums of dz and dk for at most PROGRAMS programs. The order
of sums follows from the shapes, so results are equal from run to run.
"""

from typing import Any

import torch
from torch import Tensor

from ...layout import Layout
from ..interface import LOG2_E, MatchSums, Number, Potential
from . import flash_keys, flash_match, flash_sinkhorn, stats
from .launch import Launch, launch
from .launch_sinkhorn import SinkhornKernels
from .tiles import FlashTile, block_of, flash_tile, split, warps


def _as_float(scale: Number) -> float:
    assert isinstance(scale, float)
    return scale


class FlashKernels(SinkhornKernels):
    """Row kernels that take rows x (m, D) instead of their scores s = (x kᵀ + bias) / unit^2.

    keys        (N, D) in gathered order, float32 or fp16, times `unit`
    bias        (N,), or None: 0
    masked      leave out positives
    unit        factor of rows and keys
    precision   of float32 products: "ieee" or "tf32"

    Rows are view-major from image 0 on, and times `unit`. In docstrings of methods, x_i·k_j includes the bias of key j.
    """

    def __init__(
        self,
        keys: Tensor,
        bias: Tensor | None,
        layout: Layout,
        *,
        masked: bool,
        unit: float = 1.0,
        precision: str = "ieee",
        run: Launch = launch,
    ) -> None:
        super().__init__(run)
        assert keys.shape == (layout.N, layout.D) and keys.stride(1) == 1
        self.keys, self.bias, self.layout, self.unit = keys, bias, layout, unit
        self.masked, self.precision = masked, precision

    def column_lse(
        self, x: Tensor, scale: Number, row: Potential, shift: Tensor, sums: Tensor, accumulate: bool
    ) -> None:
        """Write column sums Σ_i 2^(scale * x_i·k_j) row_i as sums_j * 2^shift_j."""
        assert not accumulate
        partial = self._partial_lse(self.keys, x, row, scale, keys_are_own=True)
        self._merge_lse(partial, shift, sums, None, False)

    def sinkhorn_pass(
        self,
        x: Tensor,
        scale: Number,
        row: Potential,
        col: Potential,
        c: Tensor,
        accumulate: bool,
        divide: bool = False,
    ) -> None:
        """One Sinkhorn iteration, with two products: row_i = 1 / Σ_j 2^(scale * x_i·k_j) col_j, then column sums.

        c_j = Σ_i 2^(scale * x_i·k_j) row_i col_j. divide: afterwards col is divided by c.
        """
        assert not accumulate
        self.row_step(x, scale, col, row)
        self.column_sums(x, scale, row, col, c, divide)

    def row_step(self, x: Tensor, scale: Number, col: Potential | None, row: Potential) -> None:
        """Row step: row_i = 1 / Σ_j 2^(scale * x_i·k_j) col_j; col None: 1."""
        partial = self._partial_lse(x, self.keys, col, scale, keys_are_own=False)
        self._merge_lse(partial, None, None, row, False)

    def _partial_lse(
        self, own: Tensor, other: Tensor, potential: Potential | None, scale: Number, *, keys_are_own: bool
    ) -> Tensor:
        """Sums of every chunk of `other` for all of `own`, as shifts and sums (2, chunks, own)."""
        m, n = len(own), len(other)
        tile = self._tile(m, n)
        tiles = -(-m // tile.block_m)
        chunks, rows = split(tiles, n, tile.block_n)
        partial = torch.empty(2, chunks, m, dtype=torch.float32, device=own.device)
        self.run(
            flash_sinkhorn.flash_lse_kernel,
            (tiles, chunks),
            own,
            other,
            self.bias,
            *(potential if potential is not None else (None, None)),
            *partial,
            _as_float(scale),
            m,
            n,
            rows,
            *self._index,
            own.stride(0),
            other.stride(0),
            X_ARE_KEYS=keys_are_own,
            **self._constants(tile),
        )
        return partial

    def column_sums(
        self, x: Tensor, scale: Number, row: Potential, col: Potential, c: Tensor, divide: bool = False
    ) -> None:
        """Column sums c_j = Σ_i 2^(scale * x_i·k_j) row_i col_j. divide: afterwards col is divided by c."""
        m, n = len(self.keys), len(x)
        tile = self._tile(m, n)
        tiles = -(-m // tile.block_m)
        chunks, rows = split(tiles, n, tile.block_n)
        partial = torch.empty(chunks, m, dtype=torch.float32, device=x.device)
        self.run(
            flash_sinkhorn.flash_column_sums_kernel,
            (tiles, chunks),
            self.keys,
            x,
            self.bias,
            col.exponent,
            *row,
            partial,
            _as_float(scale),
            m,
            n,
            rows,
            *self._index,
            self.keys.stride(0),
            x.stride(0),
            **self._constants(tile),
        )
        self._add_chunks(partial, col.mantissa, c, False, col if divide else None)

    def targets(self, y: Tensor, scale: Number, row: Potential, col: Potential, out: Tensor) -> None:
        """Write the targets P (m, N) float32 of rows y (m, D) to `out`."""
        m, n = out.shape
        assert len(y) == m and out.is_contiguous()
        tile = self._tile(m, n)
        self.run(
            flash_match.flash_targets_kernel,
            (-(-m // tile.block_m), -(-n // tile.block_n)),
            y,
            self.keys,
            self.bias,
            *row,
            *col,
            out,
            _as_float(scale),
            m,
            n,
            *self._index,
            y.stride(0),
            self.keys.stride(0),
            **self._constants(tile),
        )

    def match(
        self,
        z: Tensor,
        y: Tensor,
        row: Potential,
        source: Potential,
        col: Potential,
        *,
        epsilon: float,
        temperature: float,
        needs_grad: bool,
    ) -> tuple[MatchSums, Tensor | None]:
        """Compute loss, entropies and dz = G k (M, D) float32 of source rows z (M, D) and target rows y (>= L*B, D).

        row: potentials of the target rows after the last row step. source: 1 / Σ_j 2^(s_ij log2(e)/tau) per source row.
        """
        layout = self.layout
        B, V, L, n = layout.B, layout.V, layout.L, layout.N
        tile = flash_tile(B, n, layout.D, wide=True, sixteen_bit=z.element_size() == 2)
        tiles = -(-B // tile.block_m) * -(-layout.D // tile.block_out)
        chunks, rows = split(tiles * V, n, tile.block_n)
        sums = torch.empty(chunks, 3, layout.M, dtype=torch.float32, device=z.device)
        dz = torch.empty(chunks, layout.M, layout.D, dtype=torch.float32, device=z.device) if needs_grad else None
        self.run(
            flash_match.flash_match_kernel,
            (tiles, V, chunks),
            z,
            y,
            self.keys,
            self.bias,
            *row,
            *source,
            *col,
            sums,
            dz,
            *self._scales(epsilon, temperature),
            layout.pair_weight,
            L,
            V,
            n,
            rows,
            *self._index,
            z.stride(0),
            y.stride(0),
            self.keys.stride(0),
            **self._constants(tile, wide=True),
        )
        return self._match_sums(sums, source, temperature), self._sum_chunks(dz) if dz is not None else None

    def _match_sums(self, sums: Tensor, source: Potential, temperature: float) -> MatchSums:
        layout, block = self.layout, block_of(self.layout.M, 512)
        programs = -(-layout.M // block)
        images = torch.empty(3, programs, dtype=torch.float64, device=sums.device)
        self.run(
            stats.flash_sums_kernel,
            (programs,),
            sums,
            *source,
            images,
            layout.pair_weight,
            1 / (temperature * self.unit**2),
            len(sums),
            layout.B,
            layout.L,
            layout.V,
            BLOCK=block,
            num_warps=warps(block, 4),
        )
        return MatchSums(images)

    def key_gradient(
        self,
        z: Tensor,
        w: Tensor,
        row: Potential,
        source: Potential,
        col: Potential,
        *,
        epsilon: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Key gradients Gᵀ w (N, D) and column sums of G (N,), if target rows are source rows; arguments as in `match`.

        w (M, D): z, or z minus a vector common to all rows, in the type of z and times `unit`.
        """
        layout = self.layout
        assert w.shape == z.shape and w.stride(1) == 1
        tile = flash_tile(layout.N, layout.B, layout.D, wide=True, sixteen_bit=z.element_size() == 2)
        tiles = -(-layout.N // tile.block_m) * -(-layout.D // tile.block_out)
        chunks, images = split(tiles, layout.B, tile.block_n)
        dk = torch.empty(chunks, layout.N, layout.D, dtype=torch.float32, device=z.device)
        partial = torch.empty(chunks, layout.N, dtype=torch.float32, device=z.device)
        self.run(
            flash_keys.flash_dk_kernel,
            (tiles, chunks),
            z,
            w,
            self.keys,
            self.bias,
            *row,
            *source,
            *col,
            dk,
            partial,
            *self._scales(epsilon, temperature),
            1 / (layout.B * temperature),
            layout.pair_weight,
            layout.L,
            layout.V,
            layout.N,
            images,
            *self._index,
            z.stride(0),
            w.stride(0),
            self.keys.stride(0),
            **self._constants(tile, wide=True),
        )
        return self._sum_chunks(dk), self._sum_chunks(partial)

    def _sum_chunks(self, partial: Tensor) -> Tensor:
        """Sum of partial (chunks, ...) over chunks, without a launch if there is one chunk."""
        if len(partial) == 1:
            return partial[0]
        out = torch.empty_like(partial[0])
        self._add_chunks(partial.flatten(1), None, out.view(-1), False)
        return out

    def _scales(self, epsilon: float, temperature: float) -> tuple[float, float, float]:
        """log2(e)/eps and log2(e)/tau for products of rows times `unit`, and the factor from (a A - Pbar) k to dz."""
        return self.score_scale(epsilon), self.score_scale(temperature), 1 / (self.layout.B * temperature * self.unit)

    def score_scale(self, over: float) -> float:
        """Scale log2(e) / `over` for products of rows and keys times `unit`."""
        return LOG2_E / over / self.unit**2

    @property
    def _index(self) -> tuple[int, int, int]:
        return self.layout.B, self.layout.T, self.layout.own_columns

    def _tile(self, m: int, n: int) -> FlashTile:
        return flash_tile(m, n, self.layout.D, sixteen_bit=self.keys.element_size() == 2)

    def _constants(self, tile: FlashTile, *, wide: bool = False) -> dict[str, Any]:
        return {
            "MASK_POSITIVES": self.masked,
            "D": self.layout.D,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": tile.block_d,
            **({"BLOCK_OUT": tile.block_out} if wide else {}),
            "PRECISION": self.precision,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }
