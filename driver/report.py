"""Make the report of a run again: report.html and dashboard.png.

python driver/report.py RUN_DIR          also of a run that is under way or was killed
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro

from driver import checkpoint, history
from driver.cli import check_folder, run_script
from driver.config import FILE, UserError, helpful
from driver.data import make_images
from driver.distributed import World
from driver.evaluation.frozen import Backbone
from driver.reporting import outputs, plots


@helpful
@dataclass(frozen=True)
class Report:
    """Make report.html and dashboard.png of a run again, from its history and its newest checkpoint."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    device: str = "auto"
    """Torch device, e.g. cpu. auto: the GPU where there is one."""


def main(options: Report, world: World) -> None:
    """Write both files. Without a checkpoint or images they have no pictures, and a note says why.

    Raises: UserError where the folder is not a run's, or the run has neither a log line nor an evaluation yet.
    """
    run = options.run
    if run.name in ("", ".."):
        run = Path(os.path.abspath(run))  # its name is the title of the page
    if not (run / FILE).is_file():
        raise UserError(f"{run}: not the directory of a run, no {FILE} there")
    check_folder(run, str(run), outputs.PAGE, outputs.DASHBOARD)
    backbone = Backbone(run=run, whose="student", device=options.device)
    config, record, missing = backbone.options(), history.read(run), None
    if not plots.panels_of(record):
        raise UserError(f"{run / history.FILE}: no log line and no evaluation in it, nothing to report yet")
    if (run / checkpoint.FILE).is_file():
        frozen = backbone.load()
        try:
            images = make_images(config.data, config.boxes, frozen.device, config.run.seed, world)
            outputs.write(record, config, run, images, frozen.features)
        except UserError as error:
            missing = str(error)
    else:
        missing = f"{run}: no {checkpoint.FILE} yet"
    if missing is not None:
        print(f"note: no pictures; {missing}")
        outputs.write_with(missing, None, record, config, run)
    print(f"written: {run}/ {outputs.PAGE}, {outputs.DASHBOARD}")


if __name__ == "__main__":
    sys.exit(run_script(Report, main))
