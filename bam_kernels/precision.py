"""The arithmetic of matrix products, set for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
