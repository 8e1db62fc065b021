"""Curves of a run: collected on the device, read by the host at log lines only."""

import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bam_kernels.stats import BAMStats

from . import checkpoint
from .config import UserError
from .world import World

CURVES = ("loss", "target_entropy", "source_entropy", "uniform_loss", "collapse_gap")


class Log:
    """The progress bar and the history's log lines, of steps of G images over all ranks."""

    def __init__(self, state: checkpoint.State, directory: Path, steps: int, epochs: int, G: int, world: World) -> None:
        self.state, self.directory, self.steps, self.G, self.world = state, directory, steps, G, world
        self.pending: list[Tensor] = []
        total = steps * epochs
        self.bar = tqdm(total=total, initial=state.step, unit="step", dynamic_ncols=True, disable=not world.first)
        self.since = time.perf_counter()

    def add(self, loss: Tensor, stats: BAMStats) -> None:
        """Note one step's numbers without waiting for them."""
        values = [loss.detach(), stats.target_entropy, stats.source_entropy, stats.uniform_loss, stats.collapse_gap]
        self.pending.append(torch.stack(values))

    def line(self, lr: float) -> None:
        """Wait for the device; note the mean over ranks and over the steps since the last line.

        Raises: UserError on a bad loss, on every rank.
        """
        if not self.pending:
            return
        rows = self.world.mean(torch.stack(self.pending)).tolist()
        first = self.state.step - len(rows)
        for i, row in enumerate(rows):
            if not math.isfinite(row[0]):
                raise self.stopped(first + i, f"the loss is {row[0]}")
        mean = dict(zip(CURVES, (sum(column) / len(rows) for column in zip(*rows, strict=True)), strict=True))
        rate = self.G * len(rows) / (time.perf_counter() - self.since)
        self.state.history["log"].append({"step": self.state.step, "lr": lr, "images_per_s": rate, **mean})
        self.bar.set_postfix_str(
            f"loss {mean['loss']:.3f}, gap to collapse {mean['collapse_gap']:.3f}, lr {lr:.1e}, {rate:.0f} images/s"
        )
        self.bar.update(len(rows))
        self.pending.clear()
        self.since = time.perf_counter()

    def check_weights(self) -> None:
        """What is about to be saved is finite. Waits for the device. Raises: UserError."""
        norms = torch._foreach_norm(list(self.state.network.parameters()))
        if not torch.stack(norms).isfinite().all():
            raise self.stopped(self.state.step, "a weight is not finite")

    def restart_clock(self) -> None:
        """Leave what was not training (evaluation, saving) out of images per second."""
        self.since = time.perf_counter()

    def stopped(self, step: int, reason: str) -> UserError:
        """The error that ends a run whose numbers went bad."""
        path = self.directory / checkpoint.FILE
        kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
        return UserError(
            f"stopped at step {step} (epoch {step // self.steps + 1}): {reason}; {kept}. "
            "A lower --optim.lr or --optim.clip-norm 1 may help"
        )

    def close(self) -> None:
        self.bar.close()
