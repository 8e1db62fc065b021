"""Normalisation of embeddings shared by the GPU backends."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import multiply
from .interface import BIAS_COLUMNS, LOG2_E, CommonPart, Potential, UnitRows


@dataclass(frozen=True)
class Reading:
    """One reading of embeddings x, and the tensors that it fills; `half_rows` and UnitRows say what they hold.

    norm is filled always, read if given, and all others only with a centre. scale: of the potential `row`, which is
    2^(scale * <unit_i, centre>).
    """

    x: Tensor
    norm: Tensor
    read: Tensor | None = None
    centre: Tensor | None = None
    bias: Tensor | None = None
    row: Potential | None = None
    scale: float = 0.0
    message: Tensor | None = None


class UnitRowsKernels:
    """Row kernels of embeddings: allocate the results that a backend's own methods fill."""

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        """Write a b, or out + a b with `add`, to out (m, n) float32, as `precision.multiply`."""
        return multiply(a, b, out, add=add)

    def normalize(self, x: Tensor) -> UnitRows:
        """L2-normalise x (m, D) or (V, B, D), any float type and strides, into view-major unit rows (m, D) float32."""
        read = torch.empty(x.shape[:-1].numel(), x.shape[-1], dtype=torch.float32, device=x.device)
        norm = _empty_norms(x)
        self._read_rows(Reading(x, norm, read))
        return UnitRows(read, norm, x)

    def mean_row(self, x: Tensor) -> Tensor:
        """Mean (D,) float32 of rows x (m, D) or (V, B, D), any float type and strides."""
        return self._mean_row(x, None, 1)

    def mean_unit_row(self, x: Tensor, ranks: int = 1) -> Tensor:
        """Mean (D,) float32 of the unit rows of x, which are not written, divided by the number of ranks.

        The sum over ranks, which have as many rows each, is the mean of all rows.
        """
        norm = _empty_norms(x)
        self._read_rows(Reading(x, norm))
        return self._mean_row(x, norm, ranks)

    def half_rows(
        self, x: Tensor, centre: Tensor, epsilon: float, message: Tensor | None = None
    ) -> tuple[UnitRows, Potential]:
        """L2-normalise x, subtract `centre` (D,), and store fp16 rows times HALF_UNIT, with their bias.

        message (n, columns) fp16, contiguous, or None: also filled with the first n rows: features, zeros, and the
        float32 bias in the last BIAS_COLUMNS.
        Also returns the row potential exp(<unit_i, centre>/eps), from which Sinkhorn on centred keys starts.
        """
        assert centre.is_contiguous()
        if message is not None:
            assert message.is_contiguous() and x.shape[-1] <= message.shape[1] - BIAS_COLUMNS
        norm = _empty_norms(x)
        read = torch.empty(len(norm), x.shape[-1], dtype=torch.float16, device=x.device)
        bias, row = torch.empty(len(norm), dtype=torch.float32, device=x.device), Potential.empty(len(norm), x.device)
        self._read_rows(Reading(x, norm, read, centre, bias, row, LOG2_E / epsilon, message))
        return UnitRows(read, norm, x, bias), row

    def centre_potential(
        self, read: Tensor, centre: Tensor, epsilon: float, centred: Tensor | None = None
    ) -> Potential:
        """Row potential exp(<unit_i, centre>/eps) of float32 rows (m, D), from which Sinkhorn on centred keys starts.

        centred  (n, D), out: the first n rows less the centre, for rows that are keys
        """
        assert centre.is_contiguous()
        row = Potential.empty(len(read), read.device)
        self._centre_potential(read, centre, LOG2_E / epsilon, row)
        if centred is not None:
            torch.sub(read[: len(centred)], centre, out=centred)
        return row

    def project_(self, d: Tensor, rows: UnitRows, factor: float = 1.0, common: CommonPart | None = None) -> Tensor:
        """Gradient of the L2 normalisation, in place: d (m, D) <- factor * (d - unit <unit, d>) / norm.

        `common` is added to d before. A row with a norm below 1e-12 gets 0.
        """
        assert d.is_contiguous()
        if common is not None:
            d[: len(common.weights)].addr_(common.weights, common.row, alpha=common.factor)
        self._project(d, rows, factor)
        return d

    def _read_rows(self, to: Reading) -> None:
        """Fill the tensors of a reading."""
        raise NotImplementedError

    def _centre_potential(self, read: Tensor, centre: Tensor, scale: float, row: Potential) -> None:
        """Write 2^(scale * <unit_i, centre>) to `row`."""
        raise NotImplementedError

    def _project(self, d: Tensor, rows: UnitRows, factor: float) -> None:
        """`project_` without a common part."""
        raise NotImplementedError

    def _mean_row(self, x: Tensor, norm: Tensor | None, ranks: int) -> Tensor:
        """Mean (D,) float32 of x_i / max(norm_i, 1e-12), divided by `ranks`; norm None: of x_i."""
        raise NotImplementedError


def _empty_norms(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1].numel(), dtype=torch.float64, device=x.device)
