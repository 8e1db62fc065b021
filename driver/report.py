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

from driver import history, plots, words
from driver.config import Config
from driver.data import Images, make_images
from driver.evaluate import Embed
from driver.frozen import Backbone, run_script
from driver.gallery import gallery
from driver.page import page
from driver.world import World

PAGE, DASHBOARD = "report.html", "dashboard.png"


def finish(record: history.History, options: Config, directory: Path, images: Images, embed: Embed) -> None:
    """Write both files and print the result and the command that goes on from here."""
    write(record, options, directory, images, embed)
    print(f"\nwritten: {directory}/ {PAGE}, {DASHBOARD}, {history.FILE}, checkpoint.pt, config.yaml")
    if record.last("pixels"):
        print(words.table(record, images.tested))
    if words.collapsed(record):
        print(f"warning: training has collapsed. To try: {'; '.join(words.ADVICE)}")
    why, command = words.next_step(record, options, directory)
    print(f"next, {why}: {command}")


def write(record: history.History, options: Config, directory: Path, images: Images, embed: Embed) -> None:
    """report.html and dashboard.png."""
    plots.dashboard(record, directory / DASHBOARD)
    pictures = gallery(embed, images, int(record.epoch), options.data.batch_size)
    (directory / PAGE).write_text(page(directory.name, record, options, pictures, images.tested, directory))


@dataclass(frozen=True)
class Report:
    """Make report.html and dashboard.png of a run again, from its history and its newest checkpoint."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    device: str = "auto"
    """Torch device, e.g. cpu."""


def main(options: Report, world: World) -> None:
    """Raises: UserError."""
    backbone = Backbone(run=options.run, whose="student", device=options.device)
    config, frozen = backbone.options(), backbone.load()
    images = make_images(config.data, config.boxes, frozen.device, config.run.seed, world)
    write(history.read(options.run), config, options.run, images, frozen.features)
    print(f"written: {options.run}/ {PAGE}, {DASHBOARD}")


if __name__ == "__main__":
    sys.exit(run_script(Report, main))
