"""Addresses of tensors for compiled kernels, with checks of dtype and device, which kernels cannot check."""

from collections.abc import Collection

import torch
from torch import Tensor

from .interface import Potential

FLOAT32 = (torch.float32,)
FLOAT64 = (torch.float64,)
INT16 = (torch.int16,)
BYTES = (torch.uint8,)
SCORES = (torch.float32, torch.int16)


def address(x: Tensor | None, device: torch.device, dtypes: Collection[torch.dtype] = FLOAT32) -> int:
    """Address of the first element of x; 0 for None and for a tensor without elements.

    Raises: TypeError if x is not on the device of the kernel, or its dtype is not one of `dtypes`.
    """
    if x is None:
        return 0
    if x.device != device or x.dtype not in dtypes:
        raise TypeError(
            f"a kernel on {device} takes a tensor of {' or '.join(map(str, dtypes))} there, "
            f"got one of {x.dtype}, shape {tuple(x.shape)}, on {x.device}"
        )
    return x.data_ptr() if x.numel() else 0


def first_address(x: Tensor) -> int:
    """Address of the first element of x, without a check: kernels get addresses from `address`."""
    return x.data_ptr()


def storage_address(x: Tensor) -> int:
    """Address of the memory that x is a view of; 0 if it has none."""
    return x.untyped_storage().data_ptr()


def extent_bytes(x: Tensor) -> int:
    """Bytes of memory from the first element of x to the end of its last one; 0 for a tensor without elements."""
    if not x.numel():
        return 0
    return x.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))


def pair(potential: Potential | None, device: torch.device) -> tuple[int, int]:
    """Addresses of a potential's exponent and mantissa; 0 and 0 for None."""
    if potential is None:
        return 0, 0
    return address(potential.exponent, device), address(potential.mantissa, device)


def scores_of(
    s: Tensor | None, device: torch.device, dtypes: Collection[torch.dtype] = SCORES
) -> tuple[int, bool, int, int]:
    """Scores as kernels take them: address, whether int16 (fixed point), strides of views and rows; 0 for None."""
    if s is None:
        return 0, False, 0, 0
    assert s.stride(-1) == 1
    return address(s, device, dtypes), s.dtype == torch.int16, s.stride(0) if s.dim() == 3 else 0, s.stride(-2)
