"""Result rows of the GPU scripts: one JSON object a line, written as they come."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A measured number.

    kind: ceiling, kernel or step. how: "graph" (device time of a replay), "wall" (host and device, one call and a
    synchronisation), "host" (the call alone). shape: M x N or M x N x D. error: relative, of dz or of what the kernel
    writes, against float64.
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
    """Appends rows to a file and prints them."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

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
