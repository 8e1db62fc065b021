"""What a run says and leaves behind at its end."""

import json
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from . import checkpoint, plots
from .config import Config

COLLAPSED = 0.01
"""Gap to the ceiling, nats, below which the features no longer tell images apart."""


def write(state: checkpoint.State, options: Config, directory: Path, tested: int, steps: int) -> None:
    """history.json, curves.png, the accuracies, and what to do next."""
    (directory / "history.json").write_text(json.dumps(state.history, indent=1) + "\n")
    plots.curves(state.history, steps, directory / "curves.png")
    print(f"\nwritten: {directory}/ {checkpoint.FILE}, curves.png, history.json, config.yaml")
    if tested:
        print(table(state.history, tested, state.epoch))
    if state.epoch == options.optim.epochs and abs(state.history["log"][-1]["collapse_gap"]) < COLLAPSED:
        print("warning: the loss ended at its ceiling, so the features collapsed; try half the --loss.epsilon")
    print(next_step(state, options, directory))


def table(history: dict[str, list[dict[str, float]]], tested: int, epoch: int) -> str:
    """The accuracies as lines of text."""
    rows = {
        "raw pixels": history["pixels"][0],
        "network, untrained": history["knn"][0],
        f"network, after {epoch} epochs of BAM": history["knn"][-1],
    }
    lines = [f"\nk-NN accuracy, {tested} held-out images  {'as they are':>11}  shifted and rotated"]
    lines += [f"  {name:<37} {row['plain']:>12.3f} {row['moved']:>20.3f}" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def next_step(state: checkpoint.State, options: Config, directory: Path) -> str:
    """One command that goes on from here, and why."""
    command = "python driver/pretrain.py"
    if state.epoch < options.optim.epochs:
        remaining = options.optim.epochs - state.epoch
        return f"next, the other {remaining} epochs: {command} --run.resume {quote(str(directory))}"
    if options.data.root is not None:
        root, longer = quote(str(options.data.root)), 2 * options.optim.epochs
        return f"next, twice as long: {command} --data.root {root} --optim.epochs {longer}"
    install = "" if find_spec("torchvision") and find_spec("timm") else 'pip install -e ".[driver]" && '
    return f"next, on a folder of your own images: {install}{command} --data.root PATH"
