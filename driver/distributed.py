"""Ranks of a run: one process alone, or the processes that torchrun has started, each with its own device."""

import gc
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported before a group exists: its default arguments would keep one alive
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import UserError
from .messages.text import amount, first_line, listed, printable
from .ranks.environment import place_in
from .ranks.meeting import FAILURES, answer, meet, pause

T = TypeVar("T")
SILENCE = timedelta(minutes=30)
"""Longest wait for another rank in a collective: longer than what rank 0 alone does, or a worker's patience."""


@dataclass(frozen=True)
class World:
    """All `size` ranks of a run, as seen by rank `rank`. Only rank 0 prints to standard output and writes files."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: dist.Store | None = None
    """Key-value store for small messages between ranks, before the process group exists and after it has failed."""

    @classmethod
    def from_environment(cls) -> "World":
        """World that the variables of torchrun describe, once all its ranks are here; one process without them.

        Raises: UserError where a variable has no meaning, or where the ranks do not meet.
        """
        place = place_in(os.environ)
        return cls() if place is None else cls(place.rank, place.size, place.local_rank, meet(place))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def from_first(self, name: str, make: Callable[[], T]) -> T:
        """Result of `make()`, which only rank 0 calls. If it raises there, the other ranks exit silently."""
        if self.store is None:
            return make()
        if self.first:
            value = None
            try:
                value = make()
            finally:
                self.store.set(name, pickle.dumps(value))
            return value
        value = pickle.loads(self.store.get(name))
        return sys.exit(0) if value is None else value

    def choose_device(self, name: str) -> torch.device:
        """Torch device for --run.device `name`, after a trial on it. With several ranks, `cuda` is this rank's own GPU.

        Raises: UserError where the device does not work here.
        """
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if self.size > 1 and name.startswith("cuda"):
            if name != "cuda":
                raise UserError(
                    f"--run.device {name}: one device for {self.size} ranks; give cuda, and each takes its own"
                )
            name = f"cuda:{self._gpu()}"
        try:
            trial = torch.zeros(1, device=name)
            trial.tolist()  # the device `meta` makes tensors but has no numbers
            return trial.device
        except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
            raise UserError(f"--run.device {printable(name)}: {printable(first_line(error), 200)}") from error

    def _gpu(self) -> int:
        """Number of this rank's GPU. Raises: UserError where the machine has too few."""
        found = torch.cuda.device_count()
        if self.local_rank >= found > 0:
            raise UserError(
                f"LOCAL_RANK is {self.local_rank}, and this rank sees {amount(found, 'GPU')}: start one rank per GPU, "
                "set LOCAL_RANK=0 where each rank sees its own GPU alone, or give --run.device cpu"
            )
        return self.local_rank

    def start(self, device: torch.device) -> None:
        """Select the device and, with several ranks, start the process group: NCCL between GPUs, gloo between CPUs."""
        nccl = device.type == "cuda"
        if nccl:
            torch.cuda.set_device(device)
        if self.store is None:
            return
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.size,
            device_id=device if nccl else None,
            timeout=SILENCE,
        )

    def meet(self, name: str, seconds: float) -> None:
        """Wait until all ranks are at this place, whatever the time-out of the process group.

        Raises: UserError where a rank has failed, or is not here after `seconds`.
        """
        if self.store is None:
            return
        until = time.monotonic() + seconds
        try:
            self.store.set(f"{name} {self.rank}", "")
            self.store.add(name, 1)
            while answer(lambda: self.store.add(name, 0)) < self.size:
                if self.failed():
                    raise UserError(f"{name}: another rank has failed")
                if time.monotonic() > until:
                    late = [rank for rank in range(self.size) if not self.store.check([f"{name} {rank}"])]
                    raise UserError(f"{name}: after {seconds:.0f} s some ranks are not ready: {listed(late)}")
                time.sleep(pause(self.size))
        except dist.DistError as error:
            raise UserError(f"{name}: rank 0 has ended or been stopped") from error

    def end(self) -> None:
        """Wait for all ranks, then leave the process group: gloo may abort where one rank leaves before the others.

        No object may hold the group any more, as DDP modules do, hence the garbage collection. A thread of the group
        that releases a tensor while Python shuts down would abort the process.
        """
        if dist.is_initialized():
            kill_workers()  # else the collection waits 5 seconds for each, and torchrun allows 30 after a signal
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()

    def abandon(self, code: int) -> None:
        """End this process at once with exit code `code`, if a process group or a worker is left; otherwise return.

        For a run that has failed on some rank: a barrier would wait for ranks that never reach it. The interpreter is
        not shut down, since gloo's threads may still hold tensors, which would abort the process with SIGABRT. It would
        also wait for ever for a worker that hangs in a read, which nothing can end.
        """
        ended = kill_workers()
        if ended and not dist.is_initialized():
            return
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def parallel(self, network: nn.Module) -> nn.Module:
        """Network whose gradients are averaged over ranks in the backward pass."""
        return network if self.store is None else DistributedDataParallel(network)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x over ranks, in place."""
        if self.store is not None:
            dist.all_reduce(x)
            x /= self.size
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is true on any rank. With several ranks, waits for the device."""
        if self.store is None:
            return flag
        flags = torch.tensor(int(flag), device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over ranks, in place."""
        if self.store is not None:
            dist.all_reduce(x)
        return x

    def gather(self, value: T) -> list[T]:
        """Values of all ranks, in the order of ranks. For small values: they are pickled."""
        if self.store is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def broadcast(self, x: Tensor, rank: int) -> Tensor:
        """Tensor x of rank `rank`, on every rank. Ranks may have different numbers of rows."""
        if self.store is None:
            return x
        rows = torch.tensor(len(x), device=x.device)
        dist.broadcast(rows, rank)
        x = x.contiguous() if rank == self.rank else x.new_empty(int(rows), *x.shape[1:])
        dist.broadcast(x, rank)
        return x

    def share_buffers(self, network: nn.Module) -> None:
        """Broadcast rank 0's buffers: batch-norm statistics differ between ranks, and the checkpoint holds rank 0's."""
        if self.store is not None:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def join(self, x: Tensor) -> Tensor:
        """Tensors (n, k) of all W ranks, side by side: (n, W*k)."""
        if self.store is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)

    def interleaved(self, share: Tensor, total: int) -> Tensor:
        """Rows of all W ranks in one tensor (total, k): rank r gives rows r, r + W, r + 2*W and so on."""
        if self.store is None:
            return share
        longest = -(-total // self.size)
        padded = torch.cat([share, share.new_zeros(longest - len(share), share.shape[1])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:total]

    def first_to_fail(self) -> bool:
        """Whether this call is the first on any rank, so that an error that several ranks meet is printed once."""
        return self.store is None or self._failures(1) <= 1

    def failed(self) -> bool:
        """Whether a rank has failed; it has printed why."""
        return self.store is not None and self._failures(0) > 0

    def _failures(self, more: int) -> int:
        try:
            return answer(lambda: self.store.add(FAILURES, more))
        except dist.DistError:  # the store is gone with rank 0, which had it, or stopped with it
            return 0


def kill_workers() -> bool:
    """End the data-loading workers that are left: they block SIGTERM, so a request to end does not reach them.

    Returns whether all have ended.
    """
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=1)
    return not any(worker.is_alive() for worker in workers)
