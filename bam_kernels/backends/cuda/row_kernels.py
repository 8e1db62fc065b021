"""The CUDA row kernels: shapes checked here, addresses handed to csrc/cuda.

The interface is that of backends/cpu.py: scores are (m, N) or (views, images, N), float32 or int16, with contiguous
columns; potentials are pairs of (n,) float32 tensors. Everything runs on the device of its arguments, on the current
stream, without a host synchronisation; workspaces are torch's. A `scale` or `step` is a number or a device scalar.
Results do not differ from run to run on devices of one kind.
"""

import torch
from torch import Tensor

from ...layout import Layout
from ..interface import LOG2_E, Potential
from .launch import Number, number, pair, positives_of, rows_of, scores_of
from .launch_match import MatchKernels
from .launch_sinkhorn import SinkhornKernels


class CudaKernels(SinkhornKernels, MatchKernels):
    """The row kernels."""

    backend = "cuda"

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (m, D) of any float type -> unit rows (m, D) float32 and norms (m,) float64."""
        if x.stride(-1) != 1:
            x = x.contiguous()
        m, d = x.shape
        unit = torch.empty(m, d, device=x.device)
        norm = torch.empty(m, dtype=torch.float64, device=x.device)
        self._kernels.normalize(rows_of(x), m, d, 0, unit.data_ptr(), 0, norm.data_ptr(), self._where(x))
        return unit, norm

    def centre_potential(self, unit: Tensor, centre: Tensor, epsilon: float) -> Potential:
        """The row potential exp(<unit_i, centre>/eps) that scores against centred keys start from."""
        m, d = unit.shape
        assert centre.is_contiguous() and centre.dtype == torch.float32
        row = Potential(*torch.empty(2, m, device=unit.device))
        # The scale is rounded to float32, as that of the scores is.
        scale = torch.tensor(LOG2_E / epsilon, dtype=torch.float32).item()
        self._kernels.centre_potential(rows_of(unit), 0, m, d, centre.data_ptr(), scale, pair(row), self._where(unit))
        return row

    def project_(self, d: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
        """d (m, D) <- (d - unit <unit, d>) / norm, 0 for a row with norm below 1e-12."""
        m, features = d.shape
        assert d.is_contiguous()
        self._kernels.project(d.data_ptr(), rows_of(unit), True, norm.data_ptr(), m, features, self._where(d))
        return d

    def symmetrize_(self, G: Tensor) -> Tensor:
        """G (m, m) <- G + Gᵀ; returns its row sums (m,)."""
        m = len(G)
        assert G.shape == (m, m) and G.stride(1) == 1
        sums = torch.empty(m, device=G.device)
        partial = torch.empty(-(-m // 32), m, device=G.device)
        self._kernels.symmetrize(G.data_ptr(), m, G.stride(0), sums.data_ptr(), partial.data_ptr(), self._where(G))
        return sums

    def mask_positives_(self, s: Tensor, layout: Layout, first_row: int) -> Tensor:
        """Write the masked score where rows first_row .. of (m, N) scores meet keys of their own image."""
        m = len(s)
        self._kernels.mask_positives(scores_of(s), m, positives_of(layout, first_row, m), self._where(s))
        return s

    def quantize(self, s: Tensor, step: Number, out: Tensor) -> Tensor:
        """rint(scores/step) clamped to +-32767 into `out` (m, N) int16; masked scores as -32768."""
        assert s.stride(1) == out.stride(1) == 1 and s.dtype == torch.float32 and out.dtype == torch.int16
        m, n = s.shape
        self._kernels.quantize(
            s.data_ptr(), m, n, s.stride(0), number(step), out.data_ptr(), out.stride(0), self._where(s)
        )
        return out

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
