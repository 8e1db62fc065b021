"""What a study of the hardware foretold of an H200 before anything had run there, beside what was measured.

python benchmarks/predictions.py --results DIR      # the directory that h200.py wrote
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from command_line import options_of
from common import plain_table, write_json

OURS = ("triton-int16", "cuda-int16")
GRAPHS = ("triton-int16-graph", "cuda-int16-graph")
FLASH = ("triton-flash-int16",)
IN_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


@dataclass(frozen=True)
class Prediction:
    """The least that rows of these kinds have of a field in part's file, in `unit` of it, is between low and high."""

    what: str
    low: float
    high: float
    part: str
    kinds: tuple[str, ...]
    field: str = "median_ms"
    unit: float = 1e-3
    unit_name: str = "us"
    shape: str | None = None  # of a part of several


def step(what: str, low: float, high: float, part: str, *kinds: str) -> Prediction:
    return Prediction(what, low, high, part, kinds)


def peak(what: str, low: float, high: float, part: str, *kinds: str, shape: str | None = None) -> Prediction:
    return Prediction(what, low, high, part, kinds, "peak_bytes", 1e9, "GB", shape)


WIDE, NARROW, SMALL = "loss-2048x8192x4096-teacher", "loss-2048x8192x256-teacher", "loss-512x512x256-teacher"
PREDICTIONS = (
    step("three products, D = 4096", 500, 560, WIDE, "gemms"),
    step("step, D = 4096", 563, 700, WIDE, *OURS),
    step("authors under autocast, D = 4096", 1800, 2100, WIDE, "authors-autocast"),
    step("compiled reference under autocast, D = 4096", 950, 1150, WIDE, "compile-autocast"),
    step("step, D = 256", 66, 130, NARROW, *OURS),
    step("authors under autocast, D = 256", 1200, 1500, NARROW, "authors-autocast"),
    step("compiled reference under autocast, D = 256", 300, 400, NARROW, "compile-autocast"),
    step("step of 512 x 512 as a graph", 1, 25, SMALL, *GRAPHS),
    step("authors, 512 x 512", 1000, 1500, SMALL, "authors"),
    peak("memory of a step, D = 4096", 0.07, 0.14, WIDE, *OURS),
    peak("memory of the authors' step, D = 4096", 0.6, 0.8, WIDE, "authors"),
    peak("memory, N = 524288, D = 4096", 4.3, 8.6, "ladder-524288-teacher", *OURS, shape="2048x524288x4096"),
    peak("memory of flash, N = 524288, D = 256", 0.0, 0.34, "ladder-524288", *FLASH, shape="2048x524288x256"),
)
KERNELS = {"sinkhorn_pass": ("Sinkhorn pass, 2048 x 8192 int16", 8, 10), "match": ("match, 2048 x 8192 int16", 14, 18)}


@dataclass
class PredictionOptions:
    results: Path
    """Where h200.py wrote its rows."""


def measured(prediction: Prediction, results: Path) -> float | None:
    """The best of the rows that passed; None where there is none."""
    file = results / f"{prediction.part}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    found = [
        row[prediction.field] / prediction.unit
        for row in rows
        if row["kind"] in prediction.kinds
        and row.get(prediction.field) is not None
        and prediction.shape in (None, "x".join(str(row[letter]) for letter in "MND"))
    ]
    return min(found, default=None)


def durations_us(log: Path) -> Iterator[tuple[str, float]]:
    """(kernel, duration) of every launch that Nsight Compute has put into a log as comma-separated values."""
    lines = log.read_text().splitlines() if log.exists() else []
    table = [line for line in lines if line.startswith('"')]
    for row in csv.DictReader(table):
        if row.get("Metric Name") == "Duration":
            yield row["Kernel Name"], float(row["Metric Value"].replace(",", "")) * IN_US[row["Metric Unit"]]


def outcomes(results: Path) -> list[dict[str, Any]]:
    """A row for each prediction; `measured` is "-" where nothing was."""
    found = [(p.what, p.low, p.high, p.unit_name, measured(p, results)) for p in PREDICTIONS]
    times = list(durations_us(results / "counters.log"))
    for kernel, (what, low, high) in KERNELS.items():
        of_kernel = [time for name, time in times if re.search(rf"\b{kernel}(_kernel|\b)", name)]
        found.append((what, low, high, "us", median(of_kernel) if of_kernel else None))
    return [
        {
            "prediction": what,
            "low": low,
            "high": high,
            "unit": unit,
            "measured": "-" if value is None else value,
            "held": "-" if value is None else low <= value <= high,
        }
        for what, low, high, unit, value in found
    ]


def main(options: PredictionOptions) -> int:
    rows = outcomes(options.results)
    print(plain_table(rows))
    write_json(options.results / "predictions.json", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(options_of(PredictionOptions, __doc__)))
