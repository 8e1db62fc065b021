"""The CUDA row kernels: shapes checked here, addresses handed to csrc/cuda.

The interface is that of backends/cpu.py: scores are (m, N) or (views, images, N), float32 or int16, with contiguous
columns; potentials are pairs of (n,) float32 tensors. Everything runs on the device of its arguments, on the current
stream, without a host synchronisation; workspaces are torch's. A `scale` or `step` is a number or a device scalar.
Results do not differ from run to run on devices of one kind.
"""

import torch
from torch import Tensor

from ...layout import Layout
from ..interface import LOG2_E, DeviceNumber, Number, Positives, Potential, UnitRows
from ..unit_rows import UnitRowsKernels
from .launch import FLOAT_TYPES, NO_POTENTIAL, address, number, pair, positives_of, rounded, rows_of, scores_of
from .launch_match import MatchKernels
from .launch_sinkhorn import SinkhornKernels

SYMMETRIZE_TILE = 32  # kTile in csrc/cuda/plan.cu


class CudaKernels(UnitRowsKernels, SinkhornKernels, MatchKernels):
    """The row kernels."""

    backend = "cuda"

    def _read_rows(self, rows: UnitRows, centre: Tensor | None, row: Potential | None, scale: float) -> None:
        m, d = rows.read.shape
        self._kernels.normalize(
            rows_of(rows.x),
            m,
            d,
            address(centre),
            rows.read.data_ptr(),
            rows.norm.data_ptr(),
            address(rows.bias),
            rounded(scale),
            pair(row) if row is not None else NO_POTENTIAL,
            self._where(rows.x),
        )

    def product_step(self, centre: Tensor, key_bias: Tensor, row_bias: Tensor) -> DeviceNumber:
        """The product of half rows, bias added, that is one step of fixed point; biases of all keys and of rows."""
        step, given = torch.empty(1, device=centre.device), []
        for x in (centre, key_bias, row_bias):
            _check_vector(x)
            given += [x.data_ptr(), len(x)]
        self._kernels.product_step(*given, step.data_ptr(), self._where(centre))
        return DeviceNumber(1.0, step)

    def centre_potential(self, read: Tensor, centre: Tensor, epsilon: float) -> Potential:
        """The row potential exp(<unit_i, centre>/eps) that scores against centred keys start from; float32 rows."""
        m, d = read.shape
        assert read.is_contiguous() and read.dtype == torch.float32
        _check_vector(centre)
        row = Potential(*torch.empty(2, m, device=read.device))
        scale = rounded(LOG2_E / epsilon)
        self._kernels.centre_potential(read.data_ptr(), m, d, centre.data_ptr(), scale, pair(row), self._where(read))
        return row

    def project_(self, d: Tensor, rows: UnitRows, factor: float = 1.0) -> Tensor:
        """d (m, D) <- factor * (d - unit <unit, d>) / norm, 0 for a row with norm below 1e-12."""
        m, features = d.shape
        assert d.is_contiguous()
        self._kernels.project(d.data_ptr(), rows_of(rows.x), rows.norm.data_ptr(), factor, m, features, self._where(d))
        return d

    def symmetrize_(self, G: Tensor) -> Tensor:
        """G (m, m) float32 or fp16 <- G + Gᵀ; returns its row sums (m,) float32."""
        m = len(G)
        assert G.shape == (m, m) and G.stride(1) == 1 and G.dtype in (torch.float32, torch.float16)
        sums = torch.empty(m, device=G.device)
        partial = torch.empty(-(-m // SYMMETRIZE_TILE), m, device=G.device)
        self._kernels.symmetrize(
            G.data_ptr(), FLOAT_TYPES[G.dtype], m, G.stride(0), sums.data_ptr(), partial.data_ptr(), self._where(G)
        )
        return sums

    def mask_positives_(self, s: Tensor, positives: Positives) -> Tensor:
        """Write the masked score where rows of (m, N) float32 scores meet keys of their own image."""
        assert s.stride(1) == 1 and s.dtype == torch.float32
        self._kernels.mask_positives(s.data_ptr(), len(s), s.stride(0), positives_of(positives), self._where(s))
        return s

    def loss_and_stats(
        self, images: Tensor, column_sums: Tensor, norm: Tensor | None, layout: Layout, uniform_loss: float
    ) -> tuple[Tensor, Tensor]:
        """As engine/sums.py says, in one launch; float32, rounded at the end."""
        assert images.is_contiguous() and images.dtype == column_sums.dtype == torch.float32
        loss, stats = torch.empty((), device=images.device), torch.empty(6, device=images.device)
        self._kernels.loss_and_stats(
            images.data_ptr(),
            images.shape[1],
            column_sums.data_ptr(),
            len(column_sums),
            address(norm),
            len(norm) if norm is not None else 0,
            (layout.B, layout.L, layout.V),
            uniform_loss,
            loss.data_ptr(),
            stats.data_ptr(),
            self._where(images),
        )
        return loss, stats

    def plan_products(
        self, s: Tensor, scale: Number, row: Potential, col: Potential, v: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """E v (m,) and Eᵀ u (N,), E_ij = 2^(scale*s_ij) row_i col_j; empty where v or u is None."""
        m, n = s.shape
        y = torch.empty(m if v is not None else 0, device=s.device)
        w = torch.empty(n if u is not None else 0, device=s.device)
        if v is not None or u is not None:
            of_v, of_u = (y if v is not None else None), (w if u is not None else None)
            self._plan_products(s, scale, row, col, v, u, of_v, of_u, False)
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
        m, n = s.shape
        self._kernels.plan_subtract(
            scores_of(s),
            m,
            n,
            number(scale),
            pair(row),
            pair(col),
            u.data_ptr() if u is not None else 0,
            v.data_ptr() if v is not None else 0,
            x.data_ptr(),
            x.stride(0),
            self._where(s),
        )


def _check_vector(x: Tensor) -> None:
    assert x.is_contiguous() and x.dtype == torch.float32
