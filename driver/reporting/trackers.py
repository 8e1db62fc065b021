"""TensorBoard and Weights & Biases, as sinks of the history."""

import uuid
from pathlib import Path
from typing import Any

from ..config import Config, UserError, as_plain, missing
from ..history import Row

NOT_SHOWN = ("kind", "step")


class TensorBoard:
    """Scalars under runs/NAME/tensorboard; what was written after `step`, where a resumed run begins, is dropped."""

    def __init__(self, directory: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(missing("--run.tensorboard True", "tensorboard", error)) from error
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)

    def __call__(self, row: Row) -> None:
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of the project, continued when ours is resumed. The key is W&B's own: `wandb login` or WANDB_API_KEY."""

    def __init__(self, project: str, directory: Path, options: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(missing(f"--run.wandb {project}", "wandb", error, extra="wandb")) from error
        name = directory / "wandb-id.txt"
        if not name.exists():
            name.write_text(uuid.uuid4().hex[:8])
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
        self.run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self.run.finish()


def scalars(row: Row) -> dict[str, float]:
    """Names as kind/number."""
    return {f"{row['kind']}/{name}": x for name, x in row.items() if name not in NOT_SHOWN and x is not None}
