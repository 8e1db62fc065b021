"""Times an earlier commit and this one in turn on one GPU, and compares them: part of measure.py.

The earlier commit is a folder with its files, and an extension that was built from them. Its own times.py runs, so
nothing is asked of it but kernels and steps that this script times. Medians go to OUT/before.jsonl and
OUT/after.jsonl, which predictions.py shows beside each other.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rows import Row, read
from steps import PYTHON, REPOSITORY, TURNS, Step, in_turn, table

TREES = ("before", "after")
SHAPES = ("2048x8192x4096", "2048x8192x256", "512x512x256")
SECONDS = 0.03  # of each measurement; a run takes about 16 s
LIMIT_S = 40.0


@dataclass(frozen=True)
class Against:
    """An earlier commit's folder, and its extension if that is not in the folder."""

    folder: Path
    extension: Path | None

    def environment(self) -> dict[str, str]:
        """Environment variables that import bam_kernels from the folder, with its extension."""
        path = os.environ.get("PYTHONPATH")
        found = {"PYTHONPATH": f"{self.folder.absolute()}:{path}" if path else str(self.folder.absolute())}
        return found | ({"BAM_KERNELS_EXTENSION": str(self.extension.absolute())} if self.extension else {})

    def fault(self) -> str | None:
        """What is missing; None if nothing is."""
        needed = [script_of(self.folder), *([self.extension] if self.extension else [])]
        return next((f"{file}: there is no such file" for file in needed if not file.exists()), None)


class BeforeAfter:
    """Builds the steps that time both commits, and reads what they have found."""

    def __init__(self, out: Path, against: Against, environment: dict[str, str], toy: bool) -> None:
        self.out, self.toy = out.absolute(), toy
        self.folders = {"before": against.folder.absolute(), "after": REPOSITORY}
        self.environments = {"before": against.environment(), "after": environment}

    def compile_steps(self) -> list[Step]:
        """Steps that fill Triton's cache; they write no rows and run beside others."""
        return [self._step(f"compile-{tree}", tree, ["--seconds", "0.001"], 85.0) for tree in TREES]

    def steps(self) -> list[Step]:
        """Steps that time both commits, in turn."""
        found = []
        for turn, tree in in_turn(TREES):
            options = ["--rows", str(file_of(self.out, turn, tree)), "--seconds", str(SECONDS)]
            found.append(self._step(f"times-{turn}-{tree}", tree, options, LIMIT_S))
        return found

    def _step(self, name: str, tree: str, options: list[str], limit_s: float) -> Step:
        size = ["--toy"] if self.toy else ["--shapes", *SHAPES]
        command = [PYTHON, str(script_of(self.folders[tree])), "--parts", "kernels", "steps", *size, *options]
        return Step(name, command, limit_s, self.environments[tree])

    def write(self) -> None:
        """Write the medians of each commit's runs."""
        for tree in TREES:
            rows = [replace(row, value=median(values)) for row, values in measured(self.out, tree).values()]
            text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
            (self.out / f"{tree}.jsonl").write_text(text)


Key = tuple[str, str, str, str, bool, str]


def script_of(folder: Path) -> Path:
    return folder / "benchmarks" / "gpu" / "times.py"


def file_of(out: Path, turn: int, tree: str) -> Path:
    return out / f"times-{turn}-{tree}.jsonl"


def files(out: Path) -> Iterator[Path]:
    """All files of rows that the steps write."""
    for turn, tree in in_turn(TREES):
        yield file_of(out, turn, tree)


def measured(out: Path, tree: str) -> dict[Key, tuple[Row, list[float]]]:
    """A commit's rows, each with the values of all turns; without first calls, which compile."""
    found: dict[Key, tuple[Row, list[float]]] = {}
    for turn in range(TURNS):
        for row in read(file_of(out, turn, tree)):
            if row.how != "first":
                key = row.kind, row.name, row.backend, row.shape, row.teacher, row.how
                found.setdefault(key, (row, []))[1].append(row.value)
    return found


def comparison_table(out: Path) -> str:
    """Table of medians before and after; apart: the larger difference, in percent, between runs of one commit."""
    before, after = (measured(out, tree) for tree in TREES)
    cells = []
    for key in dict.fromkeys([*before, *after]):
        _, name, backend, shape, teacher, how = key
        pair = [tree[key][1] if key in tree else [] for tree in (before, after)]
        texts = [f"{median(values):.1f}" if values else "-" for values in pair]
        ratio = f"{median(pair[0]) / median(pair[1]):.2f}" if all(pair) else "-"
        apart = max(max(values) / min(values) - 1 for values in pair if values)
        cells.append([name, backend, shape, "yes" if teacher else "", how, *texts, ratio, f"{apart:.0%}", ""])
    return table(["us", "backend", "shape", "teacher", "how", "before", "after", "x faster", "apart", ""], cells)
