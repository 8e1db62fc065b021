"""Draw result files of the benchmarks as PNG files next to them.

python benchmarks/plot.py benchmarks/results/cpu_loss.json
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

RESULTS = Path(__file__).parent / "results"
COLOURS = {
    "cpu": "#1f5fa8",
    "cpu-int16": "#6fa8dc",
    "cpu-split": "#2f5f8f",
    "triton": "#2e7d5b",
    "triton-int16": "#7cc3a0",
    "triton-flash": "#7a4fa0",
    "triton-flash-int16": "#b79ad0",
    "cuda": "#b0306a",
    "cuda-int16": "#dd94b6",
    "triton-int16-graph": "#2e7d5b",
    "triton-flash-int16-graph": "#7a4fa0",
    "cuda-int16-graph": "#b0306a",
    "cuda-int16-again": "#f0c4d6",
    "triton-graph": "#2e7d5b",
    "cuda-graph": "#b0306a",
    "eager": "#b0b0b0",
    "compile": "#8a8a8a",
    "compile-graph": "#5f5f5f",
    "compile-autocast": "#8a8a8a",
    "compile-autocast-graph": "#5f5f5f",
    "gemms": "#d9b44a",
    "gemms-half": "#d9b44a",
    "authors": "#b5533c",
    "authors-autocast": "#b5533c",
    "flash-sinkhorn": "#4aa3a3",
    "flash-sinkhorn-tf32": "#4aa3a3",
    "flash-sinkhorn-graph": "#2f7777",
    "flash-sinkhorn-tf32-graph": "#2f7777",
}
MARKERS = {
    "cpu": "o",
    "cpu-int16": "s",
    "cpu-split": "^",
    "triton": "o",
    "triton-int16": "s",
    "triton-flash": "v",
    "triton-flash-int16": "P",
    "cuda": "<",
    "cuda-int16": ">",
    "eager": "x",
    "compile": "^",
    "authors": "d",
}
Rows = list[dict[str, Any]]


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def groups(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    """Group rows by their values of the keys, in the order of the file."""
    by_values: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        by_values.setdefault(tuple(row[key] for key in keys), []).append(row)
    return by_values


def draw_times(rows: Rows) -> plt.Figure:
    """Plot times, one panel per problem: medians with whiskers from p20 to p80, and the floor for float32 scores."""
    panels = groups(rows, "part", "M", "N", "D")
    heights = [len(panel) + 1 for panel in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 0.29 * sum(heights) + 0.45 * len(panels) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes[:, 0], panels.values(), strict=True):
        draw_panel(axis, panel)
    axes[-1, 0].set_xlabel("milliseconds (log): median, whiskers from p20 to p80")
    first = rows[0]
    figure.suptitle(
        f"{first['device']} ({first['isa']}), {first['threads']} threads, torch {first['torch']}, "
        f"bam_kernels {first['bam_kernels']} at {first['commit']}",
        fontsize=9,
    )
    return figure


def draw_panel(axis: plt.Axes, panel: Rows) -> None:
    for place, row in enumerate(panel):
        median = row["median_ms"]
        if not median:
            axis.text(0.01, place, "failing: " + row["reason"], transform=axis.get_yaxis_transform(), va="center")
            continue
        whiskers = [[median - row["p20_ms"]], [row["p80_ms"] - median]]
        style = {"fmt": "o", "markersize": 8, "capsize": 4, "color": COLOURS[row["kind"]]}
        axis.errorbar(median, place, xerr=whiskers, **style)
        faster = f", {row['x_eager']:.3g} x eager" if row["x_eager"] and row["kind"] != "eager" else ""
        axis.text(row["p80_ms"] * 1.12, place, f"{number(median)} ms{faster}", va="center", fontsize=8)
    timed = [row for row in panel if row["median_ms"]]
    floors = [row["floor_ms"] for row in timed if row["kind"] != "gemms" and row["precision"] == "float32"]
    shown = [row["median_ms"] for row in timed] + floors[:1]
    if floors:
        axis.axvline(floors[0], color="black", linestyle=":", linewidth=1.2)
        label = f" floor {number(floors[0])} ms"
        axis.text(floors[0], 0.03, label, transform=axis.get_xaxis_transform(), fontsize=8)
    axis.set_xscale("log")
    if shown:
        axis.set_xlim(min(shown) / 1.3, max(shown) * 4)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(range(len(panel)), [row["competitor"] for row in panel])
    axis.set_ylim(len(panel), -0.7)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.set_title(title(panel[0]), fontsize=9, loc="left")


def title(row: dict[str, Any]) -> str:
    share = f", one rank's share of {row['W']}" if row["W"] > 1 else ""
    return f"{row['part']}: M={row['M']} N={row['N']} D={row['D']}, {row['iterations']} iterations{share}"


def draw_accuracy(rows: Rows) -> plt.Figure:
    """Plot errors of P and dz against the mean cosine, one column of panels per epsilon."""
    epsilons = list(dict.fromkeys(row["epsilon"] for row in rows))
    size = (max(3.6 * len(epsilons), 4.5), 6.4)
    figure, axes = plt.subplots(2, len(epsilons), figsize=size, sharex=True, sharey=True, squeeze=False)
    for column, epsilon in enumerate(epsilons):
        chosen = [row for row in rows if row["epsilon"] == epsilon]
        for axis, key, name in zip(axes[:, column], ("error_P", "error_gradient"), ("P", "dz"), strict=True):
            for (kind, competitor), line in groups(chosen, "kind", "competitor").items():
                draw_errors(axis, line, key, kind, competitor)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.set_title(f"{name}, epsilon {epsilon:g}", fontsize=10)
    axes[0, 0].set_ylim(top=4 * axes[0, 0].get_ylim()[1])  # room for markers of errors that are not finite
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error against float64")
    for axis in axes[-1]:
        axis.set_xlabel("mean cosine between images")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def draw_errors(axis: plt.Axes, line: Rows, key: str, kind: str, competitor: str) -> None:
    """Plot one competitor's errors; an error that is not finite is a marker with a name at the upper edge."""
    cosines = [f"{row['cosine']:g}" for row in line]
    errors = [math.nan if row[key] is None else row[key] for row in line]
    style = "--" if kind == "eager" else "-"
    axis.plot(cosines, errors, MARKERS[kind] + style, color=COLOURS[kind], label=competitor, alpha=0.85)
    for cosine, error in zip(cosines, errors, strict=True):
        if math.isnan(error):
            place = {"transform": axis.get_xaxis_transform(), "color": COLOURS[kind]}
            axis.plot([cosine], [0.97], MARKERS[kind], clip_on=False, **place)
            axis.text(cosine, 0.955, f"  {kind}: NaN", va="center", fontsize=8, **place)


DRAWN = {"accuracy": draw_accuracy, "loss": draw_times, "sinkhorn": draw_times}


def draw_files(files: Sequence[Path], out: Path | None) -> None:
    """Draw each file (default: all of benchmarks/results) into the directory `out`, or next to the file if None."""
    for file in files or sorted(RESULTS.glob("*.json")):
        rows = json.loads(file.read_text())
        draw = DRAWN.get(rows[0]["benchmark"])
        if draw is None:
            print(f"{file}: rows of {rows[0]['benchmark']} are for reading, not drawn")
            continue
        picture = (out or file.parent) / f"{file.stem}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(picture, dpi=130)
        print(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="result files to draw (default: all of benchmarks/results)")
    parser.add_argument("--out", type=Path, help="directory of the pictures (default: next to each file)")
    options = parser.parse_args()
    draw_files(options.files, options.out)


if __name__ == "__main__":
    main()
