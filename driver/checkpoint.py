"""Checkpoints: everything that the training loop changes, as plain tensors, numbers and dictionaries.

A checkpoint does not depend on the number of ranks and micro-batches. No generator has a state to keep: all random
numbers are keyed by seed and step, or by seed, epoch, image and view (data/random_keys.py). The place in the epoch
follows from the step.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from bam_kernels.whole_files import replacing

from . import weights
from .config import PARTS, Config, UserError, as_plain
from .data.images import Images
from .data.inventory import Inventory
from .distributed import World
from .history import History, fault_of
from .messages.text import typed
from .weights import run_contents
from .weights.run_contents import WrongPart, require
from .weights.way_back import FILE, STEP_FILES, damaged

NEW_RUN = "without --run.resume, --model.weights RUN_DIR starts a new run from its backbone"
FIXED = {
    "its training images": ("data.held_out",),
    "its weights": ("model.weights", "model.pretrained"),
    "its networks": (
        *("model.name", "model.norm", "model.width", "model.stem", "model.heads", "model.positions"),
        *("model.frozen_patches", "model.head_layers", "model.head_width", "model.head_dim", "model.activation"),
    ),
    "its optimiser's state": ("optim.name",),
    "its teacher": ("model.teacher_momentum",),
    "its directory": ("run.name",),
}
"""What a resumed run keeps, and the options that would change it. A teacher's momentum may change, but not to 0."""
REPORT = ("model.compile", "model.channels_last", "model.sync_batch_norm", "loss.backend", "run.device", "run.dtype")
"""Options besides those of the images that the report of a finished run depends on, or that fit it to a machine."""


@dataclass
class State:
    """State of a run that the training loop changes."""

    network: nn.Module
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    images: Images | None = None
    """Data set of the run; its boxes are part of the state."""
    inventory: Inventory | None = None
    """Names and sizes of the images, on rank 0."""
    G: int = 0
    """Images per step."""
    epoch: int = 0
    """Number of epochs that are done."""
    step: int = 0
    history: History = field(default_factory=History)
    kept: set[Path] = field(default_factory=set)
    """Files step-N.pt to keep. Files of steps after the checkpoint from which the run went on are not in it."""

    def content(self, config: dict[str, Any]) -> dict[str, Any]:
        computed = self.history.last("backend")
        return {
            "network": self.network.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "boxes": None if self.images is None else self.images.boxes,
            "images": {
                "training": 0 if self.images is None else self.images.training,
                "step": self.G,
                "digests": None if self.inventory is None else self.inventory.digests,
            },
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history.rows,
            "config": config,
            "backend": None if computed is None else computed["way"],
        }


def save(state: State, config: dict[str, Any], directory: Path, keep_last: int = 1, keep: bool = False) -> Path:
    """Write checkpoint.pt and return its path. The newest `keep_last` checkpoints stay; with `keep`, this one for good.

    Raises: UserError where it cannot be written; the checkpoint before it stays.
    """
    path = directory / FILE
    weights.save(state.content(config), path)
    if keep_last > 1:
        newest = directory / _step_file(state.step)
        _keep(path, newest)
        state.kept = set(sorted(state.kept | {newest})[-keep_last:])
    else:
        state.kept = set()
    for other in set(directory.glob(STEP_FILES)) - state.kept:
        other.unlink(missing_ok=True)
    if keep:
        _keep(path, directory / f"epoch-{state.epoch:04d}.pt")
    return path


def _keep(path: Path, copy: Path) -> None:
    """Give the file a second name by a hard link; make a copy where the file system has no hard links."""
    with replacing(copy, like=path) as temporary:
        try:
            temporary.unlink()  # a link needs a free name
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)


def _step_file(step: int) -> str:
    return f"step-{step:09d}.pt"


def load(state: State, options: Config, world: World) -> Path:
    """Load the checkpoint that --run.resume names into `state`; return the run's directory.

    Raises: UserError where there is no checkpoint, or it does not fit the images or the options.
    """
    assert options.run.resume is not None
    path, now = file_of(options.run.resume), as_plain(options)
    if not path.is_file():
        raise damaged(path, "no such file", "if the run ended before its first checkpoint, start it anew")
    content = weights.read(path)
    try:
        run_contents.check_run(content)
        _check_history(content["history"])
        was = content["config"]
        check_options(was, now)
        _check_images(state, content["images"], path, changes(was, now, "data"), world)
        _check_epochs(content["epoch"], changes(was, now), options)
        _load_states(state, content, options)
    except KeyError as error:
        raise damaged(path, f"not a checkpoint of this driver: no {error} in it") from error
    except WrongPart as error:
        raise damaged(path, str(error)) from error
    except (RuntimeError, ValueError) as error:
        given = ", ".join(changes(was, now, "data", "model").values()) or "the model that the options describe"
        raise UserError(f"{path}: does not fit {given}: {_first_fault(error)}") from error
    state.epoch, state.step, state.history = content["epoch"], content["step"], History(content["history"])
    newest = _step_file(state.step)
    state.kept = {file for file in path.parent.glob(STEP_FILES) if file.name <= newest}
    return path.parent


def _load_states(state: State, content: dict[str, Any], options: Config) -> None:
    """Load the states of networks, optimiser, scaler and boxes, each after a check of its parts."""
    run_contents.check_module(content["network"], state.network, "network")
    state.network.load_state_dict(content["network"])
    if state.teacher is not None:
        teacher = content["network"] if content["teacher"] is None else content["teacher"]
        run_contents.check_module(teacher, state.teacher, "teacher")
        state.teacher.load_state_dict(teacher)
    current = state.optimizer.param_groups
    run_contents.check_optimizer(content["optimizer"], state.optimizer)
    state.optimizer.load_state_dict(content["optimizer"])
    for group, settings in zip(state.optimizer.param_groups, current, strict=True):
        group.update(settings)  # settings such as momentum come from the current options, not from the checkpoint
    if state.scaler is not None and content["scaler"] is not None:
        run_contents.check_scaler(content["scaler"])
        state.scaler.load_state_dict(content["scaler"])
    if state.images is not None and content["boxes"] is not None and options.boxes.every:
        run_contents.check_boxes(content["boxes"], state.images.training)
        state.images.set_boxes(content["boxes"])


def _check_history(rows: Any) -> None:
    """Raise a WrongPart where the history of a checkpoint is no list of rows."""
    require(isinstance(rows, list), "history", "a list of rows", rows)
    for number, row in enumerate(rows):
        if fault := fault_of(row):
            raise WrongPart(f"row {number} of its history {fault}")


def file_of(run: Path) -> Path:
    """Checkpoint file that a user means by a path: the path itself if it ends in .pt, else the newest one in a run."""
    return run if run.suffix == ".pt" else run / FILE


def options_in(resume: Path) -> dict[str, Any] | None:
    """Options that the checkpoint which --run.resume names has; None where no such file is readable."""
    try:
        content = weights.read(file_of(resume))
        run_contents.check_run(content)
        return content["config"]
    except (UserError, WrongPart, KeyError):
        return None


def changes(was: dict[str, Any], now: dict[str, Any], *parts: str) -> dict[str, str]:
    """Options that differ from those of a run, in `parts` or anywhere, and how a message names each.

    An option that is newer than the run is not compared.
    """
    return {
        f"{part}.{name}": f"{typed(f'{part}.{name}', value)} (the run has {was[part][name]})"
        for part in parts or PARTS
        for name, value in now[part].items()
        if name in was[part] and was[part][name] != value
    }


def check_options(was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a UserError where an option differs from the run's that only a new run can take."""
    changed = changes(was, now)
    if now["model"]["teacher_momentum"]:
        changed.pop("model.teacher_momentum", None)
    for kept, options in FIXED.items():
        for option in options:
            if option in changed:
                raise UserError(f"{changed[option]}: a resumed run keeps {kept}; leave the option out, or {NEW_RUN}")


def _check_images(state: State, saved: dict[str, Any], path: Path, changed: dict[str, str], world: World) -> None:
    """Raise a UserError on every rank where images or their number per step are not the run's."""
    training, digests = state.images.training if state.images else 0, saved.get("digests")
    if saved["step"] != state.G or (digests is None and saved["training"] != training):
        raise UserError(
            f"{path}: its run has {saved['training']} training images, {saved['step']} per step; the options give "
            f"{training} training images, {state.G} per step, so its steps cannot be continued"
        )
    if digests is None:
        print(f"note: {path} is of an older version and does not know its images: only their number was compared")
        return
    found = world.from_first("images", lambda: state.inventory.difference(digests, path.parent))
    if found:
        given = "".join(f"; {text}" for text in changed.values())
        raise UserError(f"{path}: its run has other images: {found}{given}. Bring its images back, or {NEW_RUN}")


def _check_epochs(done: int, changed: dict[str, str], options: Config) -> None:
    """Raise a UserError where no epoch is left in which an option that was given could have an effect."""
    stop, epochs = options.run.stop_after, options.optim.epochs
    if stop is not None and stop <= done:
        raise UserError(f"--run.stop-after {stop} must be larger than the number of epochs that are done, {done}")
    without = [text for option, text in changed.items() if not option.startswith("data.") and option not in REPORT]
    if epochs <= done and without:
        raise UserError(
            f"{without[0]} does nothing: all epochs are done, {done} of {epochs}; a larger --optim.epochs goes on"
        )


def _first_fault(error: Exception) -> str:
    """First fault of those in an error of `load_state_dict`, on one line."""
    lines = str(error).splitlines()
    more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
    return shorten(lines[min(1, len(lines) - 1)], 200, placeholder=" ...") + more
