"""Result rows of the GPU scripts, written one by one as lines of JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured number.

    kind is ceiling, kernel or step; shape is MxN or MxNxD; error is the relative error against float64 of dz or of a
    kernel's output. how says what was timed:
    - "graph": device time of a replayed CUDA graph. For kernels it ends in "cold" if operands rotate through more
      memory than the cache holds, or in "warm" if the same operands are used again;
    - "events": time between CUDA events around an eager call;
    - "wall": an eager call and a synchronisation; "host": the call without the synchronisation;
    - "first": the first call, which compiles.
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
    """Appends rows to a file, prints them, and counts failures."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.failed = path, 0

    def fail(self, what: str) -> None:
        """Print and count a measurement that failed."""
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
