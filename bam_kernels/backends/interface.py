"""What the engines ask of a backend: row kernels on slabs of scores, their potentials and their sums.

Scores are (m, N) or (views, images, N), float32 or int16 fixed point, with contiguous columns; a masked entry is the
backend's masked score. `scale` and `step` are numbers, or scalars on the device. The CPU's docstrings (cpu.py) say what
each method computes.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..layout import Layout

LOG2_E = 1 / math.log(2)
FIXED_STEPS = 32000.0


class Potential(NamedTuple):
    """2^exponent * mantissa, per row or column; the exponent is an integer held in a float."""

    exponent: Tensor
    mantissa: Tensor

    @staticmethod
    def one(n: int, device: torch.device | None = None) -> "Potential":
        return Potential(torch.zeros(n, device=device), torch.ones(n, device=device))

    def rows(self, first: int, last: int) -> "Potential":
        return Potential(self.exponent[first:last], self.mantissa[first:last])

    def natural_log(self) -> Tensor:
        """Natural logarithm in float64."""
        return (self.exponent.double() + self.mantissa.double().log2()) / LOG2_E


@dataclass(frozen=True)
class Matched:
    """Sums over the images of one slab, natural logarithms, float64 scalars."""

    loss: Tensor
    target_entropy: Tensor
    source_entropy: Tensor


class RowKernels(Protocol):
    """The row kernels of one backend."""

    backend: str

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def centre_potential(self, unit: Tensor, centre: Tensor, epsilon: float) -> Potential: ...
    def project_(self, d: Tensor, unit: Tensor, norm: Tensor) -> Tensor: ...
    def symmetrize_(self, G: Tensor) -> Tensor: ...
    def mask_positives_(self, scores: Tensor, layout: Layout, first_row: int, /) -> Tensor: ...
    def quantize(self, scores: Tensor, step: Any, out: Tensor, /) -> Tensor: ...
    def column_lse(
        self, scores: Tensor, scale: Any, row: Potential, shift: Tensor, sums: Tensor, /, accumulate: bool
    ) -> None: ...
    def reciprocal_potential(self, shift: Tensor, sums: Tensor) -> Potential: ...
    def divide_potential_(self, col: Potential, c: Tensor) -> None: ...
    def sinkhorn_pass(
        self, scores: Tensor, scale: Any, row: Potential, col: Potential, c: Tensor, /, accumulate: bool
    ) -> None: ...
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
        step: Any = 1.0,
        top_k: int = 0,
        targets: Tensor | None = None,
        row_out: Potential | None = None,
        gradient: Tensor | None = None,
    ) -> Matched: ...
    def plan_products(
        self, scores: Tensor, scale: Any, row: Potential, col: Potential, v: Tensor | None, u: Tensor | None, /
    ) -> tuple[Tensor, Tensor]: ...
    def plan_subtract_(
        self,
        x: Tensor,
        scores: Tensor,
        scale: Any,
        row: Potential,
        col: Potential,
        u: Tensor | None,
        v: Tensor | None,
        /,
    ) -> None: ...
