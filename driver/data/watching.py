"""Progress of worker processes, which the main process watches while it waits for a batch.

A worker cannot watch itself: one that is stopped, or waits for a disk, runs no code and gets no alarm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .shared_memory import share

PATIENCE_S = 600
"""Seconds without progress of any worker, while the main process waits for a batch, after which the run ends."""
CHECK_S = 5.0
"""Seconds between looks at the workers while the main process waits for a batch."""


class Watch:
    """What each worker does, in shared memory, and the patience of the main process with workers that do nothing."""

    def __init__(self, workers: int, patience_s: float = PATIENCE_S) -> None:
        self.workers, self.patience_s = workers, patience_s
        self.state = torch.full((workers, 2), -1)  # index of the worker's image or -1, number of images begun
        self.seen, self.idle_s = self.state.tolist(), 0.0
        if workers:
            share(self.state)

    @property
    def busy_with(self) -> list[int]:
        """Index of the image that each worker is busy with; -1 for none."""
        return self.state[:, 0].tolist()

    @contextmanager
    def image(self, index: int) -> Iterator[None]:
        """Context of the work on image `index`."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        state = self.state[worker.id]
        state[0] = index
        state[1] += 1
        try:
            yield
        finally:
            state[0] = -1

    def waited(self, found: bool, seconds: float) -> None:
        """Note whether the main process has got a batch in so many seconds. Raises: Hanging at the end of patience.

        Waits are added up, rather than times compared: a run that is stopped with its workers can go on later.
        """
        now = self.state.tolist()
        self.idle_s = 0.0 if found or now != self.seen else self.idle_s + seconds
        self.seen = now
        if self.idle_s >= self.patience_s:
            raise Hanging


class Hanging(Exception):
    """Exception of a main process whose workers make no progress."""


class WatchedBatches(_MultiProcessingDataLoaderIter):
    """Batches of worker processes, whose progress is looked at while the main process waits."""

    def _try_get_data(self, timeout: float = CHECK_S) -> tuple[bool, Any]:
        found, data = super()._try_get_data(timeout)
        self._dataset.watch.waited(found, timeout)
        return found, data


class WatchedLoader(DataLoader):
    """DataLoader that watches its workers."""

    def _get_iterator(self) -> Any:
        return WatchedBatches(self) if self.num_workers else super()._get_iterator()


def state_of(process: int) -> str:
    """State of a process by its letter in /proc, such as T for a stopped one; empty where there is no /proc."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
