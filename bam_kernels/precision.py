"""The arithmetic of matrix products, set for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

LEAST_EPSILON_OF_FIXED_SCORES = 0.003


class _Options(Protocol):
    @property
    def precision(self) -> str: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def regather(self) -> bool: ...


def is_sixteen_bit(backend: str, options: _Options, dtype: torch.dtype) -> bool:
    """Whether rows, keys and the scores' gradient are fp16 and scores int16 fixed point; from options alone.

    On GPUs, where reading them is what takes the time: for 16-bit input, and for float32 input where torch's flag
    lets its products be rounded. The error of scores is a multiple of 1/epsilon. The CPU's kernels gain nothing by it.
    The step of fixed point follows from all keys, which `regather` does not hold.
    """
    if backend == "cpu" or options.precision == "exact" or options.regather:
        return False
    if options.epsilon < LEAST_EPSILON_OF_FIXED_SCORES:
        return False
    return dtype in (torch.float16, torch.bfloat16) or torch.get_float32_matmul_precision() != "highest"


@contextmanager
def product_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products outside autocast; "exact": in float32 whatever torch's global flag, "default": as it says.

    fp16 products add in float32. The flags are process-wide and are restored on leaving, also after an exception.
    """
    flag = torch.get_float32_matmul_precision()
    adds_in_half = torch.backends.cuda.matmul.allow_fp16_accumulation
    with torch.autocast(device.type, enabled=False):
        try:
            if adds_in_half:
                torch.backends.cuda.matmul.allow_fp16_accumulation = False
            if precision == "exact" and flag != "highest":
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            if torch.get_float32_matmul_precision() != flag:
                torch.set_float32_matmul_precision(flag)
            if adds_in_half:
                torch.backends.cuda.matmul.allow_fp16_accumulation = True


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out (m, n) float32 = a b, or out + a b; a (m, k) and b (k, n) both float32 or both fp16."""
    if a.dtype == torch.float32:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # which has no product of fp16 with a float32 result
        return multiply(a.float(), b.float(), out, add=add)
    if add:
        return out.add_(torch.mm(a, b, out_dtype=torch.float32))
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
