"""Batches from worker processes. A worker that fails or hangs ends the run with one clear error.

Workers are forked by a server process that has no threads: a fork of the run itself could wait for ever for a lock that
one of its threads held. A scheduler such as Slurm sends its signals to every process of the run. The main process saves
and ends, and needs its workers until then, so workers block these signals.
"""

import atexit
import errno
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from functools import cache
from multiprocessing import connection, forkserver, queues, resource_tracker
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import LostWorker, UserError
from ..distributed import kill_workers
from ..exits import StopSignal, lacks_memory
from .images import Source
from .shared_memory import CURE, PREFETCHED
from .unreadable import MEMORY, TOO_MANY_FILES
from .watching import Hanging, Watch, WatchedLoader, state_of

NO_FILE, NOT_SENT = 71, 72
"""Exit codes of a worker that cannot send a batch to the main process: too many open files, or another fault."""
CRASH = "a crash in the decoding of this image is likely: repair or remove it"
ADVICE = {
    NO_FILE: TOO_MANY_FILES,
    NOT_SENT: "it could not send a batch, as told above",
    255: f"the process that starts workers may be gone, as where memory is short: {MEMORY}",
    -signal.SIGKILL: f"the system does so where memory is short: {MEMORY}",
    -signal.SIGBUS: f"shared memory may be full. {CURE}",
    **dict.fromkeys((-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE), CRASH),
}
"""What to say of a worker that has ended, by its exit code."""

Key = int | tuple[int, int]
"""Place of an image among the images read; or a number from which random changes follow, and the place."""


class ImagesOf(Dataset):
    """Images of a source, by their place among `indices`, as worker processes read them."""

    def __init__(self, source: Source, indices: Tensor, workers: int) -> None:
        self.source, self.indices, self.watch = source, indices.tolist(), Watch(workers)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Any:
        number, place = key if isinstance(key, tuple) else (None, key)
        with self.watch.image(self.indices[place]):
            return self.make(place, number)

    def make(self, place: int, number: int | None) -> Any:
        """Item of a batch from the image at `place`; its random changes follow from `number`."""
        raise NotImplementedError

    @staticmethod
    def collate(items: list[Any]) -> Any:
        """Batch of these items, its tensors in shared memory where this process is a worker."""
        raise NotImplementedError


class Loader:
    """Batches of a data set for `device`, in its own order or in that of `keys`; `stay`: workers outlive an epoch."""

    def __init__(
        self,
        dataset: ImagesOf,
        batch_size: int,
        device: torch.device,
        keys: Sampler | Sequence[Key] | None = None,
        stay: bool = False,
    ) -> None:
        self.dataset, workers = dataset, dataset.watch.workers
        self.loader: DataLoader = WatchedLoader(
            dataset,
            batch_size,
            sampler=keys,
            collate_fn=dataset.collate,
            num_workers=workers,
            worker_init_fn=_prepare_worker,
            prefetch_factor=PREFETCHED if workers else None,
            multiprocessing_context=_fork_server() if workers else None,
            persistent_workers=stay and workers > 0,
            pin_memory=device.type == "cuda",
            generator=Generator(),  # its own, so that loading does not advance torch's
        )

    def __iter__(self) -> Iterator[Any]:
        """Batches, one after the other.

        Raises: UserError in place of an error that follows from the end of a worker or from a limit of the system.
        """
        if not self.dataset.watch.workers:
            yield from self.loader
            return
        batches: Any = None
        try:
            batches = iter(self.loader)
            yield from batches
        except (UserError, Hanging, RuntimeError, OSError, EOFError, MemoryError) as error:
            workers = getattr(batches or self.loader._iterator, "_workers", [])
            found = self._found(error, workers)
            for worker in workers:  # a worker that hangs would keep this process from its end
                worker.kill()
                worker.join(timeout=5)
            if found is None:
                raise
            raise found from error

    def _found(self, error: Exception, workers: list[Any]) -> UserError | None:
        """Error that tells the user what `error` means; None where it is not for the user to put right."""
        text = str(error)
        if isinstance(error, UserError):
            return UserError(text.rsplit("UserError: ", 1)[-1].strip())  # a worker puts its traceback before it
        if isinstance(error, Hanging):
            return LostWorker(self._hanging(workers))
        if lacks_memory(error) or "unable to mmap" in text:
            return LostWorker(f"a data-loading worker has too little memory: {MEMORY}")
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "open files" in text or "ancdata" in text:
            return LostWorker(TOO_MANY_FILES)
        if "in DataLoader worker" in text or not workers:
            return None
        # A worker that is ending breaks its connections before it is seen to have ended.
        connection.wait([worker.sentinel for worker in workers], timeout=1)
        for worker, index in zip(workers, self.dataset.watch.busy_with, strict=True):
            if worker.exitcode is not None:
                return LostWorker(_obituary(worker.exitcode, self._name(index)))
        return None

    def _name(self, index: int) -> str | None:
        return None if index < 0 else self.dataset.source.name(index)

    def _hanging(self, workers: list[Any]) -> str:
        """Message about workers that make no progress: the ones that are stopped, else those with an image, or all."""
        watch = self.dataset.watch
        each = list(zip(workers, watch.busy_with, strict=True))
        stopped = [pair for pair in each if state_of(pair[0].pid) == "T"]
        worker, index = next(iter(stopped or [pair for pair in each if pair[1] >= 0] or each))
        where = f", which reads {self._name(index)}," if index >= 0 else ""
        why = "was stopped by a signal" if stopped else "hangs: is its file system reachable, does the image decode?"
        return (
            f"data-loading workers have made no progress for {watch.patience_s:g} s: "
            f"worker {each.index((worker, index))} (process {worker.pid}){where} {why}"
        )


def _obituary(code: int, image: str | None) -> str:
    """Message about a worker that ended with this exit code while it was busy with an image."""
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    where = f" while it read {image}" if image else ""
    return (
        f"a data-loading worker was ended {how}{where}; {ADVICE.get(code, 'its own message is above, if it left one')}"
    )


def _prepare_worker(worker: int) -> None:
    """Make this worker end where it cannot send a batch: Python would drop the batch, and the run wait for ever.

    It ends with the run, too, as where the system kills that: torch's workers watch their parent alone, which here is
    the server that forks them, and the server waits for their end.
    A thread that hands over shared memory prints no traceback where the run has ended.
    """

    def end(error: BaseException, batch: Any) -> None:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            os._exit(NO_FILE)
        traceback.print_exception(error)
        os._exit(NOT_SENT)

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            sys.__excepthook__(kind, error, trace)

    def end_with(run: Any) -> None:
        run.join()
        os._exit(1)

    if (run := multiprocessing.parent_process()) is not None:
        threading.Thread(target=end_with, args=[run], daemon=True).start()
    queues.Queue._on_queue_feeder_error = staticmethod(end)  # the hook that Python has for this
    sys.excepthook = show


@cache
def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2"])
    # Processes started meanwhile inherit the blocked signals for good; the run gets a blocked signal later.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.NAMES)
    resource_tracker.ensure_running()  # a server needs it, and Python unblocks SIGTERM when it starts it
    signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.NAMES)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(kill_workers)  # Python would ask them by SIGTERM and wait for ever
    return context
