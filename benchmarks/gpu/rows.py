"""Result rows of the GPU scripts: one JSON object a line, written as they come."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A measured number.

    kind: ceiling, kernel or step. shape: M x N or M x N x D. error: relative, against float64, of dz or of a kernel's
    output. how: "graph", device time of a replay, of a kernel "cold", with operands larger than the cache in turn, or
    "warm", with the same again; "events", between two events around an eager call; "wall", an eager call and a wait;
    "host", the call alone; "first", the first call, which compiles.
    """

    kind: str
    name: str
    backend: str
    shape: str
    how: str
    value: float
    unit: str = "us"
    teacher: bool = False
    peak_mb: float | None = None
    error: float | None = None
    note: str = ""


class Rows:
    """Appends rows to a file and prints them; counts what failed."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.failed = path, 0

    def fail(self, what: str) -> None:
        """Say that there is no row of something."""
        self.failed += 1
        print(f"FAILED {what}", flush=True)

    def add(self, row: Row) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        extra = "".join(
            f"  {name} {value:.3g}"
            for name, value in (("peak MB", row.peak_mb), ("error", row.error))
            if value is not None
        )
        mode = "teacher" if row.teacher else ""
        print(
            f"{row.kind:<8} {row.name:<28} {row.backend:<10} {row.shape:<16} {mode:<8} {row.how:<12}"
            f" {row.value:10.2f} {row.unit}{extra}  {row.note}".rstrip(),
            flush=True,
        )


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines() if line.endswith("}")]
