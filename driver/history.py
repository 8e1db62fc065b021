"""History of a run: one JSON object a line in history.jsonl, appended and flushed as soon as it is known.

Each row has `kind`, `step` and `epoch` (a fraction within one):

train       means over the steps since the last such row, and over ranks
evaluation  results of `evaluate` for the features of the network
pixels      results of `evaluate` for raw pixels, once
backend     `way`, the backend and engine that compute the loss, seen at the first step after a log line; not repeated
collapse    written once, at the step by which the features were seen to have collapsed
ceiling     written once, at the step by which the loss was seen at its ceiling or above, with features that differ
"""

import json
import math
from pathlib import Path
from typing import Any, Protocol

from bam_kernels.whole_files import naming, replacing

from .config import UserError
from .messages.text import NAME_LIMIT

FILE = "history.jsonl"
ACCURACIES = ("knn", "knn_moved", "linear", "linear_moved")
"""Names of the accuracies on held-out images, in rows of kinds evaluation and pixels."""
NUMBERS = {
    "train": ("collapse_gap", "uniform_loss", "source_entropy"),
    "collapse": ("collapse_gap",),
    "ceiling": ("collapse_gap",),
    "pixels": ACCURACIES,
}
"""Numbers that a row must have, by its kind, for the log and the report."""

Row = dict[str, Any]


class Sink(Protocol):
    """Receiver of each new row of a history: the file, TensorBoard or W&B."""

    def __call__(self, row: Row) -> None: ...

    def close(self) -> None: ...


class History:
    """Rows in order, and the sinks that get each new row. Numbers that are not finite become None: JSON has none."""

    def __init__(self, rows: list[Row] | None = None) -> None:
        self.rows: list[Row] = list(rows or [])
        self.sinks: list[Sink] = []

    def add(self, kind: str, step: int, epoch: float, **values: float | str) -> Row:
        known = {name: x if isinstance(x, str) or math.isfinite(x) else None for name, x in values.items()}
        row = {"kind": kind, "step": step, "epoch": epoch, **known}
        self.rows.append(row)
        for sink in self.sinks:
            sink(row)
        return row

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def last(self, kind: str) -> Row | None:
        return next((row for row in reversed(self.rows) if row["kind"] == kind), None)

    @property
    def epoch(self) -> float:
        """Epochs done according to the last row; 0 without rows."""
        return self.rows[-1]["epoch"] if self.rows else 0.0

    def close(self) -> None:
        while self.sinks:
            self.sinks.pop().close()


class File:
    """Sink that appends to history.jsonl.

    The file starts anew from `rows`, so that rows that a run wrote after its last checkpoint are dropped.
    """

    def __init__(self, directory: Path, rows: list[Row]) -> None:
        path = directory / FILE
        with replacing(path) as temporary:
            temporary.write_text("".join(map(_line, rows)))
        self.file = path.open("a")

    def __call__(self, row: Row) -> None:
        with naming(Path(self.file.name)):
            self.file.write(_line(row))
            self.file.flush()

    def close(self) -> None:
        with naming(Path(self.file.name)):
            self.file.close()


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def fault_of(row: Any) -> str:
    """What is wrong with a row of a history; empty where nothing is."""
    if not isinstance(row, dict):
        return f"must be values with names, got a {type(row).__name__}"
    for name, value in row.items():
        if not isinstance(name, str):
            return f"must have names that are text, got {type(name).__name__}"
        number = type(value) in (int, float) and abs(value) < 2**1000  # which excludes NaN and infinity
        if not number and value is not None and type(value) is not str:
            return f"must have a finite number or text as {name[:NAME_LIMIT]!r}"
    kind = row.get("kind")
    if not isinstance(kind, str):
        return "must have a kind"
    if not isinstance(row.get("step"), int) or row["step"] < 0:
        return "must have a step, a whole number of at least 0"
    numbers = ("epoch", *NUMBERS.get(kind, ()), *(NUMBERS["pixels"] if "knn" in row else ()))
    lacking = [name for name in numbers if type(row.get(name)) not in (int, float)]
    if kind == "backend" and not isinstance(row.get("way"), str):
        lacking.append("way")
    return f"of kind {kind[:NAME_LIMIT]!r} must have {lacking[0]}" if lacking else ""


def read(directory: Path) -> History:
    """History in the directory of a run, without a last line that was cut short.

    Raises: UserError where the file is missing or damaged.
    """
    path = directory / FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{directory}: not the directory of a run ({FILE}: {error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            fault = fault_of(row)
        except (ValueError, RecursionError):
            fault = "is not JSON"
        if fault and number == len(lines) and not line.endswith("\n"):
            break
        if fault:
            raise UserError(
                f"{path}: line {number} {fault}; the run's checkpoint has a copy of the history, which --run.resume "
                f"{directory} writes again"
            )
        rows.append(row)
    return History(rows)
