"""Log lines of a run. Numbers of each step stay on the device; the host reads them at log lines only."""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from bam_kernels.stats import BAMStats

from . import checkpoint
from .config import UserError
from .distributed import World
from .history import Row
from .reporting import summary

T = TypeVar("T")
CURVES = ("loss", "target_entropy", "source_entropy", "column_residual", "uniform_loss", "collapse_gap")


class Log:
    """Progress bar and log lines of a run. A step has G images over all ranks; an epoch has `steps` steps."""

    def __init__(
        self, state: checkpoint.State, directory: Path, steps: int, epochs: int, warmup: float, G: int, world: World
    ) -> None:
        self.state, self.directory, self.steps, self.G, self.world = state, directory, steps, G, world
        self.warmup = warmup
        self.pending: list[Tensor] = []
        self.lr = 0.0
        total = steps * epochs
        self.bar = tqdm(
            total=total,
            initial=state.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # in a file, each update is a line
            disable=not world.first,
        )
        self.since = time.perf_counter()
        self.waited_s = 0.0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass on the batches; count the time until each batch arrives as waiting for data."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, lr: float, loss: Tensor, stats: BAMStats) -> None:
        """Keep the numbers of one step as pending, without waiting for the device."""
        self.lr = lr
        self.pending.append(torch.stack([loss.detach(), *(getattr(stats, name) for name in CURVES[1:])]))

    def line(self) -> None:
        """Log the mean of pending steps over ranks, and check for unreadable images.

        Waits for the device. Raises: UserError on every rank, after a bad loss or too many unreadable images.
        """
        self.numbers()
        self.settle()

    def numbers(self) -> None:
        """Log the mean of pending steps; do not check unreadable images.

        Raises: UserError on every rank, after a bad loss.
        """
        if not self.pending:
            return
        rows = self.world.mean(torch.stack(self.pending)).tolist()
        first = self.state.step - len(rows)
        for i, row in enumerate(rows):
            if not math.isfinite(row[0]):
                raise self.stopped(first + i, f"the loss is {row[0]}")
        mean = dict(zip(CURVES, (sum(column) / len(rows) for column in zip(*rows, strict=True)), strict=True))
        seconds = time.perf_counter() - self.since
        rate, waited = self.G * len(rows) / seconds, self.waited_s / seconds
        self.note("train", lr=self.lr, images_per_s=rate, data_wait=waited, **mean)
        self.warn()
        self.bar.set_postfix_str(
            f"loss {mean['loss']:.3f}, gap to collapse {mean['collapse_gap']:.3f}, lr {self.lr:.1e}, "
            f"{rate:.0f} images/s, {waited:.0%} waiting for data",
            refresh=False,
        )
        self.bar.update(len(rows))
        self.pending.clear()
        self.restart_clock()

    def note(self, kind: str, **values: float | str) -> Row:
        """Add a row with these values to the history, at the current step."""
        return self.state.history.add(kind, self.state.step, self.state.step / self.steps, **values)

    def computed_by(self, way: str) -> None:
        """Add a row to the history where the way in which the loss is computed changes, or is new to the history.

        After a change, rank 0 prints a line.
        """
        before = self.state.history.last("backend")
        if before is not None and before["way"] == way:
            return
        self.note("backend", way=way)
        if before is not None and self.world.first:
            text = f"note: the loss is computed by {way} from step {self.state.step} on, by {before['way']} until then"
            self.bar.write(f"{text}; their results differ by rounding", file=sys.stderr)

    def settle(self) -> None:
        """Name the images that could not be read since the last call. Raises: UserError on every rank if too many."""
        tally = getattr(self.state.images, "tally", None)  # images that were all read before the run have no tally
        if tally is not None:
            tally.settle(self.world)

    def warn(self) -> None:
        """Print a warning once in a run if five log lines after the warm-up show a collapse or a flat target.

        Lines before the end of the warm-up do not count: an untrained network may give equal features.
        """
        record = self.state.history
        trouble = summary.trouble(record)
        if trouble is None or record.last(trouble):
            return
        first, *_, last = record.of("train")[-summary.LINES :]
        if first["step"] <= self.warmup:
            return
        row = self.note(trouble, collapse_gap=last["collapse_gap"])
        if self.world.first:  # tqdm.write prints even where the bar is disabled
            text = f"warning: {summary.warning(row)}. To try: {'; '.join(summary.ADVICE[trouble])}"
            self.bar.write(text, file=sys.stderr)

    def check_weights(self) -> None:
        """Raise a UserError where a weight of the network is not finite. Waits for the device."""
        norms = torch._foreach_norm(list(self.state.network.parameters()))
        if not torch.stack(norms).isfinite().all():
            raise self.stopped(self.state.step, "a weight is not finite")

    def restart_clock(self) -> None:
        """Restart the measurement of images per second, so that evaluation and saving do not count."""
        self.since, self.waited_s = time.perf_counter(), 0.0

    def stopped(self, step: int, reason: str) -> UserError:
        """Error that ends a run whose numbers went bad: its step, the reason, and the last good checkpoint."""
        path = self.directory / checkpoint.FILE
        kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
        return UserError(
            f"stopped at step {step} (epoch {step // self.steps + 1}): {reason}; {kept}. "
            "A lower --optim.lr or --optim.clip-norm 1 may help"
        )

    def close(self) -> None:
        self.bar.close()
        self.state.history.close()
