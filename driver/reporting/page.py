"""A run's report as one HTML page that needs no other file: the values that template.html shows."""

import base64
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..config import Config, as_plain
from ..history import History
from . import plots, summary
from .gallery import Gallery

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
TILES = (
    ("knn", "{:.1%}", "k-NN accuracy"),
    ("linear", "{:.1%}", "linear accuracy"),
    ("loss", "{:.3f}", "loss, nats"),
    ("collapse_gap", "{:z.2f}", "gap to collapse, nats"),
    ("effective_rank", "{:.1f}", "effective rank"),
    ("feature_std", "{:.2f}", "feature standard deviation"),
    ("images_per_s", "{:,.0f}", "images per second"),
    ("data_wait", "{:.1%}", "time waiting for images"),
)
"""Final numbers shown large at the top of the page: name in the history, format, label."""


class Alert(NamedTuple):
    """A warning as a sentence without its full stop, and remedies, the likeliest first."""

    text: str
    advice: tuple[str, ...]


class Tile(NamedTuple):
    """A formatted number and the label under it."""

    number: str
    label: str


class Chart(NamedTuple):
    """An SVG drawing as a data URI."""

    title: str
    uri: str


def page(
    name: str, history: History, options: Config, gallery: Gallery | str, tested: int | None, directory: Path
) -> str:
    """HTML of the whole page. `gallery` is the pictures, or the reason why there are none.

    `tested` is the number of held-out images, None where it is unknown.
    """
    why, command = summary.next_step(history, options, directory)
    return TEMPLATES.get_template("template.html").render(
        name=name,
        verdict=summary.verdict(history, options, tested),
        warnings=warnings(history),
        recovered=summary.trouble(history) is None,
        tiles=tiles(history),
        accuracies=summary.accuracies(history, "after {}"),
        curves=[chart(title, plots.svg(panel, history)) for title, panel in plots.panels_of(history)],
        gallery=gallery,
        projections=projections(gallery) if isinstance(gallery, Gallery) else [],
        why=why.capitalize(),
        command=command,
        configuration=as_plain(options),
        computed_by=summary.computed_by(history),
    )


def warnings(history: History) -> list[Alert]:
    """The warnings that the run gave, in the order of summary.ADVICE."""
    seen = [(summary.warning(row), advice) for kind, advice in summary.ADVICE.items() if (row := history.last(kind))]
    return [Alert(text[0].upper() + text[1:], advice) for text, advice in seen]


def tiles(history: History) -> list[Tile]:
    """The last value of each number in TILES that the history has."""
    known = {**(history.last("train") or {}), **(history.last("evaluation") or {})}
    return [Tile(form.format(known[name]), label) for name, form, label in TILES if known.get(name) is not None]


def projections(gallery: Gallery) -> list[Chart]:
    """Scatter plots of raw pixels and of features by their first two principal components."""
    parts = {"Raw pixels": gallery.pixels, "Features": gallery.features}
    return [chart(title, plots.projection(part.points, part.labels, title)) for title, part in parts.items()]


def chart(title: str, svg: str) -> Chart:
    return Chart(title, f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}")
