"""The driver's options: one dataclass per part, read by tyro from the command line, saved as JSON with the run.

The text under a field is its help. The defaults are those of the embedded digits; with a folder of images,
`folder_defaults` takes their place.
"""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


class UserError(Exception):
    """Something the user can put right: shown as one message, without a traceback."""


def missing(what: str, package: str, error: ImportError) -> str:
    """What to type where an optional package is not installed."""
    return f'{what} needs {package}, which is not installed ({error}). Type:\n\n    pip install -e ".[driver]"\n'


@dataclass(frozen=True)
class Data:
    """Images, views and augmentation."""

    root: Path | None = None
    """Folder of images, with one subfolder per class or flat. None: the embedded handwritten digits."""
    size: int = 8
    """Side of the square images that the network sees, pixels. With a folder: 96."""
    batch_size: int = 128
    """Images of one micro-batch on one rank; each gives `views` views. With a folder: 256."""
    virtual_batch: Annotated[int, tyro.conf.arg(aliases=["--virtual-batch"])] = 0
    """Images per optimiser step, over all ranks and micro-batches; a multiple of batch_size times ranks. The loss is
    over all of them; the memory is that of one micro-batch. 0: batch_size times ranks."""
    views: int = 2
    """Augmented views per image. The first two give targets and keys; further ones are matched to them."""
    augment: float = 1.0
    """Strength of the augmentation, a multiple of the built-in one. 0: none."""
    held_out: float = 0.25
    """Share of the labelled images kept out of training for the k-NN evaluation. With a folder: 0.1."""
    workers: int = 2
    """Processes that decode and augment the images of a folder. 0: the main process. Digits need none."""


@dataclass(frozen=True)
class Model:
    """Backbone, projection head and teacher."""

    name: str = "convnet"
    """Backbone: `convnet` (built in) or any model of timm. With a folder: resnet18."""
    norm: Literal["batch", "layer"] = "batch"
    """Normalisation in `convnet` and the head: `batch`, by the statistics of one micro-batch of one rank, or `layer`,
    by each image's own (then the run does not depend on ranks and micro-batches). Models of timm keep theirs."""
    width: int = 32
    """Channels of the first stage of `convnet`; doubled at each stage, up to 8 times."""
    head_width: int = 512
    """Hidden units of the projection head."""
    head_dim: int = 128
    """Features that the head gives to the loss."""
    teacher_momentum: float = 0.0
    """Momentum per step of a teacher that follows the student and gives keys and targets. 0: no teacher."""


@dataclass(frozen=True)
class Loss:
    """BAM's own options; `bam_kernels.bam_loss` explains them."""

    temperature: float = 0.1
    """Softmax temperature of the self-attention that is trained (the source)."""
    epsilon: float = 0.025
    """Entropic regularisation of the balanced target: smaller is sharper. With a folder: 0.05."""
    iterations: int = 3
    """Sinkhorn iterations."""
    top_k: int = 0
    """Columns kept in each row of the target. 0: all."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """What computes the loss. A named one that cannot run here is an error."""


@dataclass(frozen=True)
class Optim:
    """The optimiser, with linear warm-up and cosine decay, by step."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9."""
    epochs: int = 100
    """Passes over the training images."""
    lr: float = 5e-3
    """Learning rate after the warm-up. With a folder: 0.001."""
    warmup_epochs: float = 5.0
    """Length of the warm-up, epochs. With a folder: 10."""
    weight_decay: float = 0.05
    """Weight decay, decoupled in AdamW; norms and biases have none."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient. 0: no clipping."""


@dataclass(frozen=True)
class Run:
    """Where and how often things are written."""

    name: str = "digits"
    """Runs are written to ./runs/NAME-001, then NAME-002 and so on. With a folder: the folder's name."""
    resume: Path | None = None
    """Continue this run's directory from its checkpoint, with its own options; others given here replace them."""
    stop_after: int | None = None
    """Stop once this many epochs are done, as if interrupted: `resume` goes on. None: run to the end."""
    device: str = "auto"
    """Torch device, e.g. cpu, cuda, cuda:1. auto: the GPU where there is one; under torchrun, one for each rank."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of weights, activations and loss. float64 is for comparing runs."""
    seed: int = 0
    """Seed of weights, order and augmentation. The held-out images are the same for every seed."""
    log_every: int = 20
    """Steps between log lines; only there does the host wait for the device."""
    eval_every: int = 10
    """Epochs between k-NN evaluations. 0: before and after only."""
    save_every: int = 10
    """Epochs between checkpoints; the last epoch is always saved."""
    neighbours: int = 10
    """Neighbours that vote in the k-NN evaluation."""


@dataclass(frozen=True)
class Config:
    """Pretrain a vision backbone without labels, by Balanced self-Attention Matching.

    With no option: a small convolutional network on scikit-learn's handwritten digits, on any machine, no download.
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


PARTS = {"data": Data, "model": Model, "loss": Loss, "optim": Optim, "run": Run}


def folder_defaults(root: Path) -> Config:
    """What fits a folder of photographs better than the defaults of the digits."""
    return Config(
        data=Data(root=root, size=96, batch_size=256, held_out=0.1),
        model=Model(name="resnet18"),
        loss=Loss(epsilon=0.05),
        optim=Optim(epochs=100, lr=1e-3, warmup_epochs=10),
        run=Run(name=Path(os.path.abspath(root)).name or "images"),
    )


def parse(args: list[str] | None = None) -> Config:
    """The command line as a checked Config. With --run.resume, the saved options are the defaults."""
    config = tyro.cli(Config, args=args)
    if config.run.resume is not None:
        config = tyro.cli(Config, args=args, default=load(config.run.resume))
    elif config.data.root is not None:
        config = tyro.cli(Config, args=args, default=folder_defaults(config.data.root))
    check(config)
    return config


def save(config: Config, directory: Path) -> None:
    """Write config.json."""
    (directory / "config.json").write_text(json.dumps(as_plain(config), indent=2) + "\n")


def load(directory: Path) -> Config:
    """The options that `save` wrote. Raises: UserError."""
    path = directory / "config.json"
    try:
        return from_plain(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--run.resume {directory}: not the directory of a run ({path}: {error})") from error


def as_plain(config: Config) -> dict[str, Any]:
    """Nested dictionaries of numbers and strings. What concerns one process alone (resume, stop_after) is not kept."""
    plain = asdict(replace(config, run=replace(config.run, resume=None, stop_after=None)))
    if config.data.root is not None:
        plain["data"]["root"] = str(config.data.root.absolute())
    return plain


def from_plain(plain: dict[str, Any]) -> Config:
    parts = {name: part(**plain[name]) for name, part in PARTS.items()}
    root = parts["data"].root
    parts["data"] = replace(parts["data"], root=None if root is None else Path(root))
    return Config(**parts)


def check(config: Config) -> None:
    """Numbers within their bounds. Raises: UserError."""

    def value_of(option: str) -> float:
        part, name = option.split(".")
        return getattr(getattr(config, part), name)

    least = {
        "data.size": 1,
        "data.batch_size": 2,
        "data.virtual_batch": 0,
        "data.views": 2,
        "data.augment": 0,
        "data.workers": 0,
        "model.width": 1,
        "model.head_width": 1,
        "model.head_dim": 1,
        "optim.epochs": 1,
        "optim.lr": 0,
        "optim.warmup_epochs": 0,
        "optim.weight_decay": 0,
        "optim.clip_norm": 0,
        "run.log_every": 1,
        "run.eval_every": 0,
        "run.save_every": 1,
        "run.neighbours": 1,
    }
    for option, low in least.items():
        value = value_of(option)
        if not value >= low:
            raise UserError(f"--{option} must be at least {low}, got {value}")
    for option in ("data.held_out", "model.teacher_momentum"):
        value = value_of(option)
        if not 0 <= value < 1:
            raise UserError(f"--{option} must be at least 0 and below 1, got {value}")
    if config.run.stop_after is not None and config.run.stop_after < 1:
        raise UserError(f"--run.stop_after must be at least 1, got {config.run.stop_after}")
    if not config.run.name or os.path.basename(config.run.name) != config.run.name:
        raise UserError(f"--run.name must be a plain name without slashes, got {config.run.name!r}")
