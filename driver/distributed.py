"""The ranks of a run: one process alone, or those that torchrun has started, each with its own device."""

import gc
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its defaults would hold the group that is there when DDP imports it
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """`size` ranks, of which this is `rank`; the first one alone prints, evaluates and writes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: dist.Store | None = None
    """Small things that pass between ranks, before the process group is there and after it has failed."""

    @classmethod
    def from_environment(cls) -> "World":
        """As torchrun describes it in environment variables; without them, one process alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        store, rank, size = next(dist.rendezvous("env://"))
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def from_first(self, name: str, make: Callable[[], T]) -> T:
        """What `make()` gives on the first rank. Where it ends there, the others end too, without a word."""
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
        """The device of that name, seen to work; of several GPUs each rank takes its own. Raises: UserError."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if self.size > 1 and name.startswith("cuda"):
            if name != "cuda":
                raise UserError(
                    f"--run.device {name}: one device for {self.size} ranks; give cuda, and each takes its own"
                )
            name = f"cuda:{self.local_rank}"
        try:
            return torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"--run.device {name}: {str(error).splitlines()[0]}") from error

    def start(self, device: torch.device) -> None:
        """Take the device; with several ranks the process group too, NCCL between GPUs, gloo between CPUs."""
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
        )

    def end(self) -> None:
        """Wait for all ranks, then leave the group: gloo may abort where a rank leaves another behind.

        Nothing may hold the group any more, as DDP's modules do: its threads end with it, and one that still lets go
        of a tensor when Python ends would abort the process.
        """
        if dist.is_initialized():
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()

    def abandon(self, code: int) -> None:
        """End this process at once with exit code `code`, if a process group exists; otherwise return.

        For a run that has failed on some rank: a barrier would wait for ranks that never reach it. The interpreter is
        not shut down, since gloo's threads may still hold tensors then, which aborts the process with SIGABRT.
        """
        if not dist.is_initialized():
            return
        for worker in multiprocessing.active_children():  # data-loader workers, which a normal exit would terminate
            worker.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, its gradients averaged over ranks."""
        return network if self.store is None else DistributedDataParallel(network)

    def mean(self, x: Tensor) -> Tensor:
        """x <- its mean over ranks."""
        if self.store is not None:
            dist.all_reduce(x)
            x /= self.size
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so on one of the ranks. Waits for the device where there are several."""
        if self.store is None:
            return flag
        flags = torch.tensor(int(flag), device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def sum(self, x: Tensor) -> Tensor:
        """x <- its sum over ranks."""
        if self.store is not None:
            dist.all_reduce(x)
        return x

    def gather(self, value: T) -> list[T]:
        """What each rank has, in their order. Small things: they are pickled."""
        if self.store is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def broadcast(self, x: Tensor, rank: int) -> Tensor:
        """That rank's x; the ranks' may differ in their number of rows."""
        if self.store is None:
            return x
        rows = torch.tensor(len(x), device=x.device)
        dist.broadcast(rows, rank)
        x = x.contiguous() if rank == self.rank else x.new_empty(int(rows), *x.shape[1:])
        dist.broadcast(x, rank)
        return x

    def share_buffers(self, network: nn.Module) -> None:
        """Those of the first rank, whose checkpoint it is, to all: norms' statistics are each rank's own images'."""
        if self.store is not None:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def join(self, x: Tensor) -> Tensor:
        """(n, k) of every rank -> (n, W*k)."""
        if self.store is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)

    def interleaved(self, share: Tensor, total: int) -> Tensor:
        """(total, k) of which rank r has brought rows r, r + W, r + 2*W and so on."""
        if self.store is None:
            return share
        longest = -(-total // self.size)
        padded = torch.cat([share, share.new_zeros(longest - len(share), share.shape[1])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:total]

    def first_to_fail(self) -> bool:
        """Whether no other rank has asked: what several ranks meet is said once."""
        return self.store is None or self.store.add("failures", 1) == 1

    def failed(self) -> bool:
        """Whether a rank has failed, and said why."""
        return self.store is not None and self.store.add("failures", 0) > 0
