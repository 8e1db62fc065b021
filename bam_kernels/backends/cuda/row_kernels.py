"""The CUDA row kernels of csrc/cuda: this module checks shapes and passes addresses.

backends/cpu.py documents the methods. Scores are (m, N) or (views, images, N), float32 or int16, with contiguous
columns; potentials are pairs of (n,) float32 tensors. A `scale` or `step` is a number or a device scalar. Kernels run
on the device of their arguments, on the current stream, without host synchronisation; workspaces are torch tensors.
Results are equal from run to run on devices of one kind.
"""

import torch
from torch import Tensor

from ...layout import Layout
from ..addresses import FLOAT64, address, pair, scores_of
from ..interface import DeviceNumber, Number, Positives, Potential, UnitRows
from ..unit_rows import Reading, UnitRowsKernels
from .launch import FLOAT_TYPES, as_float32, number, positives_of, rows_of
from .launch_match import MatchKernels
from .launch_sinkhorn import SinkhornKernels

SYMMETRIZE_TILE = 32  # kTile in csrc/cuda/plan.cu
UNIT_TYPES = (torch.float32, torch.float16)  # dtypes of rows that products read, and of the score gradient


class CudaKernels(UnitRowsKernels, SinkhornKernels, MatchKernels):
    """The CUDA row kernels."""

    backend = "cuda"

    def _read_rows(self, to: Reading) -> None:
        device = to.x.device
        # With a centre the kernel writes fp16.
        read_types = (torch.float32 if to.centre is None else torch.float16,)
        self._kernels.normalize(
            rows_of(to.x, device),
            len(to.norm),
            to.x.shape[-1],
            address(to.centre, device),
            address(to.read, device, read_types),
            address(to.norm, device, FLOAT64),
            address(to.bias, device),
            as_float32(to.scale),
            pair(to.row, device),
            _message(to.message, device),
            self._launch_context(to.x),
        )

    def _mean_row(self, x: Tensor, norm: Tensor | None, ranks: int) -> Tensor:
        m, d, device = x.shape[:-1].numel(), x.shape[-1], x.device
        mean = torch.empty(d, dtype=torch.float32, device=device)
        norms = address(norm, device, FLOAT64)
        self._kernels.mean_row(rows_of(x, device), norms, m, d, ranks, address(mean, device), self._launch_context(x))
        return mean

    def product_step(
        self, centre: Tensor, key_bias: Tensor, row_bias: Tensor, other_bias: Tensor | None = None
    ) -> DeviceNumber:
        """Size of one fixed-point step, as a product of fp16 rows plus bias.

        key_bias (N,), row_bias (m,): biases of all keys and of all rows whose scores share the step.
        other_bias: biases of further such rows.
        """
        device = centre.device
        step, arguments = torch.empty(1, dtype=torch.float32, device=device), []
        for x in (centre, key_bias, row_bias, other_bias):
            assert x is None or (x.is_contiguous() and len(x))
            arguments += [address(x, device), len(x) if x is not None else 0]
        self._kernels.product_step(*arguments, address(step, device), self._launch_context(centre))
        return DeviceNumber(1.0, step)

    def _centre_potential(self, read: Tensor, centre: Tensor, scale: float, row: Potential) -> None:
        assert read.is_contiguous()
        m, d = read.shape
        device, factor = read.device, as_float32(scale)
        of_centre = address(centre, device)
        self._kernels.centre_potential(
            address(read, device), m, d, of_centre, factor, pair(row, device), self._launch_context(read)
        )

    def _project(self, d: Tensor, rows: UnitRows, factor: float) -> None:
        m, features = d.shape
        device = d.device
        norm = address(rows.norm, device, FLOAT64)
        self._kernels.project(
            address(d, device), rows_of(rows.x, device), norm, factor, m, features, self._launch_context(d)
        )

    def symmetrize_(self, G: Tensor) -> Tensor:
        """Replace G (m, m), float32 or fp16, by G + Gᵀ; returns the column sums (m,) float32 that G had."""
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
        """Compute `loss_and_stats` of engine/sums.py in one launch, rounded to float32 at the end."""
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
        """Products E v (m,) and Eᵀ u (N,) with E_ij = 2^(scale*s_ij) row_i col_j; empty if v or u is None."""
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
        """Subtract E_ij (u_i + v_j) from x_ij (m, N), in place, with E as in `plan_products`; u or v None: 0."""
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


def _message(message: Tensor | None, device: torch.device) -> tuple[int, int, int]:
    """A message (n, columns) fp16 as kernels take it: address, columns, rows."""
    if message is None:
        return 0, 0, 0
    return address(message, device, (torch.float16,)), message.shape[1], len(message)
