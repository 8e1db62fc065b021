"""Interface between engines and backends: row kernels on slabs of scores, their arguments and results.

Scores are (m, N) or (views, images, N), float32 or int16 fixed point, with contiguous columns; a masked entry is the
backend's masked score. `scale` and `step` are a Number: a float or, on GPUs, a scalar on the device. Docstrings in
cpu.py say what each method of RowKernels computes.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..layout import Layout

LOG2_E = 1 / math.log(2)
FIXED_STEPS = 32000.0
HALF_UNIT = 64.0  # factor of fp16 unit rows: keeps small entries within fp16's normal numbers
# Factor of a A - Pbar, which is within [-1, 1], when stored in fp16: keeps small entries within the normal numbers.
GRADIENT_FACTOR = 16384.0


@dataclass(frozen=True)
class DeviceNumber:
    """A number as factor * scalar, scalar (1,) float32 on the device: kernels multiply, so no launch is needed."""

    factor: float
    scalar: Tensor

    def __mul__(self, x: float) -> "DeviceNumber":
        return DeviceNumber(self.factor * x, self.scalar)

    __rmul__ = __mul__


# Type of a scale or step of scores.
Number = float | DeviceNumber


def number(x: Number) -> tuple[float, Tensor | None]:
    """Split x into a float factor and a device scalar, or None for 1."""
    if not isinstance(x, DeviceNumber):
        assert not isinstance(x, Tensor)  # reading a tensor would wait for the device
        return float(x), None
    assert x.scalar.numel() == 1
    return x.factor, x.scalar


BIAS_COLUMNS = 2  # fp16 columns of a message to other ranks that hold one float32


class UnitRows(NamedTuple):
    """Unit rows x_i / max(|x_i|, 1e-12) for products, and what the gradient of the normalisation needs.

    read   (m, D), float32 unit rows; or fp16, (unit_i - centre) * HALF_UNIT
    norm   (m,) float64, |x_i|
    x      the rows that `project_` reads: x itself, or unit rows
    bias   (m,) float32 for fp16 rows, else None: <unit_i - centre, centre> * HALF_UNIT**2, to be added to products of
           centred rows with row i as a key
    """

    read: Tensor
    norm: Tensor
    x: Tensor
    bias: Tensor | None = None

    def views(self, count: int, B: int) -> "UnitRows":
        """The rows of the first `count` views, of B images each."""
        m = count * B
        bias = self.bias[:m] if self.bias is not None else None
        return UnitRows(self.read[:m], self.norm[:m], first_views(self.x, count, B), bias)


class CommonPart(NamedTuple):
    """A multiple of one vector for each of the first n rows of a gradient: factor * weights_i * row is added to row i.

    weights (n,) and row (D,) are float32 and contiguous.
    """

    weights: Tensor
    row: Tensor
    factor: float = 1.0


def first_views(x: Tensor, count: int, B: int) -> Tensor:
    """The first `count` views of x (V*B, D) or (V, B, D), of B images each."""
    return x[: count if x.dim() == 3 else count * B]


class Positives(NamedTuple):
    """Positives to mask in a slab: row i shows image (first + i % period) % B.

    period: rows of each view in the slab.
    """

    layout: Layout
    first: int
    period: int


class Potential(NamedTuple):
    """Potential 2^exponent * mantissa of each row or column; the exponent is an integer stored as float32."""

    exponent: Tensor
    mantissa: Tensor

    @staticmethod
    def one(n: int, device: torch.device | str = "cpu") -> "Potential":
        zero = torch.zeros(n, dtype=torch.float32, device=device)
        return Potential(zero, torch.ones_like(zero))

    @staticmethod
    def empty(n: int, device: torch.device) -> "Potential":
        return Potential(*torch.empty(2, n, dtype=torch.float32, device=device).unbind())

    def rows(self, first: int, last: int) -> "Potential":
        return Potential(self.exponent[first:last], self.mantissa[first:last])

    def natural_log(self) -> Tensor:
        """Natural logarithm of the potential, in float64."""
        return (self.exponent.double() + self.mantissa.double().log2()) / LOG2_E


@dataclass(frozen=True)
class MatchSums:
    """Sums of a match: each image's terms of the loss, of the target entropy and of the source entropy, in nats.

    images: (3, images), or (3, 1) already summed over images, of any float type. The properties are sums over images,
    float64 scalars.
    """

    images: Tensor

    @property
    def loss(self) -> Tensor:
        return self.images[0].sum(dtype=torch.float64)

    @property
    def target_entropy(self) -> Tensor:
        return self.images[1].sum(dtype=torch.float64)

    @property
    def source_entropy(self) -> Tensor:
        return self.images[2].sum(dtype=torch.float64)


class RowKernels(Protocol):
    """The row kernels of one backend; cpu.py documents the methods."""

    backend: str

    def recorded(self, recorder: Any) -> "RowKernels": ...
    def multiply(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor: ...
    def normalize(self, x: Tensor) -> UnitRows: ...
    def mean_row(self, x: Tensor, /) -> Tensor: ...
    def centre_potential(
        self, read: Tensor, centre: Tensor, epsilon: float, centred: Tensor | None = None
    ) -> Potential: ...
    def project_(self, d: Tensor, rows: UnitRows, factor: float = 1.0, common: CommonPart | None = None) -> Tensor: ...
    def symmetrize_(self, G: Tensor) -> Tensor: ...
    def mask_positives_(self, scores: Tensor, positives: Positives, /) -> Tensor: ...
    def column_lse(
        self, scores: Tensor, scale: Any, row: Potential, shift: Tensor, sums: Tensor, /, accumulate: bool
    ) -> None: ...
    def reciprocal_potential(self, shift: Tensor, sums: Tensor) -> Potential: ...
    def column_totals(self, shift: Tensor, sums: Tensor, common: int) -> Tensor: ...
    def total_potential(self, total: Tensor, common: int) -> Potential: ...
    def divide_potential_(self, col: Potential, c: Tensor) -> None: ...
    def sinkhorn_pass(
        self,
        scores: Tensor,
        scale: Any,
        row: Potential,
        col: Potential,
        c: Tensor,
        /,
        accumulate: bool,
        divide: bool = False,
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
        gradient_factor: float = 1.0,
    ) -> MatchSums: ...
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


class SixteenBitKernels(RowKernels, Protocol):
    """The row kernels of a GPU backend, which also support fp16 rows, int16 scores and score gradients in fp16."""

    def mean_unit_row(self, x: Tensor, ranks: int = 1) -> Tensor: ...
    def half_rows(
        self, x: Tensor, centre: Tensor, epsilon: float, message: Tensor | None = None
    ) -> tuple[UnitRows, Potential]: ...
    def product_step(
        self, centre: Tensor, key_bias: Tensor, row_bias: Tensor, other_bias: Tensor | None = None
    ) -> DeviceNumber: ...
    def quantize(
        self, scores: Tensor, step: Any, out: Tensor, positives: Positives | None = None, bias: Tensor | None = None
    ) -> Tensor: ...
    def finish_scores(
        self,
        scores: Tensor,
        bias: Tensor | None,
        step: Any,
        out: Tensor,
        positives: Positives | None,
        scale: Any,
        row: Potential,
        shift: Tensor,
        sums: Tensor,
        *,
        accumulate: bool,
    ) -> None: ...
