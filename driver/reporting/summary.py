"""A run in words: its result, a warning and advice if the loss stays at its ceiling, and a command to go on."""

from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from .. import checkpoint
from ..config import FILE, Config
from ..history import ACCURACIES, History, Row

CLOSE_NATS = 0.01
"""Below this distance, a loss counts as at its ceiling and an entropy as that of uniform attention."""
LINES = 5
"""Consecutive log lines at the ceiling that make a warning: a single line may be noise."""

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
"""Remedies for each kind of trouble, the likeliest first."""


def trouble(history: History) -> str | None:
    """Trouble that the last log lines show: "collapse", "ceiling" or None.

    In both kinds the loss is at its ceiling or above in each of the last `LINES` log lines. In a "collapse" the
    attention of the last line is uniform, as when all features are alike; in a "ceiling" it is not.
    """
    rows = history.of("train")[-LINES:]
    if len(rows) < LINES or any(row["collapse_gap"] >= CLOSE_NATS for row in rows):
        return None
    last = rows[-1]
    uniform = last["uniform_loss"] - last["source_entropy"] < CLOSE_NATS and last["collapse_gap"] > -CLOSE_NATS
    return "collapse" if uniform else "ceiling"


def warning(row: Row) -> str:
    """Warning in words, without a full stop, for a history row of kind "collapse" or "ceiling"."""
    gap, when = row["collapse_gap"], f"by step {row['step']} (epoch {row['epoch']:.1f})"
    if row["kind"] == "collapse" and gap > -CLOSE_NATS:
        return (
            f"training collapsed {when}: the loss is within {CLOSE_NATS} nats of its ceiling log(N - T) and the "
            "attention uniform, as with features that are all alike"
        )
    where = "at" if abs(gap) < CLOSE_NATS else f"{-gap:.2f} nats above"
    return f"the loss is {where} its ceiling log(N - T) {when}: the target is flat, or the temperature too low"


def verdict(history: History, options: Config, tested: int | None) -> list[str]:
    """Sentences on how far a run came, its accuracies and its loss.

    `tested` is the number of held-out images, None where it is unknown.
    """
    tests, raw = (history.last(kind) for kind in ("evaluation", "pixels"))
    done = f"{history.epoch:.0f} of {epochs(options.optim.epochs)}"
    lines = [f"Finished: {done}." if history.epoch >= options.optim.epochs else f"Stopped after {done}."]
    if tests and raw and "knn" in tests:
        first = history.of("evaluation")[0]
        lines.append(
            f"Of {tested or 'the'} held-out images, {options.run.neighbours} nearest neighbours classify "
            f"{tests['knn']:.1%} correctly (raw pixels {raw['knn']:.1%}, network before BAM {first['knn']:.1%}), and a "
            f"linear classifier on the frozen features {tests['linear']:.1%}."
        )
    return [*lines, last_loss(history)] if history.last("train") else lines


def last_loss(history: History) -> str:
    """One sentence on the last loss: its distance to the ceiling, or that training has collapsed."""
    if trouble(history) == "collapse":
        return "Training has collapsed: the loss ended at its ceiling, with uniform attention."
    gap = history.of("train")[-1]["collapse_gap"]
    side = "below" if gap >= 0 else "above"
    cause = ": the target is flat, or the temperature too low" if trouble(history) else ""
    return f"The loss ended {abs(gap):.2f} nats {side} the value of collapsed features{cause}."


def epochs(count: float) -> str:
    return "1 epoch" if round(count) == 1 else f"{count:.0f} epochs"


def accuracies(history: History, trained: str) -> dict[str, list[float]]:
    """Accuracies of raw pixels and of the network, before training and newest, by name; empty where none was measured.

    Each has k-NN, k-NN on moved images, linear, linear on moved images. `trained` names the newest network; its {} is
    replaced by the epochs of training.
    """
    measured, pixels = [row for row in history.of("evaluation") if "knn" in row], history.last("pixels")
    if pixels is None or not measured:
        return {}
    newest = trained.format(epochs(measured[-1]["epoch"]))
    rows = {"raw pixels": pixels, "network, before BAM": measured[0], newest: measured[-1]}
    return {name: [row[column] for column in ACCURACIES] for name, row in rows.items()}


def computed_by(history: History) -> str:
    """Backends and engines that computed the loss, such as `cuda slab`; empty for a run that does not know them."""
    return ", ".join(dict.fromkeys(row["way"] for row in history.of("backend")))


def table(history: History, tested: int) -> str:
    """The accuracies on `tested` held-out images as lines of text; empty where none was measured."""
    lines = [
        f"\n{f'accuracy, {tested} held-out images':<39}{'k-NN':^18}{'linear classifier':^21}",
        f"{'':<39}{'as are':>7}{'moved':>8}   {'as are':>9}{'moved':>8}",
    ]
    rows = accuracies(history, "network, after {} of BAM")
    for name, (knn, knn_moved, linear, linear_moved) in rows.items():
        lines.append(f"  {name:<37}{knn:>7.3f}{knn_moved:>8.3f}   {linear:>9.3f}{linear_moved:>8.3f}")
    return "\n".join([*lines, "moved: randomly shifted and rotated\n"]) if rows else ""


def next_step(history: History, options: Config, directory: Path) -> tuple[str, str]:
    """Purpose and text of one command that continues from this run."""
    command, remaining = "python driver/pretrain.py", options.optim.epochs - history.epoch
    same = f"{command} --config {quote(str(directory / FILE))}"
    if directory.parent != Config().run.directory:  # the file of options does not hold it
        same += f" --run.directory {quote(str(directory.parent))}"
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
