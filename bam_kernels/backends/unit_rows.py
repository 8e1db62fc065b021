"""What the backends for GPUs share of reading embeddings."""

import torch
from torch import Tensor

from .interface import LOG2_E, Potential, UnitRows


class UnitRowsKernels:
    """Allocates what a backend's `_read_rows` fills; nothing waits for the device."""

    def normalize(self, x: Tensor) -> UnitRows:
        """x (m, D) or (V, B, D) of any float type and strides -> unit rows (m, D) float32, norms; view-major."""
        rows = _empty_rows(x, torch.float32)
        self._read_rows(rows, None, None, 0.0)
        return rows

    def half_rows(self, x: Tensor, centre: Tensor, epsilon: float) -> tuple[UnitRows, Potential]:
        """As `normalize`, but the unit rows, less `centre` (D,), are fp16 times HALF_UNIT, with their bias; and the row
        potential exp(<unit_i, centre>/eps) that scores against centred keys start from."""
        assert centre.is_contiguous()
        rows = _empty_rows(x, torch.float16)
        m = len(rows.read)
        rows = rows._replace(bias=torch.empty(m, dtype=torch.float32, device=x.device))
        row = Potential.empty(m, x.device)
        self._read_rows(rows, centre, row, LOG2_E / epsilon)
        return rows, row

    def _read_rows(self, rows: UnitRows, centre: Tensor | None, row: Potential | None, scale: float) -> None:
        """Fill read and norm from x; with a centre also bias, and the potential 2^(scale * <unit_i, centre>)."""
        raise NotImplementedError


def _empty_rows(x: Tensor, dtype: torch.dtype) -> UnitRows:
    m, d = x.shape[:-1].numel(), x.shape[-1]
    read = torch.empty(m, d, dtype=dtype, device=x.device)
    return UnitRows(read, torch.empty(m, dtype=torch.float64, device=x.device), x)
