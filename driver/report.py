"""What a run leaves behind: report.html, dashboard.png, and a few lines of text.

python driver/report.py RUN_DIR          make them again, also of a run that is under way or was killed
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro

from driver import checkpoint, history, plots, words
from driver.config import Config, UserError
from driver.data import Images, make_images
from driver.evaluate import Embed
from driver.frozen import Backbone, run_script
from driver.gallery import Gallery, gallery
from driver.page import page
from driver.world import World

PAGE, DASHBOARD = "report.html", "dashboard.png"


def finish(record: history.History, options: Config, directory: Path, images: Images, embed: Embed) -> None:
    """Write both files and print the result and the command that goes on from here."""
    write(record, options, directory, images, embed)
    print(f"\nwritten: {directory}/ {PAGE}, {DASHBOARD}, {history.FILE}, checkpoint.pt, config.yaml")
    if record.last("pixels"):
        print(words.table(record, images.tested))
    if trouble := words.trouble(record):
        print(f"warning: {words.ended(record)} To try: {'; '.join(words.ADVICE[trouble])}")
    why, command = words.next_step(record, options, directory)
    print(f"next, {why}: {command}")


def write(record: history.History, options: Config, directory: Path, images: Images, embed: Embed) -> None:
    """report.html and dashboard.png."""
    pictures = gallery(embed, images, int(record.epoch), options.data.batch_size)
    write_with(pictures, images.tested, record, options, directory)


def write_with(
    pictures: Gallery | str, tested: int | None, record: history.History, options: Config, directory: Path
) -> None:
    """The same, of pictures that are made or the reason why there are none."""
    plots.dashboard(record, directory / DASHBOARD)
    (directory / PAGE).write_text(page(directory.name, record, options, pictures, tested, directory))


@dataclass(frozen=True)
class Report:
    """Make report.html and dashboard.png of a run again, from its history and its newest checkpoint."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    device: str = "auto"
    """Torch device, e.g. cpu."""


def main(options: Report, world: World) -> None:
    """Where the checkpoint or the images are missing, without pictures, which is said. Raises: UserError."""
    backbone = Backbone(run=options.run, whose="student", device=options.device)
    config, record, missing = backbone.options(), history.read(options.run), None
    if not plots.panels_of(record):
        raise UserError(f"{options.run / history.FILE}: no log line and no evaluation in it, nothing to report yet")
    if (options.run / checkpoint.FILE).is_file():
        frozen = backbone.load()
        try:
            images = make_images(config.data, config.boxes, frozen.device, config.run.seed, world)
            write(record, config, options.run, images, frozen.features)
        except UserError as error:
            missing = str(error)
    else:
        missing = f"{options.run}: no {checkpoint.FILE} yet"
    if missing is not None:
        print(f"note: no pictures; {missing}")
        write_with(missing, None, record, config, options.run)
    print(f"written: {options.run}/ {PAGE}, {DASHBOARD}")


if __name__ == "__main__":
    sys.exit(run_script(Report, main))
