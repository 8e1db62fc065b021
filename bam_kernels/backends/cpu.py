"""The C++ row kernels: shapes checked here, addresses handed to csrc/cpu.

Scores are (m, N) or (views, images, N), float32 or int16, with contiguous columns. Potentials are pairs of (n,)
float32 tensors. All work runs on torch.get_num_threads() threads; results do not depend on their number.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from .addresses import FLOAT64, INT16, address, pair, scores_of
from .extension import _C, import_error
from .interface import LOG2_E, MatchSums, Positives, Potential, UnitRows

CPU = torch.device("cpu")


def unavailable() -> str | None:
    """Why these kernels cannot run, or None."""
    if _C is None:
        return f"the extension is not built ({import_error}); install it with a C++ compiler: pip install -e ."
    return None


def _threads(elements: int) -> int:
    """torch's number of threads, one where starting them would take longer than the work."""
    return 1 if elements < 16384 else torch.get_num_threads()


class CpuKernels:
    """The row kernels for one instruction set: auto, avx512, avx2 or plain; or a given table of them."""

    backend = "cpu"

    def __init__(self, isa: str = "auto", table: Any = None) -> None:
        self._kernels = table if table is not None else _C.cpu_kernels(isa)
        self.isa: str = self._kernels.isa

    def normalize(self, x: Tensor) -> UnitRows:
        """x (m, D) or (V, B, D) of any float type and strides -> unit rows (m, D) float32, norms; view-major."""
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

    def centre_potential(self, read: Tensor, centre: Tensor, epsilon: float) -> Potential:
        """The row potential exp(<unit_i, centre>/eps) that scores against centred keys start from."""
        m, d = read.shape
        row = Potential.empty(m, CPU)
        self._kernels.centre_potential(
            address(read, CPU), address(centre, CPU), m, d, LOG2_E / epsilon, pair(row, CPU), _threads(m * d)
        )
        return row

    def project_(self, d: Tensor, rows: UnitRows, factor: float = 1.0) -> Tensor:
        """d (m, D) <- factor * (d - unit <unit, d>) / norm, 0 for a row with norm below 1e-12."""
        m, features = d.shape
        assert d.is_contiguous() and rows.x.is_contiguous()
        norm = address(rows.norm, CPU, FLOAT64)
        self._kernels.project(address(d, CPU), address(rows.x, CPU), norm, factor, m, features, _threads(m * features))
        return d

    def symmetrize_(self, G: Tensor) -> Tensor:
        """G (m, m) <- G + Gᵀ; returns its row sums (m,)."""
        m = len(G)
        assert G.shape == (m, m) and G.stride(1) == 1
        sums = torch.empty(m, dtype=torch.float32, device=CPU)
        self._kernels.symmetrize(address(G, CPU), m, G.stride(0), address(sums, CPU), _threads(m * m))
        return sums

    def mask_positives_(self, scores: Tensor, positives: Positives) -> Tensor:
        """Write the masked score where rows of (m, N) float32 scores meet keys of their own image."""
        layout = positives.layout
        _C.mask_positives(
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
        """rint(scores/step) clamped to +-32767 into `out` (m, N) int16; masked scores as -32768."""
        assert scores.is_contiguous() and out.is_contiguous()
        m, n = scores.shape
        self._kernels.quantize(address(scores, CPU), m, n, 1 / step, address(out, CPU, INT16), _threads(m * n))
        return out

    def column_lse(
        self, scores: Tensor, scale: float, row: Potential, shift: Tensor, sums: Tensor, accumulate: bool
    ) -> None:
        """Per column Σ_i 2^(scale*s_ij) row_i = sums_j * 2^shift_j, added to what is there if `accumulate`."""
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
        """1 / (sums * 2^shift)."""
        col = Potential(torch.empty_like(shift), torch.empty_like(shift))
        _C.reciprocal_potential(pair(col, CPU), address(shift, CPU), address(sums, CPU), len(shift))
        return col

    def divide_potential_(self, col: Potential, c: Tensor) -> None:
        """col <- col / c."""
        _C.divide_potential(pair(col, CPU), address(c, CPU), len(c))

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
        """row_i = 1 / Σ_j 2^(scale*s_ij) col_j, then c_j += Σ_i 2^(scale*s_ij) row_i col_j, in one read.

        divide: these are the last rows, and col <- col / c.
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
        """Targets of b images and, with `source`, the loss of their source rows; `gradient` may be `source` itself.

        target (L, b, N), source (V, b, N), row_exponent (L, b): guesses; targets (L, b, N) and gradient (V, b, N)
        float32, times gradient_factor, are written where given; row_out (b,) is the potential of target view 0.
        """
        L, b, n = target.shape
        V = len(source) if source is not None else 0
        assert row_exponent.stride(1) == 1 and (targets is None or targets.stride()[1:] == (n, 1))
        per_image = torch.zeros(3, b, dtype=torch.float64, device=CPU)
        col_log2 = col.mantissa.log2()
        addresses: dict[str, Any] = {
            "target": scores_of(target, CPU),
            "source": scores_of(source, CPU),
            "row_exponent": address(row_exponent, CPU),
            "row_view_stride": row_exponent.stride(0),
            "col": pair(col, CPU),
            "col_log2": address(col_log2, CPU),
            "loss": address(per_image[0], CPU, FLOAT64),
            "target_entropy": address(per_image[1], CPU, FLOAT64),
            "source_entropy": address(per_image[2], CPU, FLOAT64),
            "targets": address(targets, CPU),
            "targets_view_stride": targets.stride(0) if targets is not None else 0,
            "row_out": pair(row_out, CPU),
            "gradient": address(gradient, CPU),
            "gradient_view_stride": gradient.stride(0) if gradient is not None else 0,
            "gradient_row_stride": gradient.stride(1) if gradient is not None else 0,
        }
        self._kernels.match(
            dict(
                addresses,
                L=L,
                V=V,
                b=b,
                n=n,
                W=layout.W,
                T=layout.T,
                B=layout.B,
                top_k=top_k,
                target_scale=LOG2_E / epsilon * step,
                source_scale=LOG2_E / temperature * step,
                source_step_over_tau=step / temperature,
                gradient_scale=gradient_factor / (layout.B * temperature),
            ),
            _threads((L + V) * b * n),
        )
        return MatchSums(per_image)

    def plan_products(
        self, scores: Tensor, scale: float, row: Potential, col: Potential, v: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """E v (m,) and Eᵀ u (N,), E_ij = 2^(scale*s_ij) row_i col_j; empty where v or u is None."""
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
        """x_ij <- x_ij - E_ij (u_i + v_j)."""
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
    """The row kernels; "auto" is the best instruction set of this processor."""
    return CpuKernels(isa)
