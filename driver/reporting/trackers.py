"""Sinks of a run's history that send its numbers to TensorBoard and to Weights & Biases."""

import uuid
from pathlib import Path
from typing import Any

from bam_kernels.whole_files import replacing

from ..config import Config, UserError, as_plain, missing
from ..history import Row

NOT_VALUES = ("kind", "step")
"""Entries of a history row that name and date its values."""


class TensorBoard:
    """Writer of TensorBoard scalars and texts into RUN_DIR/tensorboard.

    `step` is where a resumed run begins: scalars of later steps, written before the run ended, are dropped.
    """

    def __init__(self, directory: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(missing("--run.tensorboard True", "tensorboard", error)) from error
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)

    def __call__(self, row: Row) -> None:
        for name, value in values(row).items():
            add = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
            add(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A W&B run in `project`; a resumed training run continues its W&B run, whose id is in wandb-id.txt.

    W&B takes its key from `wandb login` or WANDB_API_KEY.
    """

    def __init__(self, project: str, directory: Path, options: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(missing(f"--run.wandb {project}", "wandb", error, extra="wandb")) from error
        name = directory / "wandb-id.txt"
        if not name.exists():
            with replacing(name) as temporary:
                temporary.write_text(uuid.uuid4().hex[:8])
        try:
            self.run: Any = wandb.init(
                project=project,
                name=directory.name,
                id=name.read_text(),
                dir=str(directory),
                config=as_plain(options),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise UserError(f"--run.wandb {project}: {error}") from error

    def __call__(self, row: Row) -> None:
        self.run.log(values(row), step=row["step"])

    def close(self) -> None:
        self.run.finish()


def values(row: Row) -> dict[str, float | str]:
    """Finite numbers and texts of a history row, named kind/name."""
    return {f"{row['kind']}/{name}": x for name, x in row.items() if name not in NOT_VALUES and x is not None}
