"""The C++ row kernels of csrc/cpu: this module checks shapes and passes addresses.

Scores are (m, N) or (views, images, N), float32 or int16, with contiguous columns. Potentials are pairs of (n,)
float32 tensors. All work runs on torch.get_num_threads() threads; results do not depend on their number.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from ..precision import multiply
from .addresses import BYTES, FLOAT64, INT16, address, pair, scores_of
from .extension import _C, import_error
from .interface import LOG2_E, CommonPart, MatchSums, Positives, Potential, UnitRows

CPU = torch.device("cpu")


def unavailable() -> str | None:
    """Reason why the C++ kernels cannot run, or None."""
    if _C is None:
        return f"the extension is not built ({import_error}); install it with a C++ compiler: pip install -e ."
    return None


# Elements from which threads gain more than it takes to start them: of kernels that do much arithmetic on an element,
# and of kernels that add it up.
LEAST_SHARED, LEAST_SHARED_SUMS = 1 << 15, 1 << 18
# Multiplications of a product from which it gains more from tile units than it takes to fill them.
LEAST_SPLIT = 1 << 23


def _threads(elements: int, least: int = LEAST_SHARED) -> int:
    """Number of threads: torch's, or 1 for fewer elements than `least`."""
    return 1 if elements < least else torch.get_num_threads()


class CpuKernels:
    """The row kernels for one instruction set (auto, avx512, avx2 or plain), or from a given table of kernels."""

    backend = "cpu"

    def __init__(self, isa: str = "auto", table: Any = None, splits_products: bool = False) -> None:
        self._kernels = table if table is not None else _C.cpu_kernels(isa)
        self.isa: str = self._kernels.isa
        self.splits_products = splits_products

    def recorded(self, recorder: Any) -> "CpuKernels":
        """These kernels, whose launches a Recorder also notes."""
        return CpuKernels(table=self._kernels.recorded(recorder.launches), splits_products=self.splits_products)

    @property
    def can_split_products(self) -> bool:
        """Whether the processor has tile units (AMX), which this process may use."""
        return self._kernels.has_split_products()

    def with_split_products(self) -> "CpuKernels":
        """These kernels, with products of two bf16 parts of each number on tile units.

        The error of a product a b is at most 2^-15 |a||b| for each row of a and column of b, beside float32's rounding.
        """
        assert self.can_split_products
        return CpuKernels(table=self._kernels, splits_products=True)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        """Write a b, or out + a b with `add`, to out (m, n) float32; a (m, k) and b (k, n), of float32.

        Rows or columns of a and of b must be contiguous, and rows of out. Small products are torch's.
        """
        (m, k), n = a.shape, b.shape[1]
        if not self.splits_products or m * n * k < LEAST_SPLIT:
            return multiply(a, b, out, add=add)
        assert out.stride(1) == 1 and 1 in a.stride() and 1 in b.stride()
        threads = torch.get_num_threads()
        workspace = torch.empty(self._kernels.split_product_bytes(m, n, k, threads), dtype=torch.uint8, device=CPU)
        self._kernels.split_product(
            (address(a, CPU), *a.stride()),
            (address(b, CPU), *b.stride()[::-1]),
            address(out, CPU),
            out.stride(0),
            (m, n, k),
            add,
            address(workspace, CPU, BYTES),
            threads,
        )
        return out

    def require_finite(self, norm: Tensor) -> None:
        """Raise NotFinite if a norm of rows, norm (m,) float64, is not finite."""
        assert norm.is_contiguous()
        self._kernels.require_finite(address(norm, CPU, FLOAT64), len(norm))

    def normalize(self, x: Tensor) -> UnitRows:
        """L2-normalise x (m, D) or (V, B, D), any float type and strides, into view-major unit rows (m, D) float32."""
        x = x.float().flatten(0, -2)
        if x.stride(-1) != 1:
            x = x.contiguous()
        m, d = x.shape
        unit = torch.empty(m, d, dtype=torch.float32, device=CPU)
        norm = torch.empty(m, dtype=torch.float64, device=CPU)
        self._kernels.normalize(
            address(x, CPU), m, d, x.stride(0), address(unit, CPU), address(norm, CPU, FLOAT64), _threads(m * d)
        )
        return UnitRows(unit, norm, unit)

    def mean_row(self, x: Tensor) -> Tensor:
        """Mean (D,) of float32 rows x (m, D), in float64 sums of groups of four rows."""
        assert x.stride(1) == 1
        m, d = x.shape
        mean = torch.empty(d, dtype=torch.float32, device=CPU)
        self._kernels.mean_row(
            address(x, CPU), m, d, x.stride(0), address(mean, CPU), _threads(m * d, LEAST_SHARED_SUMS)
        )
        return mean

    def centre_potential(
        self, read: Tensor, centre: Tensor, epsilon: float, centred: Tensor | None = None
    ) -> Potential:
        """Row potential exp(<unit_i, centre>/eps) of float32 rows (m, D), from which Sinkhorn on centred keys starts.

        centred  (n, D), out: the first n rows less the centre, for rows that are keys
        """
        m, d = read.shape
        assert read.is_contiguous() and (centred is None or centred.is_contiguous())
        row = Potential.empty(m, CPU)
        self._kernels.centre_potential(
            address(read, CPU),
            address(centre, CPU),
            m,
            d,
            LOG2_E / epsilon,
            pair(row, CPU),
            address(centred, CPU),
            len(centred) if centred is not None else 0,
            _threads(m * d),
        )
        return row

    def project_(self, d: Tensor, rows: UnitRows, factor: float = 1.0, common: CommonPart | None = None) -> Tensor:
        """Gradient of the L2 normalisation, in place: d (m, D) <- factor * (d - unit <unit, d>) / norm.

        `common` is added to d before. A row with a norm below 1e-12 gets 0.
        """
        m, features = d.shape
        assert d.is_contiguous() and rows.x.is_contiguous()
        weights, row, common_factor = common or (None, None, 0.0)
        assert common is None or common.weights.is_contiguous()
        self._kernels.project(
            address(d, CPU),
            address(rows.x, CPU),
            address(rows.norm, CPU, FLOAT64),
            factor,
            address(weights, CPU),
            address(row, CPU),
            common_factor,
            len(weights) if weights is not None else 0,
            m,
            features,
            _threads(m * features),
        )
        return d

    def symmetrize_(self, G: Tensor) -> Tensor:
        """Replace G (m, m) by G + Gᵀ; returns the column sums (m,) that G had."""
        m = len(G)
        assert G.shape == (m, m) and G.stride(1) == 1
        sums = torch.empty(m, dtype=torch.float32, device=CPU)
        self._kernels.symmetrize(
            address(G, CPU), m, G.stride(0), address(sums, CPU), _threads(m * m, LEAST_SHARED_SUMS)
        )
        return sums

    def mask_positives_(self, scores: Tensor, positives: Positives) -> Tensor:
        """Write the masked score where rows of (m, N) float32 scores meet keys of their own image."""
        layout = positives.layout
        self._kernels.mask_positives(
            address(scores, CPU),
            len(scores),
            scores.stride(0),
            positives.first,
            positives.period,
            layout.B,
            layout.T,
            layout.own_columns,
            _threads(len(scores) * layout.T),
        )
        return scores

    def quantize(self, scores: Tensor, step: float, out: Tensor) -> Tensor:
        """Write rint(scores/step), clamped to +-32767, to `out` (m, N) int16; masked scores become -32768."""
        assert scores.is_contiguous() and out.is_contiguous()
        m, n = scores.shape
        self._kernels.quantize(address(scores, CPU), m, n, 1 / step, address(out, CPU, INT16), _threads(m * n))
        return out

    def column_lse(
        self, scores: Tensor, scale: float, row: Potential, shift: Tensor, sums: Tensor, accumulate: bool
    ) -> None:
        """Write column sums Σ_i 2^(scale*s_ij) row_i as sums_j * 2^shift_j; with `accumulate`, add to the old sums."""
        m, n = scores.shape
        self._kernels.column_lse(
            scores_of(scores, CPU),
            m,
            n,
            scale,
            pair(row, CPU),
            address(shift, CPU),
            address(sums, CPU),
            accumulate,
            _threads(m * n),
        )

    def reciprocal_potential(self, shift: Tensor, sums: Tensor) -> Potential:
        """Column potential 1 / (sums_j * 2^shift_j)."""
        col = Potential(torch.empty_like(shift), torch.empty_like(shift))
        self._kernels.reciprocal_potential(pair(col, CPU), address(shift, CPU), address(sums, CPU), len(shift))
        return col

    def column_totals(self, shift: Tensor, sums: Tensor, common: int) -> Tensor:
        """Column sums as multiples of 2^common, which can be added up: sums_j * 2^(shift_j - common) (n,) float64."""
        total, n = torch.empty_like(shift, dtype=torch.float64), len(shift)
        at = address(shift, CPU), address(sums, CPU)
        self._kernels.column_totals(*at, common, address(total, CPU, FLOAT64), n, _threads(n))
        return total

    def total_potential(self, total: Tensor, common: int) -> Potential:
        """Column potential 1 / (total_j * 2^common) of column sums as `column_totals` writes them."""
        col = Potential.empty(len(total), CPU)
        self._kernels.total_potential(pair(col, CPU), address(total, CPU, FLOAT64), common, len(total))
        return col

    def divide_potential_(self, col: Potential, c: Tensor) -> None:
        """Divide the column potential by c, in place."""
        self._kernels.divide_potential(pair(col, CPU), address(c, CPU), len(c))

    def sinkhorn_pass(
        self,
        scores: Tensor,
        scale: float,
        row: Potential,
        col: Potential,
        c: Tensor,
        accumulate: bool,
        divide: bool = False,
    ) -> None:
        """One Sinkhorn iteration in one read of the scores: row_i = 1 / Σ_j 2^(scale*s_ij) col_j, then column sums.

        c_j is set to Σ_i 2^(scale*s_ij) row_i col_j, or increased by it with `accumulate`. divide: these are the last
        rows, so that col is divided by c.
        """
        m, n = scores.shape
        self._kernels.sinkhorn_pass(
            scores_of(scores, CPU),
            m,
            n,
            scale,
            pair(row, CPU),
            pair(col, CPU),
            address(c, CPU),
            accumulate,
            _threads(m * n),
        )
        if divide:
            self.divide_potential_(col, c)

    def match(
        self,
        target: Tensor,
        source: Tensor | None,
        layout: Layout,
        col: Potential,
        row_exponent: Tensor,
        *,
        epsilon: float,
        temperature: float,
        step: float = 1.0,
        top_k: int = 0,
        targets: Tensor | None = None,
        row_out: Potential | None = None,
        gradient: Tensor | None = None,
        gradient_factor: float = 1.0,
    ) -> MatchSums:
        """Compute targets P of b images and, with `source`, loss, entropies and score gradient of their source rows.

        target        (L, b, N), scores of the target rows
        source        (V, b, N), scores of the source rows, or None
        row_exponent  (L, b), guesses of the exponents of the row potentials
        targets       (L, b, N) float32, out: P
        row_out       (b,), out: the row potential of target view 0
        gradient      (V, b, N) float32, out: gradient of the loss by the scores, times gradient_factor; may be `source`
        """
        L, b, n = target.shape
        V = len(source) if source is not None else 0
        assert row_exponent.stride(1) == 1 and (targets is None or targets.stride()[1:] == (n, 1))
        per_image = torch.empty(3, b, dtype=torch.float64, device=CPU)
        self._kernels.match(
            scores_of(target, CPU),
            scores_of(source, CPU),
            (L, V, b, n, layout.W, layout.T, layout.B, top_k),
            (
                LOG2_E / epsilon * step,
                LOG2_E / temperature * step,
                step / temperature,
                gradient_factor / (layout.B * temperature),
            ),
            address(row_exponent, CPU),
            row_exponent.stride(0),
            pair(col, CPU),
            address(per_image, CPU, FLOAT64),
            address(targets, CPU),
            targets.stride(0) if targets is not None else 0,
            pair(row_out, CPU),
            (address(gradient, CPU), *(gradient.stride()[:2] if gradient is not None else (0, 0))),
            _threads((L + V) * b * n),
        )
        return MatchSums(per_image)

    def loss_and_stats(
        self, images: Tensor, column_sums: Tensor, norm: Tensor | None, layout: Layout, uniform_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Compute `loss_and_stats` of engine/sums.py, rounded to float32 at the end."""
        assert images.is_contiguous() and column_sums.is_contiguous() and (norm is None or norm.is_contiguous())
        loss = torch.empty((), dtype=torch.float32, device=CPU)
        stats = torch.empty(6, dtype=torch.float32, device=CPU)
        self._kernels.loss_and_stats(
            address(images, CPU, FLOAT64),
            images.shape[1],
            address(column_sums, CPU),
            len(column_sums),
            address(norm, CPU, FLOAT64),
            len(norm) if norm is not None else 0,
            (layout.B, layout.L, layout.V),
            uniform_loss,
            address(loss, CPU),
            address(stats, CPU),
        )
        return loss, stats

    def plan_products(
        self, scores: Tensor, scale: float, row: Potential, col: Potential, v: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Products E v (m,) and Eᵀ u (N,) with E_ij = 2^(scale*s_ij) row_i col_j; empty if v or u is None."""
        m, n = scores.shape
        y = torch.empty(m if v is not None else 0, dtype=torch.float32, device=CPU)
        w = torch.empty(n if u is not None else 0, dtype=torch.float32, device=CPU)
        self._kernels.plan_products(
            scores_of(scores, CPU),
            m,
            n,
            scale,
            pair(row, CPU),
            pair(col, CPU),
            address(v, CPU),
            address(u, CPU),
            address(y, CPU),
            address(w, CPU),
            _threads(m * n),
        )
        return y, w

    def plan_subtract_(
        self,
        x: Tensor,
        scores: Tensor,
        scale: float,
        row: Potential,
        col: Potential,
        u: Tensor | None,
        v: Tensor | None,
    ) -> None:
        """Subtract E_ij (u_i + v_j) from x_ij (m, N), in place, with E as in `plan_products`; u or v None: 0."""
        m, n = scores.shape
        self._kernels.plan_subtract(
            scores_of(scores, CPU),
            m,
            n,
            scale,
            pair(row, CPU),
            pair(col, CPU),
            address(u, CPU),
            address(v, CPU),
            address(x, CPU),
            _threads(m * n),
        )


@cache
def kernels(isa: str = "auto") -> CpuKernels:
    """The row kernels of an instruction set; "auto" is the best one of this processor."""
    return CpuKernels(isa)
