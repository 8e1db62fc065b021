"""Shared memory, in which worker processes hand their batches to the main process; containers often have only 64 MB."""

import errno
import os
from pathlib import Path

from torch import Tensor
from torch.utils.data import get_worker_info

from ..config import UserError
from ..distributed import World

FOLDER = Path("/dev/shm")
PREFETCHED = 2
"""Batches that each worker makes ahead of the main process: torch's default."""
MB = 2**20
"""Bytes in what Docker and df call a megabyte."""
CURE = (
    "Give the container more (docker run --shm-size 1g, or --ipc=host), or take fewer --data.workers, a smaller "
    "--data.batch-size, or --data.workers 0, which needs none"
)


def share(tensor: Tensor) -> Tensor:
    """Move the tensor to shared memory. Raises: UserError where there is too little; OSError or RuntimeError else."""
    try:
        return tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise UserError(
            f"{FOLDER} has no room for {tensor.nbytes / MB:.1f} MB more, {free() / MB:.1f} MB are free. {CURE}"
        ) from error


def send(*tensors: Tensor) -> list[Tensor]:
    """Tensors of a batch, which a worker moves to shared memory itself.

    Otherwise a thread of the worker's queue moves them, and where that fails it drops the batch without an error.
    """
    return [tensor if get_worker_info() is None else share(tensor) for tensor in tensors]


def free() -> float:
    """Bytes of free shared memory; infinity where the system has no /dev/shm, as on macOS."""
    try:
        state = os.statvfs(FOLDER)
    except OSError:
        return float("inf")
    return state.f_bavail * state.f_frsize


def bytes_of_batches(image: int, batch_size: int, workers: int, in_use: int, images: int) -> int:
    """Bytes of all batches that are in shared memory at once, of at most `images` images of `image` bytes each.

    in_use: batches that the main process holds.
    """
    return image * min((workers * PREFETCHED + in_use) * batch_size, images)


def check(needed: int, workers: int, world: World) -> None:
    """Compare free shared memory with what is needed: `needed` bytes on this rank, and those of the machine's ranks.

    Raises: UserError on every rank where the memory of one machine does not suffice.
    """
    if not workers:
        return
    # No rank goes on, and fills the memory with its own batches, before every rank has looked.
    ranks = world.gather((os.uname().nodename, free(), needed))
    for machine in {name for name, _, _ in ranks}:
        found = min(bytes_ for name, bytes_, _ in ranks if name == machine)
        needs = [bytes_ for name, _, bytes_ in ranks if name == machine]
        if found < sum(needs):
            where = f"{workers} workers" + (f" on each of {len(needs)} ranks" if len(needs) > 1 else "")
            raise UserError(
                f"{FOLDER} has {found * 10 // MB / 10} MB of free shared memory, and the batches of {where} need "
                f"{-(-sum(needs) * 10 // MB) / 10} MB. {CURE}"
            )
