"""Results of a run for people to read: report.html, dashboard.png and a few printed lines."""

from pathlib import Path

from bam_kernels.whole_files import replacing

from .. import history
from ..config import Config
from ..data.images import Images
from ..evaluation.online import Embed
from . import plots, summary
from .gallery import Gallery, gallery
from .page import page

PAGE, DASHBOARD = "report.html", "dashboard.png"


def finish(record: history.History, options: Config, directory: Path, images: Images, embed: Embed) -> None:
    """Write report.html and dashboard.png; print accuracies, a warning where training failed, and the next command."""
    write(record, options, directory, images, embed)
    print(f"\nwritten: {directory}/ {PAGE}, {DASHBOARD}, {history.FILE}, checkpoint.pt, config.yaml")
    if record.last("pixels"):
        print(summary.table(record, images.tested))
    if trouble := summary.trouble(record):
        print(f"warning: {summary.last_loss(record)} To try: {'; '.join(summary.ADVICE[trouble])}")
    why, command = summary.next_step(record, options, directory)
    print(f"next, {why}: {command}")


def write(record: history.History, options: Config, directory: Path, images: Images, embed: Embed) -> None:
    """Write report.html, with a gallery of `images` and their features by `embed`, and dashboard.png."""
    pictures = gallery(embed, images, int(record.epoch), options.data.batch_size)
    write_with(pictures, images.tested, record, options, directory)


def write_with(
    pictures: Gallery | str, tested: int | None, record: history.History, options: Config, directory: Path
) -> None:
    """Write report.html and dashboard.png. `pictures` is a gallery, or the reason why there is none.

    `tested` is the number of held-out images, None where it is unknown.
    """
    with replacing(directory / DASHBOARD) as temporary:
        plots.dashboard(record, temporary)
    with replacing(directory / PAGE) as temporary:
        text = page(directory.name, record, options, pictures, tested, directory)
        # A path may hold bytes that are no text; HTML has an escape for each.
        temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
