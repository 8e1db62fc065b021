"""Curves of a run, one function a panel: dashboard.png shows all panels, report.html each as an SVG image."""

import io
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..history import History

INK, BLUE, RED, GREEN, GREY = "#20242b", "#1f5fa8", "#c8553d", "#2f8559", "#8a9099"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
}
PANEL_INCHES = (4.6, 3.3)

Panel = Callable[[Axes, History], None]


def dashboard(history: History, path: Path) -> None:
    """Write a PNG of all panels whose numbers were recorded, three to a row."""
    panels = [panel for _, panel in panels_of(history)]
    rows = -(-len(panels) // 3)
    with rc_context(STYLE):
        figure = Figure(figsize=(3 * PANEL_INCHES[0], rows * PANEL_INCHES[1]), layout="constrained", dpi=110)
        for axis, panel in zip(chain.from_iterable(figure.subplots(rows, 3, squeeze=False)), panels, strict=False):
            draw(axis, panel, history)
        for axis in figure.axes:
            axis.set_axis_on() if axis.has_data() else axis.set_axis_off()
        # A folder's name may hold bytes that are no text, and dollar signs that are no formula.
        name = os.fsencode(path.absolute().parent.name).decode(errors="backslashreplace")
        figure.suptitle(name, x=0.01, ha="left", weight="bold", fontsize=14, parse_math=False)
        figure.savefig(path, format="png")


def svg(panel: Panel, history: History) -> str:
    """SVG text of one panel."""
    return as_svg(lambda axis: draw(axis, panel, history))


def as_svg(paint: Callable[[Axes], None]) -> str:
    """SVG text of a figure whose only axes `paint` fills."""
    with rc_context(STYLE):
        figure = Figure(figsize=PANEL_INCHES, layout="constrained")
        paint(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def draw(axis: Axes, panel: Panel, history: History) -> None:
    """Draw a panel over epochs, with a dotted line where the run warned of collapse or of a loss at its ceiling."""
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel(axis, history)
    for line in axis.lines:
        if len(line.get_xdata()) == 1:  # a line through one point would not be seen
            line.set_marker("o")
    axis.set_xlim(left=0)
    for trouble in chain(history.of("collapse"), history.of("ceiling")):
        axis.axvline(trouble["epoch"], color=RED, lw=1, ls=":")


def panels_of(history: History) -> list[tuple[str, Panel]]:
    """Names and drawing functions of the panels whose numbers were recorded."""
    train, tests = history.last("train") or {}, history.last("evaluation") or {}
    known = {**train, **tests}
    return [(needed.replace("_", " "), panel) for needed, panel in PANELS if known.get(needed) is not None]


def series(history: History, kind: str, name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one number. None, the history's mark of a number that is not finite, becomes a gap (NaN)."""
    rows = history.of(kind)
    return [row["epoch"] for row in rows], [np.nan if row.get(name) is None else row[name] for row in rows]


def loss(axis: Axes, history: History) -> None:
    epochs, ceiling = series(history, "train", "uniform_loss")
    floor = series(history, "train", "target_entropy")[1]
    axis.fill_between(epochs, floor, ceiling, color=GREY, alpha=0.12, lw=0)
    axis.plot(epochs, series(history, "train", "loss")[1], color=BLUE, lw=2, label="loss")
    axis.plot(epochs, ceiling, color=GREY, ls="--", label="ceiling: collapse")
    axis.plot(epochs, floor, color=RED, ls="--", label="floor: target's entropy")
    axis.set(title="Loss, between floor and ceiling", ylabel="nats")
    axis.margins(y=0.1)
    legend_below(axis)


def entropies(axis: Axes, history: History) -> None:
    axis.plot(*series(history, "train", "uniform_loss"), color=GREY, ls="--", label="uniform")
    axis.plot(*series(history, "train", "source_entropy"), color=GREEN, lw=2, label="source")
    axis.plot(*series(history, "train", "target_entropy"), color=RED, lw=2, label="target")
    axis.set(title="Entropy of the attention", ylabel="nats")
    legend_below(axis)


def column_residual(axis: Axes, history: History) -> None:
    epochs, residual = series(history, "train", "column_residual")
    axis.plot(epochs, residual, color=BLUE, lw=2)
    axis.set(title="Column residual before the last step", ylabel="max |c / mean(c) - 1|")
    if 0 < 30 * np.nanmin(residual) < np.nanmax(residual):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)


def accuracy(name: str, title: str) -> Panel:
    def paint(axis: Axes, history: History) -> None:
        pixels = history.last("pixels") or {}
        for key, label, color in ((name, "as they are", BLUE), (f"{name}_moved", "shifted and rotated", RED)):
            axis.plot(*series(history, "evaluation", key), "o-", ms=3.5, color=color, label=label, clip_on=False)
            if key in pixels:
                axis.axhline(pixels[key], color=color, ls=":", lw=1.2, label="raw pixels")
        axis.set(title=title, ylabel="held-out accuracy", ylim=(None, 1.01))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        legend_below(axis)

    return paint


def spread(axis: Axes, history: History) -> None:
    axis.plot(*series(history, "evaluation", "effective_rank"), "o-", ms=3.5, color=BLUE, label="effective rank")
    axis.set(title="Spread of the features", ylabel="effective rank")
    right = axis.twinx()
    right.plot(
        *series(history, "evaluation", "feature_std"), "s--", ms=3.5, color=GREEN, label="standard deviation (right)"
    )
    right.set_ylabel("standard deviation")
    for side in (axis, right):
        side.update_datalim([(0, 0)])  # from 0, with the usual margin above
        side.autoscale_view()
        side.set_ylim(bottom=0)
    right.grid(False)
    lines = [*axis.get_lines(), *right.get_lines()]
    axis.legend(
        lines, [str(line.get_label()) for line in lines], loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2
    )


def throughput(axis: Axes, history: History) -> None:
    axis.plot(*series(history, "train", "images_per_s"), color=BLUE, lw=1.5)
    axis.set(title="Throughput", ylabel="images/s")
    axis.set_ylim(bottom=0)


def data_wait(axis: Axes, history: History) -> None:
    axis.plot(*series(history, "train", "data_wait"), color=RED, lw=1.5)
    axis.set(title="Time spent waiting for images", ylabel="share of the time", ylim=(0, 1))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def learning_rate(axis: Axes, history: History) -> None:
    axis.plot(*series(history, "train", "lr"), color=BLUE, lw=1.5)
    axis.set(title="Learning rate")
    axis.set_ylim(bottom=0)


PANELS: list[tuple[str, Panel]] = [
    ("loss", loss),
    ("source_entropy", entropies),
    ("column_residual", column_residual),
    ("knn", accuracy("knn", "k-NN")),
    ("linear", accuracy("linear", "Linear classifier on frozen features")),
    ("effective_rank", spread),
    ("images_per_s", throughput),
    ("data_wait", data_wait),
    ("lr", learning_rate),
]
"""All panels in order, each with the number that must have been recorded for it to be shown."""


def projection(points: np.ndarray, labels: np.ndarray, title: str) -> str:
    """SVG text of a scatter plot of (n, 2) points, coloured by label.

    Points of the first ten classes are coloured, all others grey. With two to ten classes, each class has its label
    at the median of its points.
    """
    few = labels.max(initial=0) < 10

    def paint(axis: Axes) -> None:
        shown = labels < 10
        axis.scatter(*points[~shown].T, s=6, color=GREY, alpha=0.4, lw=0)
        axis.scatter(*points[shown].T, s=12, c=labels[shown], cmap="tab10", vmin=-0.5, vmax=9.5, lw=0, alpha=0.85)
        axis.set(title=title, xticks=[], yticks=[])
        axis.set_xlabel("first principal component")
        axis.set_ylabel("second")
        if few and labels.max(initial=0) > 0:
            for label in np.unique(labels):
                centre = np.median(points[labels == label], axis=0)
                axis.annotate(str(label), centre, weight="bold", ha="center", va="center", fontsize=12)

    return as_svg(paint)


def legend_below(axis: Axes) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3 if len(axis.get_lines()) == 3 else 2)
