"""The CUDA kernels of csrc/cuda. No GPU has run them yet, so `backend="auto"` does not choose them.

They prepare embeddings for 16-bit products; the loss has no CUDA kernels yet.
"""

import torch
from torch import Tensor

from .extension import _C, import_error

UNIT_SCALE = 64.0  # kUnitScale in csrc/cuda/cuda.h
_INPUT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unavailable() -> str | None:
    """Why these kernels cannot run, or None."""
    if _C is None:
        return f"the extension is not built ({import_error}); install it with nvcc: pip install -e ."
    if not _C.with_cuda:
        return "the extension was built without CUDA; install it where nvcc is found: pip install -e ."
    if not devices():
        return "no CUDA device, or no driver"
    return None


def devices() -> list[dict]:
    """Name, capability, multiprocessors and memory of the devices of this process; empty where there is none."""
    return _C.cuda_devices() if _C is not None and _C.with_cuda else []


def architectures() -> str:
    """What the CUDA kernels were compiled for; empty without them."""
    return _C.cuda_architectures() if _C is not None and _C.with_cuda else ""


def unit_rows(x: Tensor, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """64 * (x_i / max(|x_i|, 1e-12) - centre) in fp16, and 1/|x_i|, 0 where |x_i| < 1e-12.

    x (m, D) float32, float16 or bfloat16 with contiguous rows, any row stride; centre (D,) float32 or None: 0.
    Returns (m, D) float16 and (m,) float32. One read of x for D <= 4096. Runs on the current stream.
    Raises: ValueError, TypeError on a shape, dtype or device that does not match; RuntimeError if the launch fails.
    """
    reason = unavailable()
    if reason:
        raise ValueError(f"unit_rows: cannot run here: {reason}")
    if x.dim() != 2 or x.device.type != "cuda" or x.stride(1) != 1:
        raise ValueError(
            f"unit_rows: x must be (m, D) on a CUDA device, rows contiguous, got {tuple(x.shape)} {x.device}"
        )
    if x.dtype not in _INPUT_TYPES:
        raise TypeError(f"unit_rows: x must be float32, float16 or bfloat16, got {x.dtype}")
    m, d = x.shape
    if centre is not None and (centre.shape != (d,) or centre.dtype != torch.float32 or centre.device != x.device):
        raise ValueError(f"unit_rows: centre must be ({d},) float32 on {x.device}, got {tuple(centre.shape)}")
    unit = torch.empty(m, d, dtype=torch.float16, device=x.device)
    inverse_norm = torch.empty(m, device=x.device)
    _C.cuda_unit_rows(
        x.data_ptr(),
        _INPUT_TYPES[x.dtype],
        m,
        d,
        x.stride(0),
        centre.data_ptr() if centre is not None else 0,
        unit.data_ptr(),
        inverse_norm.data_ptr(),
        x.device.index or 0,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return unit, inverse_norm
