"""What a run says about itself in words: its result, collapse and what to try, the command to go on."""

from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from .. import checkpoint
from ..config import FILE, Config
from ..history import History, Row

CLOSE = 0.01
"""Nats from the ceiling within which the loss is at it, and the attention uniform."""
LINES = 5
"""Log lines that must be so: one alone may be noise."""

ADVICE = {
    "collapse": (
        "half the --loss.epsilon (a flat target teaches nothing)",
        "a lower --optim.lr, or a longer --optim.warmup-epochs",
        "a larger batch: --virtual-batch",
        "a teacher: --model.teacher-momentum 0.99",
        "a norm in the head: --model.norm batch or layer",
    ),
    "ceiling": (
        "half the --loss.epsilon (a flat target teaches nothing)",
        "a --loss.temperature of 0.1 or more (a lower one makes the attention sharper than its target)",
    ),
}
"""Against each trouble, the likeliest cure first."""


def trouble(history: History) -> str | None:
    """Where the loss was at its ceiling or above in each of the last five log lines: "collapse", the attention is
    uniform in the last, as alike features make it; "ceiling", it is not."""
    rows = history.of("train")[-LINES:]
    if len(rows) < LINES or any(row["collapse_gap"] >= CLOSE for row in rows):
        return None
    last = rows[-1]
    uniform = last["uniform_loss"] - last["source_entropy"] < CLOSE and last["collapse_gap"] > -CLOSE
    return "collapse" if uniform else "ceiling"


def warning(row: Row) -> str:
    """A trouble, from its row in the history."""
    gap, when = row["collapse_gap"], f"by step {row['step']} (epoch {row['epoch']:.1f})"
    if row["kind"] == "collapse" and gap > -CLOSE:
        return (
            f"training collapsed {when}: the loss is within {CLOSE} nats of its ceiling log(N - T) and the attention "
            "uniform, as with features that are all alike"
        )
    where = "at" if abs(gap) < CLOSE else f"{-gap:.2f} nats above"
    return f"the loss is {where} its ceiling log(N - T) {when}: the target is flat, or the temperature too low"


def verdict(history: History, options: Config, tested: int | None) -> list[str]:
    """The result, in sentences. tested: held-out images, where their number is known."""
    tests, raw = (history.last(kind) for kind in ("evaluation", "pixels"))
    done = f"{history.epoch:.0f} of {epochs(options.optim.epochs)}"
    lines = [f"Finished: {done}." if history.epoch >= options.optim.epochs else f"Stopped after {done}."]
    if tests and raw and "knn" in tests:
        first = history.of("evaluation")[0]
        lines.append(
            f"Of {tested or 'the'} held-out images, {options.run.neighbours} nearest neighbours classify "
            f"{tests['knn']:.1%} correctly (raw pixels {raw['knn']:.1%}, untrained network {first['knn']:.1%}), and a "
            f"linear classifier on the frozen features {tests['linear']:.1%}."
        )
    return [*lines, ended(history)] if history.last("train") else lines


def ended(history: History) -> str:
    """Where the loss is at the last log line, in a sentence."""
    if trouble(history) == "collapse":
        return "Training has collapsed: the loss ended at its ceiling, with uniform attention."
    gap = history.of("train")[-1]["collapse_gap"]
    side = "below" if gap >= 0 else "above"
    cause = ": the target is flat, or the temperature too low" if trouble(history) else ""
    return f"The loss ended {abs(gap):.2f} nats {side} the value of collapsed features{cause}."


def epochs(count: float) -> str:
    return "1 epoch" if round(count) == 1 else f"{count:.0f} epochs"


def table(history: History, tested: int) -> str:
    """The accuracies as lines of text: as they are, and moved."""
    tests = [row for row in history.of("evaluation") if "knn" in row]
    if not tests:
        return ""
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
    if trouble(history):
        return "with a sharper target", f"{same} --loss.epsilon {options.loss.epsilon / 2:g}"
    if remaining > 0 and not (directory / checkpoint.FILE).is_file():
        return "from the beginning, as there is no checkpoint", same
    if remaining > 0:
        left = "the last epoch" if round(remaining) == 1 else f"the other {epochs(remaining)}"
        return left, f"{command} --run.resume {quote(str(directory))}"
    if options.data.source != "digits":
        return "twice as long", f"{same} --optim.epochs {2 * options.optim.epochs}"
    install = "" if find_spec("torchvision") and find_spec("timm") else 'pip install -e ".[driver]" && '
    return "on a folder of your own images", f"{install}{command} --data.root PATH"
