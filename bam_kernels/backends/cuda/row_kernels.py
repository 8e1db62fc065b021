"""The CUDA row kernels: shapes checked here, addresses handed to csrc/cuda.

The interface is that of backends/cpu.py: scores are (m, N) or (views, images, N), float32 or int16, with contiguous
columns; potentials are pairs of (n,) float32 tensors. Everything runs on the device of its arguments, on the current
stream, without a host synchronisation; workspaces are torch's. A `scale` or `step` is a number or a device scalar.
Results do not differ from run to run on devices of one kind.
"""

import torch
from torch import Tensor

from ...layout import Layout
from ..addresses import FLOAT64, address, pair, scores_of
from ..interface import LOG2_E, DeviceNumber, Number, Positives, Potential, UnitRows
from ..unit_rows import UnitRowsKernels
from .launch import FLOAT_TYPES, as_float32, number, positives_of, rows_of
from .launch_match import MatchKernels
from .launch_sinkhorn import SinkhornKernels

SYMMETRIZE_TILE = 32  # kTile in csrc/cuda/plan.cu
UNIT_TYPES = (torch.float32, torch.float16)  # of rows that products read, and of the gradient of scores


class CudaKernels(UnitRowsKernels, SinkhornKernels, MatchKernels):
    """The row kernels."""

    backend = "cuda"

    def _read_rows(self, rows: UnitRows, centre: Tensor | None, row: Potential | None, scale: float) -> None:
        m, d = rows.read.shape
        device = rows.x.device
        # With a centre the kernel writes fp16.
        read_types = (torch.float32 if centre is None else torch.float16,)
        self._kernels.normalize(
            rows_of(rows.x, device),
            m,
            d,
            address(centre, device),
            address(rows.read, device, read_types),
            address(rows.norm, device, FLOAT64),
            address(rows.bias, device),
            as_float32(scale),
            pair(row, device),
            self._launch_context(rows.x),
        )

    def product_step(self, centre: Tensor, key_bias: Tensor, row_bias: Tensor) -> DeviceNumber:
        """The product of half rows, bias added, that is one step of fixed point; biases of all keys and of rows."""
        device = centre.device
        step, arguments = torch.empty(1, dtype=torch.float32, device=device), []
        for x in (centre, key_bias, row_bias):
            assert x.is_contiguous()
            arguments += [address(x, device), len(x)]
        self._kernels.product_step(*arguments, address(step, device), self._launch_context(centre))
        return DeviceNumber(1.0, step)

    def centre_potential(self, read: Tensor, centre: Tensor, epsilon: float) -> Potential:
        """The row potential exp(<unit_i, centre>/eps) that scores against centred keys start from; float32 rows."""
        m, d = read.shape
        assert read.is_contiguous() and centre.is_contiguous()
        device, scale = read.device, as_float32(LOG2_E / epsilon)
        row = Potential.empty(m, device)
        centre_address = address(centre, device)
        self._kernels.centre_potential(
            address(read, device), m, d, centre_address, scale, pair(row, device), self._launch_context(read)
        )
        return row

    def project_(self, d: Tensor, rows: UnitRows, factor: float = 1.0) -> Tensor:
        """d (m, D) <- factor * (d - unit <unit, d>) / norm, 0 for a row with norm below 1e-12."""
        m, features = d.shape
        assert d.is_contiguous()
        device = d.device
        norm = address(rows.norm, device, FLOAT64)
        self._kernels.project(
            address(d, device), rows_of(rows.x, device), norm, factor, m, features, self._launch_context(d)
        )
        return d

    def symmetrize_(self, G: Tensor) -> Tensor:
        """G (m, m) float32 or fp16 <- G + Gᵀ; returns its row sums (m,) float32."""
        m = len(G)
        assert G.shape == (m, m) and G.stride(1) == 1
        device, first = G.device, address(G, G.device, UNIT_TYPES)
        sums = torch.empty(m, dtype=torch.float32, device=device)
        partial = torch.empty(-(-m // SYMMETRIZE_TILE), m, dtype=torch.float32, device=device)
        sum_addresses = address(sums, device), address(partial, device)
        self._kernels.symmetrize(first, FLOAT_TYPES[G.dtype], m, G.stride(0), *sum_addresses, self._launch_context(G))
        return sums

    def mask_positives_(self, s: Tensor, positives: Positives) -> Tensor:
        """Write the masked score where rows of (m, N) float32 scores meet keys of their own image."""
        assert s.stride(1) == 1
        first = address(s, s.device)
        self._kernels.mask_positives(first, len(s), s.stride(0), positives_of(positives), self._launch_context(s))
        return s

    def loss_and_stats(
        self, images: Tensor, column_sums: Tensor, norm: Tensor | None, layout: Layout, uniform_loss: float
    ) -> tuple[Tensor, Tensor]:
        """As engine/sums.py says, in one launch; float32, rounded at the end."""
        assert images.is_contiguous()
        device = images.device
        loss = torch.empty((), dtype=torch.float32, device=device)
        stats = torch.empty(6, dtype=torch.float32, device=device)
        self._kernels.loss_and_stats(
            address(images, device),
            images.shape[1],
            address(column_sums, device),
            len(column_sums),
            address(norm, device, FLOAT64),
            len(norm) if norm is not None else 0,
            (layout.B, layout.L, layout.V),
            uniform_loss,
            address(loss, device),
            address(stats, device),
            self._launch_context(images),
        )
        return loss, stats

    def plan_products(
        self, s: Tensor, scale: Number, row: Potential, col: Potential, v: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """E v (m,) and Eᵀ u (N,), E_ij = 2^(scale*s_ij) row_i col_j; empty where v or u is None."""
        m, n = s.shape
        y = torch.empty(m if v is not None else 0, dtype=torch.float32, device=s.device)
        w = torch.empty(n if u is not None else 0, dtype=torch.float32, device=s.device)
        if v is not None or u is not None:
            y_or_none, w_or_none = (y if v is not None else None), (w if u is not None else None)
            self._plan_products(s, scale, row, col, v, u, y_or_none, w_or_none, False)
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
        device = s.device
        self._kernels.plan_subtract(
            scores_of(s, device),
            m,
            n,
            number(scale, device),
            pair(row, device),
            pair(col, device),
            address(u, device),
            address(v, device),
            address(x, device),
            x.stride(0),
            self._launch_context(s),
        )
