"""Prints the results of `measure.py` in a folder: rows against competitors, missing rows, counters, predictions."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from before_after import comparison_table, files
from counters import counter_table, read_counters
from rows import read
from steps import table

AGAINST = (
    ("products", ("gemms-half",)),
    ("compiled", ("compile-autocast-graph", "compile-autocast", "compile-graph", "compile")),
    ("authors", ("authors-autocast", "authors")),
    ("flash-sinkhorn", ("flash-sinkhorn-graph", "flash-sinkhorn")),
    ("flash-sinkhorn tf32", ("flash-sinkhorn-tf32-graph", "flash-sinkhorn-tf32")),
)
Rows = list[dict[str, Any]]


def ratios(rows: Rows) -> str:
    """Table of one problem's rows: times, share of the floor, and speed relative to the best competitor of each kind.

    A row that was wrong or hung shows its reason.
    """
    head = ["row", "us", "p20", "p80", "wall", "host", "peak MB", "error", "floor us", "share"]
    head += [f"x {name}" for name, _ in AGAINST] + [""]
    cells = []
    for row in rows:
        if row["status"] != "ok":
            cells.append([row["competitor"], "FAILING", *[""] * (len(head) - 3), row["reason"][:120]])
            continue
        error = row["error_gradient"] if row["error_gradient"] is not None else row["error_P"]
        cells.append(
            [
                row["competitor"],
                *(us(row[key]) for key in ("median_ms", "p20_ms", "p80_ms", "wall_ms", "host_ms")),
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}",
                "" if error is None else f"{error:.1e}",
                us(row["floor_ms"]),
                f"{row['share_of_floor']:.0%}",
                *(times_faster(row, rows, kinds) for _, kinds in AGAINST),
                row["note"],
            ]
        )
    return table(head, cells)


def us(ms: float | None) -> str:
    return "" if ms is None else f"{1e3 * ms:.1f}"


def times_faster(row: dict[str, Any], rows: Rows, kinds: tuple[str, ...]) -> str:
    """How many times faster a row is than the fastest competitor of these kinds, by CUDA events."""
    others_ms = [other["median_ms"] for other in rows if other["kind"] in kinds and other["median_ms"]]
    return f"{min(others_ms) / row['median_ms']:.2f}" if others_ms and row["kind"] not in kinds else ""


def summary(out: Path) -> str:
    file = out / "rows.json"
    rows: Rows = json.loads(file.read_text()) if file.exists() else []
    parts = [] if rows else ["== No rows"]
    if any(file.exists() for file in files(out)):
        parts += ["== Before and after", comparison_table(out), ""]
    for name in dict.fromkeys(row["problem"] for row in rows):
        parts += [f"== {name}", ratios([row for row in rows if row["problem"] == name]), ""]
    file = out / "not_measured.json"
    if file.exists():
        parts += ["== Not measured", not_measured(json.loads(file.read_text()))]
    for file in sorted(out.glob("ncu-*.csv")):
        parts += ["", f"== {file.name}", counter_table(read_counters(file))]
    return "\n".join(parts)


def not_measured(reasons: dict[str, dict[str, str]]) -> str:
    """List the rows that were not measured; `reasons` says why, by problem and kind.

    Problems with equal kinds and reason share a line.
    """
    problems: dict[tuple[str, str], list[str]] = defaultdict(list)
    for problem, by_kind in reasons.items():
        for why in dict.fromkeys(by_kind.values()):
            kinds = ", ".join(kind for kind in by_kind if by_kind[kind] == why)
            problems[kinds, why].append(problem)
    lines = [f"not measured: {kinds} of {', '.join(names)}: {why}" for (kinds, why), names in problems.items()]
    return "\n".join(lines) or "nothing is missing"


def prediction_table(out: Path) -> str:
    """Table of the predictions for which the folder has measured rows."""
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    from predictions import outcome_table, outcomes

    measured = [one for one in outcomes(read(out / "rows.jsonl")) if one["measured"] is not None]
    held = sum(one["held"] for one in measured)
    return f"{outcome_table(measured)}\n{held} of {len(measured)} held"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(summary(folder), flush=True)
    print(f"\n== Predictions\n{prediction_table(folder)}")
