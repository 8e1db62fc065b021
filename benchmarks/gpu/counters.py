"""Tables of Nsight Compute's counters, one line per kernel.

The files come from `ncu --page raw --csv --print-units base --log-file FILE ...`. Each number is the median over a
kernel's launches. Stalls are cycles that a warp waits per instruction issued.
"""

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from steps import table

DURATION = ("gpu__time_duration.sum",)
DRAM = (
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)
SM = ("sm__throughput.avg.pct_of_peak_sustained_elapsed",)
INSTRUCTIONS = ("smsp__inst_executed.sum", "sm__inst_executed.sum")
STALL = re.compile(r"issue_stalled_(\w+)_per_issue_active")
NOT_STALLS = ("selected", "not_selected")  # states of a warp that issues, and of one that could


@dataclass(frozen=True)
class KernelCounters:
    """Counters of one kernel, None if the profiler did not count it; reasons of stalls, the longest first."""

    kernel: str
    launches: int
    us: float | None
    dram_percent: float | None
    sm_percent: float | None
    instructions: float | None
    stalls: tuple[tuple[str, float], ...]


def launches(file: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (kernel, metrics) of each launch. The table's second line holds units: times are in nanoseconds."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.startswith('"')]
    for row in csv.DictReader(lines):
        if not row.get("ID"):
            continue
        values = {}
        for name, text in row.items():
            try:
                values[name] = float((text or "").replace(",", ""))
            except ValueError:
                continue
        yield short(row["Kernel Name"]), values


def short(name: str) -> str:
    """Short name of a kernel: "match" for "void bam::cuda::match_kernel<short, false>(Args)"."""
    return name.split("(")[0].split("<")[0].split()[-1].split("::")[-1].removesuffix("_kernel")


def read_counters(file: Path) -> list[KernelCounters]:
    """Counters of each kernel, in the order of the file."""
    by_kernel: dict[str, list[dict[str, float]]] = defaultdict(list)
    for kernel, values in launches(file):
        by_kernel[kernel].append(values)
    return [median_counters(kernel, rows) for kernel, rows in by_kernel.items()]


def median_counters(kernel: str, rows: list[dict[str, float]]) -> KernelCounters:
    def middle(names: tuple[str, ...]) -> float | None:
        for name in names:
            if found := [row[name] for row in rows if name in row]:
                return median(found)
        return None

    stalls = []
    for name in rows[0]:
        stall = STALL.search(name)
        if stall and stall[1] not in NOT_STALLS and not stall[1].endswith("_not_issued"):
            value = middle((name,))
            stalls.append((stall[1], value if value is not None else 0.0))
    ns = middle(DURATION)
    longest = tuple(sorted(stalls, key=lambda item: -item[1])[:3])
    us = ns / 1e3 if ns is not None else None
    return KernelCounters(kernel, len(rows), us, middle(DRAM), middle(SM), middle(INSTRUCTIONS), longest)


def counter_table(rows: list[KernelCounters]) -> str:
    def text(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    cells = [
        [
            row.kernel,
            str(row.launches),
            text(row.us),
            text(row.dram_percent, 0),
            text(row.sm_percent, 0),
            text(row.instructions / 1e6 if row.instructions is not None else None, 2),
            ", ".join(f"{name} {value:.1f}" for name, value in row.stalls),
        ]
        for row in rows
    ]
    return table(["kernel", "launches", "us", "DRAM %", "SM %", "M warp instructions", "stalls"], cells)


def main() -> int:
    for name in sys.argv[1:]:
        print(f"{name}\n{counter_table(read_counters(Path(name)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
