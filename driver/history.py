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

from .config import UserError
from .files import naming, replacing

FILE = "history.jsonl"

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


def read(directory: Path) -> History:
    """History in the directory of a run, without a last line that was cut short. Raises: UserError without a file."""
    try:
        lines = (directory / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{directory}: not the directory of a run ({FILE}: {error.strerror})") from error
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return History(rows)
