"""The arithmetic of matrix products, set for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEAST_EPSILON_OF_FIXED_SCORES = 0.003


def scores_are_fixed(backend: str, precision: str, epsilon: float, dtype: torch.dtype) -> bool:
    """Whether scores are cached as int16 fixed point; from options alone, never from what is free.

    On GPUs, where reading them is what takes the time: for 16-bit input, and for float32 input where torch's flag
    lets its products be rounded. Their error is a multiple of 1/epsilon. The CPU's kernels gain nothing by it.
    """
    if backend == "cpu" or precision == "exact" or epsilon < LEAST_EPSILON_OF_FIXED_SCORES:
        return False
    return dtype in (torch.float16, torch.bfloat16) or torch.get_float32_matmul_precision() != "highest"


@contextmanager
def product_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products outside autocast; "exact": in float32 whatever torch's global flag, "default": as it says.

    The flag is process-wide and is restored on leaving, also after an exception.
    """
    with torch.autocast(device.type, enabled=False):
        flag = torch.get_float32_matmul_precision()
        if precision != "exact" or flag == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(flag)
