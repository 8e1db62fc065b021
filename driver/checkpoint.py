"""Checkpoints: everything the loop mutates, as plain tensors, numbers and dictionaries.

The same for any number of ranks and micro-batches. Random numbers follow from seed, epoch and rank.
"""

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import UserError
from .evaluate import Accuracy

FILE = "checkpoint.pt"


@dataclass
class State:
    """What the loop mutates. `history` has its log lines, the k-NN evaluations and the accuracy of raw pixels."""

    network: nn.Module
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0
    history: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {"log": [], "knn": [], "pixels": []})

    def note(self, kind: str, epoch: int, accuracy: Accuracy) -> None:
        """Add one evaluation to the history."""
        self.history[kind].append({"epoch": epoch, **accuracy._asdict()})


def save(state: State, config: dict[str, Any], directory: Path) -> Path:
    """Write the checkpoint under a temporary name, then rename it: the file in place is always whole."""
    content = {
        "network": state.network.state_dict(),
        "teacher": None if state.teacher is None else state.teacher.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "history": state.history,
        "config": config,
    }
    path = directory / FILE
    temporary = path.with_suffix(".pt.writing")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load(state: State, directory: Path) -> None:
    """Put a saved state in place. Raises: UserError."""
    path = directory / FILE
    if not path.is_file():
        raise UserError(f"--run.resume {directory}: no {FILE} there; the run was stopped before its first one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    try:
        state.network.load_state_dict(content["network"])
        if state.teacher is not None:
            state.teacher.load_state_dict(content["teacher"] or content["network"])
        state.optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: does not fit the model that the options describe: {error}") from error
    state.epoch, state.step, state.history = content["epoch"], content["step"], content["history"]
