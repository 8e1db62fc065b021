"""Checkpoints: everything that the training loop changes, as plain tensors, numbers and dictionaries.

A checkpoint does not depend on the number of ranks and micro-batches. No generator has a state to keep: all random
numbers are keyed by seed and step, or by seed, epoch, image and view (data/random_keys.py). The place in the epoch
follows from the step.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import weights
from .config import UserError
from .data.images import Images
from .files import replacing
from .history import History

FILE = "checkpoint.pt"
STEP_FILES = f"step-{'[0-9]' * 9}.pt"


@dataclass
class State:
    """State of a run that the training loop changes."""

    network: nn.Module
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    images: Images | None = None
    """Data set of the run; its boxes are part of the state."""
    G: int = 0
    """Images per step."""
    epoch: int = 0
    """Number of epochs that are done."""
    step: int = 0
    history: History = field(default_factory=History)
    kept: set[Path] = field(default_factory=set)
    """Files step-N.pt to keep. Files of steps after the checkpoint from which the run went on are not in it."""

    def content(self, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "boxes": None if self.images is None else self.images.boxes,
            "images": {"training": 0 if self.images is None else self.images.training, "step": self.G},
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history.rows,
            "config": config,
        }


def save(state: State, config: dict[str, Any], directory: Path, keep_last: int = 1, keep: bool = False) -> Path:
    """Write checkpoint.pt and return its path. The newest `keep_last` checkpoints stay; with `keep`, this one for good.

    Raises: UserError where it cannot be written; the checkpoint before it stays.
    """
    path = directory / FILE
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state.content(config), file)
    except (OSError, RuntimeError) as error:
        free_mb = shutil.disk_usage(directory).free / 1e6  # torch's error does not say whether the disk is full
        kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
        raise UserError(f"{path}: not written ({error}; {free_mb:.0f} MB are free there); {kept}") from error
    if keep_last > 1:
        newest = directory / _step_file(state.step)
        _keep(path, newest)
        state.kept = set(sorted(state.kept | {newest})[-keep_last:])
    else:
        state.kept = set()
    for other in set(directory.glob(STEP_FILES)) - state.kept:
        other.unlink()
    if keep:
        _keep(path, directory / f"epoch-{state.epoch:04d}.pt")
    return path


def _keep(path: Path, copy: Path) -> None:
    """Give the file a second name by a hard link; make a copy where the file system has no hard links."""
    with replacing(copy) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)


def _step_file(step: int) -> str:
    return f"step-{step:09d}.pt"


def load(state: State, source: Path) -> Path:
    """Load the newest checkpoint of the directory `source`, or the file `source`, into `state`; return the directory.

    Raises: UserError where there is no checkpoint, or it does not fit the options.
    """
    path = source if source.suffix == ".pt" else source / FILE
    if not path.is_file():
        raise UserError(f"--run.resume {source}: no {path.name} there; the run ended before its first checkpoint")
    content = weights.read(path)
    try:
        saved = content["images"]
        now = {"training": state.images.training if state.images else 0, "step": state.G}
        if saved != now:
            raise UserError(
                f"{path}: its run has {saved['training']} training images, {saved['step']} per step; the options give "
                f"{now['training']} training images, {now['step']} per step, so its steps cannot be continued"
            )
        state.network.load_state_dict(content["network"])
        if state.teacher is not None:
            state.teacher.load_state_dict(content["teacher"] or content["network"])
        current = state.optimizer.param_groups
        state.optimizer.load_state_dict(content["optimizer"])
        for group, options in zip(state.optimizer.param_groups, current, strict=True):
            group.update(options)  # settings such as momentum come from the current options, not from the checkpoint
        if state.scaler is not None and content["scaler"]:
            state.scaler.load_state_dict(content["scaler"])
        if state.images is not None and content["boxes"] is not None:
            state.images.set_boxes(content["boxes"])
    except KeyError as error:
        raise UserError(f"{path}: not a checkpoint of this driver: no {error} in it") from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: does not fit the model that the options describe: {error}") from error
    state.epoch, state.step, state.history = content["epoch"], content["step"], History(content["history"])
    newest = _step_file(state.step)
    state.kept = {file for file in path.parent.glob(STEP_FILES) if file.name <= newest}
    return path.parent
