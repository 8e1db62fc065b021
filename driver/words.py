"""What a run says about itself in words: its result, collapse and what to try, the command to go on."""

from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from .config import FILE, Config
from .history import History, Row

COLLAPSED = 0.01
"""Gap to the ceiling, nats, below which the features no longer tell images apart."""
COLLAPSE_LINES = 5
"""Log lines that must be so: one alone may be noise."""

ADVICE = (
    "half the --loss.epsilon (a flat target teaches nothing)",
    "a lower --optim.lr, or a longer --optim.warmup-epochs",
    "a larger batch: --virtual-batch",
    "a teacher: --model.teacher-momentum 0.99",
    "a norm in the head: --model.norm batch or layer",
)
"""Against collapse, the likeliest cure first."""


def collapse(row: Row) -> str:
    """What a collapse is, from its row in the history."""
    gap = row["collapse_gap"]
    where = f"within {COLLAPSED} nats of" if abs(gap) < COLLAPSED else f"{-gap:.2f} nats above"
    return (
        f"training collapsed by step {row['step']} (epoch {row['epoch']:.1f}): the loss is {where} its ceiling "
        "log(N - T), the value of features that are all alike"
    )


def collapsed(history: History) -> bool:
    """Whether the run's last five log lines are at the ceiling, or above it."""
    last = history.of("train")[-COLLAPSE_LINES:]
    return len(last) == COLLAPSE_LINES and all(row["collapse_gap"] < COLLAPSED for row in last)


def verdict(history: History, options: Config, tested: int) -> list[str]:
    """The result, in sentences."""
    train, tests, raw = (history.last(kind) for kind in ("train", "evaluation", "pixels"))
    done = f"{history.epoch:.0f} of {epochs(options.optim.epochs)}"
    lines = [f"Finished: {done}." if history.epoch >= options.optim.epochs else f"Stopped after {done}."]
    if tests and raw and "knn" in tests:
        first = history.of("evaluation")[0]
        lines.append(
            f"Of {tested} held-out images, {options.run.neighbours} nearest neighbours classify {tests['knn']:.1%} "
            f"correctly (raw pixels {raw['knn']:.1%}, untrained network {first['knn']:.1%}), and a linear classifier "
            f"on the frozen features {tests['linear']:.1%}."
        )
    if train and collapsed(history):
        lines.append("Training has collapsed: the loss ended at its ceiling or above.")
    elif train and train["collapse_gap"] is not None:
        gap = train["collapse_gap"]
        side = "below" if gap >= 0 else "above"
        lines.append(f"The loss ended {abs(gap):.2f} nats {side} the value of collapsed features.")
    return lines


def epochs(count: float) -> str:
    return "1 epoch" if round(count) == 1 else f"{count:.0f} epochs"


def table(history: History, tested: int) -> str:
    """The accuracies as lines of text: as they are, and moved."""
    tests = history.of("evaluation")
    rows = {
        "raw pixels": history.of("pixels")[0],
        "network, untrained": tests[0],
        f"network, after {epochs(tests[-1]['epoch'])} of BAM": tests[-1],
    }
    columns = ("knn", "knn_moved", "linear", "linear_moved")
    lines = [
        f"\n{f'accuracy, {tested} held-out images':<39}{'k-NN':^18}{'linear classifier':^21}",
        f"{'':<39}{'as are':>7}{'moved':>8}   {'as are':>9}{'moved':>8}",
    ]
    for name, row in rows.items():
        cells = [f"{row[column]:.3f}" for column in columns]
        lines.append(f"  {name:<37}{cells[0]:>7}{cells[1]:>8}   {cells[2]:>9}{cells[3]:>8}")
    return "\n".join([*lines, "moved: randomly shifted and rotated\n"])


def next_step(history: History, options: Config, directory: Path) -> tuple[str, str]:
    """Why, and one command that goes on from here."""
    command, remaining = "python driver/pretrain.py", options.optim.epochs - history.epoch
    same = f"{command} --config {quote(str(directory / FILE))}"
    if collapsed(history):
        return "with a sharper target", f"{same} --loss.epsilon {options.loss.epsilon / 2:g}"
    if remaining > 0:
        left = "the last epoch" if round(remaining) == 1 else f"the other {epochs(remaining)}"
        return left, f"{command} --run.resume {quote(str(directory))}"
    if options.data.source != "digits":
        return "twice as long", f"{same} --optim.epochs {2 * options.optim.epochs}"
    install = "" if find_spec("torchvision") and find_spec("timm") else 'pip install -e ".[driver]" && '
    return "on a folder of your own images", f"{install}{command} --data.root PATH"
