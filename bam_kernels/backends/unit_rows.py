"""Normalisation of embeddings shared by the GPU backends."""

import torch
from torch import Tensor

from .interface import LOG2_E, Potential, UnitRows


class UnitRowsKernels:
    """Row kernels that normalise embeddings: allocate results that a backend's `_read_rows` fills."""

    def normalize(self, x: Tensor) -> UnitRows:
        """L2-normalise x (m, D) or (V, B, D), any float type and strides, into view-major unit rows (m, D) float32."""
        rows = _empty_rows(x, torch.float32)
        self._read_rows(rows, None, None, 0.0)
        return rows

    def half_rows(self, x: Tensor, centre: Tensor, epsilon: float) -> tuple[UnitRows, Potential]:
        """L2-normalise x, subtract `centre` (D,), and store fp16 rows times HALF_UNIT, with their bias.

        Also returns the row potential exp(<unit_i, centre>/eps), from which Sinkhorn on centred keys starts.
        """
        assert centre.is_contiguous()
        rows = _empty_rows(x, torch.float16)
        m = len(rows.read)
        rows = rows._replace(bias=torch.empty(m, dtype=torch.float32, device=x.device))
        row = Potential.empty(m, x.device)
        self._read_rows(rows, centre, row, LOG2_E / epsilon)
        return rows, row

    def _read_rows(self, rows: UnitRows, centre: Tensor | None, row: Potential | None, scale: float) -> None:
        """Fill rows.read and rows.norm from rows.x.

        With a centre, also fill rows.bias and the potential row = 2^(scale * <unit_i, centre>).
        """
        raise NotImplementedError


def _empty_rows(x: Tensor, dtype: torch.dtype) -> UnitRows:
    m, d = x.shape[:-1].numel(), x.shape[-1]
    read = torch.empty(m, d, dtype=dtype, device=x.device)
    return UnitRows(read, torch.empty(m, dtype=torch.float64, device=x.device), x)
