"""The report of a run as one HTML page that needs no other file: text, numbers, curves and pictures."""

import base64
from html import escape
from pathlib import Path
from typing import Any

from ..config import Config, as_plain
from ..history import History
from . import plots, summary
from .gallery import Gallery, Picture

STYLE = Path(__file__).with_name("page.css")


def page(
    name: str, history: History, options: Config, gallery: Gallery | str, tested: int | None, directory: Path
) -> str:
    """The whole page. gallery: the pictures, or why there are none; tested: held-out images, where known."""
    why, command = summary.next_step(history, options, directory)
    sections = [
        f"<h1>{escape(name)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in summary.verdict(history, options, tested)),
        warnings(history),
        tiles(history),
        accuracies(history),
        curves(history),
        pictures(gallery) if isinstance(gallery, Gallery) else f'<p class="soft">No pictures: {escape(gallery)}.</p>',
        f"<h2>To go on</h2><p>{escape(why.capitalize())}:</p><pre>{escape(command)}</pre>",
        configuration(options),
    ]
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}: BAM pretraining</title><style>
{STYLE.read_text()}</style></head><body><main>
{body}
</main></body></html>
"""


def warnings(history: History) -> str:
    """Each trouble, when it was seen, and what to try."""
    after = "" if summary.trouble(history) else " It recovered: later log lines are below the ceiling."
    parts = []
    for kind, advice in summary.ADVICE.items():
        if seen := history.last(kind):
            text = summary.warning(seen)
            cures = "".join(f"<li>{escape(cure)}</li>" for cure in advice)
            parts.append(
                f'<div class="warning"><p><b>{escape(text[0].upper() + text[1:])}.</b>{after}</p>'
                f"<p>What to try, the likeliest first:</p><ul>{cures}</ul></div>"
            )
    return "\n".join(parts)


def tiles(history: History) -> str:
    """The final numbers."""
    known = {**(history.last("train") or {}), **(history.last("evaluation") or {})}
    shown = [
        ("knn", "{:.1%}", "k-NN accuracy"),
        ("linear", "{:.1%}", "linear accuracy"),
        ("loss", "{:.3f}", "loss, nats"),
        ("collapse_gap", "{:z.2f}", "gap to collapse, nats"),
        ("effective_rank", "{:.1f}", "effective rank"),
        ("feature_std", "{:.2f}", "feature standard deviation"),
        ("images_per_s", "{:,.0f}", "images per second"),
        ("data_wait", "{:.1%}", "time waiting for images"),
    ]
    cells = [
        f'<div class="card"><b>{form.format(known[name])}</b><span>{label}</span></div>'
        for name, form, label in shown
        if known.get(name) is not None
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def accuracies(history: History) -> str:
    """Raw pixels, the untrained and the trained network."""
    tests, raw = [row for row in history.of("evaluation") if "knn" in row], history.last("pixels")
    if raw is None or not tests:
        return ""
    columns = ("knn", "knn_moved", "linear", "linear_moved")
    rows = {"raw pixels": raw, "network, untrained": tests[0], f"after {summary.epochs(tests[-1]['epoch'])}": tests[-1]}
    body = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td>{row[column]:.1%}</td>" for column in columns) + "</tr>"
        for name, row in rows.items()
    )
    heads = "".join(f"<th>{head}</th>" for head in ("", "k-NN", "k-NN, moved", "linear", "linear, moved"))
    note = (
        "Moved: the same images, randomly shifted and rotated; the training images that they are compared with stay as "
        "they are."
    )
    return (
        f'<h2>Accuracy on held-out images</h2><div class="card scroll"><table class="numbers">'
        f"<tr>{heads}</tr>{body}</table></div><p class='soft'>{note}</p>"
    )


def curves(history: History) -> str:
    images = "".join(figure(plots.svg(panel, history), name) for name, panel in plots.panels_of(history))
    return f'<h2>Curves</h2><div class="panels">{images}</div>' if images else ""


def figure(svg: str, title: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return f'<div class="card"><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></div>'


def pictures(gallery: Gallery) -> str:
    views = "".join(f'<div class="row" {columns(row)}>{"".join(map(image, row))}</div>' for row in gallery.views)
    near = "".join(
        f'<div class="row near" {columns(row)}>{image(row[0])}<span></span>{"".join(map(image, row[1:]))}</div>'
        for row in gallery.neighbours
    )
    known = any(picture.right is not None for row in gallery.neighbours for picture in row)
    frames = " A green frame: of the same class; red: of another." if known else ""
    projections = "".join(
        figure(plots.projection(part.points, part.labels, title), title)
        for part, title in ((gallery.pixels, "Raw pixels"), (gallery.features, "Features"))
    )
    return (
        f'<h2>Views, as the network sees them</h2><div class="card pictures views">{views}</div>'
        '<h2>Nearest neighbours</h2><p class="soft">Left, images kept out of training where there are any; to the '
        f"right, the training images with the most similar features, nearest first.{frames}</p>"
        f'<div class="card pictures">{near}</div>'
        '<h2>Projection</h2><p class="soft">The same images by the two first principal components, coloured by class '
        f'where there are several.</p><div class="columns">{projections}</div>'
    )


def columns(row: list[Picture]) -> str:
    return f'style="--columns: {len(row)}"'


def image(picture: Picture) -> str:
    kinds = ["photo"] if picture.uri.startswith("data:image/jpeg") else []
    if picture.right is not None:
        kinds.append("right" if picture.right else "wrong")
    alt = {None: "", True: "same class", False: "another class"}[picture.right]
    return f'<img class="{" ".join(kinds)}" alt="{alt}" src="{picture.uri}">'


def configuration(options: Config) -> str:
    parts: dict[str, Any] = as_plain(options)
    details = "".join(
        f"<details><summary>{escape(name)}</summary><table>"
        + "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in part.items())
        + "</table></details>"
        for name, part in parts.items()
        if isinstance(part, dict)
    )
    return f'<h2>Configuration</h2><p>Recipe <b>{escape(options.recipe)}</b></p><div class="card">{details}</div>'
