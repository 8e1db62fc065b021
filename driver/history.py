"""A run's record: one JSON object a line in history.jsonl, appended and flushed as it is known.

Each row has `kind`, `step` and `epoch` (a fraction within one):

train       means over the steps since the last such row, and over ranks
evaluation  what `evaluate` gave for the network; `pixels` the same for raw pixels, once
collapse    the step at which the features were seen to have collapsed, once
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "history.jsonl"

Row = dict[str, Any]
Sink = Callable[[Row], None]


class History:
    """The rows, in order, and whoever gets each new one (the file, TensorBoard, W&B)."""

    def __init__(self, rows: list[Row] | None = None) -> None:
        self.rows: list[Row] = list(rows or [])
        self.sinks: list[Sink] = []

    def add(self, kind: str, step: int, epoch: float, **numbers: float) -> None:
        row = {"kind": kind, "step": step, "epoch": epoch, **numbers}
        self.rows.append(row)
        for sink in self.sinks:
            sink(row)

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def last(self, kind: str) -> Row | None:
        return next((row for row in reversed(self.rows) if row["kind"] == kind), None)

    def keep_in(self, directory: Path) -> None:
        """From here on the file holds exactly the rows: what a run wrote after its last checkpoint is dropped."""
        path = directory / FILE
        temporary = path.with_suffix(".jsonl.writing")
        temporary.write_text("".join(map(as_line, self.rows)))
        os.replace(temporary, path)
        self.sinks.append(lambda row: append(path, row))


def append(path: Path, row: Row) -> None:
    with path.open("a") as file:  # closed at once, so that the line is there whatever happens next
        file.write(as_line(row))


def as_line(row: Row) -> str:
    """JSON has no NaN and no infinity: they become null."""
    plain = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def read(directory: Path) -> History:
    """The history in a run's directory. A last line that was cut short is left out."""
    rows = []
    for line in (directory / FILE).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return History(rows)
