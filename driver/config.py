"""The driver's options: one dataclass per part, read by tyro from the command line, saved as YAML with the run.

The text under a field is its help. The defaults are those of the embedded digits; a recipe (recipes.py) has others.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import docstring_parser
import tyro
import yaml

from .files import replacing

FILE = "config.yaml"


class UserError(Exception):
    """Something the user can put right: shown as one message, without a traceback."""


def helpful(cls: type) -> type:
    """The text under each field as one paragraph of help: tyro by itself keeps the line breaks of indented text."""
    types = dict(cls.__annotations__)
    for option in docstring_parser.parse_from_object(cls).params:
        text = tyro.conf.arg(help=" ".join((option.description or "").split()))
        types[option.arg_name] = Annotated[types[option.arg_name], text]
    cls.__annotations__ = types
    return cls


def missing(what: str, package: str, error: ImportError, extra: str = "driver") -> str:
    """What to type where an optional package is not installed."""
    return f'{what} needs {package}, which is not installed ({error}). Type:\n\n    pip install -e ".[{extra}]"\n'


@helpful
@dataclass(frozen=True)
class Data:
    """Images, views and augmentation."""

    source: Literal["digits", "cifar10", "folder", "webdataset"] = "digits"
    """`digits`: scikit-learn's, embedded. `cifar10`: downloaded by torchvision into `root`, or read from a folder of
    classes there. `folder`: images under `root`, flat, with a subfolder per class, or in `train/` and `val/` of such.
    `webdataset`: the .tar shards in the folder `root`."""
    root: Path | None = None
    """Where the images are. Alone, with no recipe, it chooses the recipe `images`."""
    size: int = 8
    """Side of the square images that the network sees, pixels."""
    batch_size: int = 128
    """Images of one micro-batch on one rank; each gives `views` + `local_views` views."""
    virtual_batch: Annotated[int, tyro.conf.arg(aliases=["--virtual-batch"])] = 0
    """Images per optimiser step, over all ranks and micro-batches; a multiple of batch_size times ranks. The loss is
    over all of them; the memory is that of one micro-batch. 0: batch_size times ranks."""
    views: int = 2
    """Augmented views of `size` per image. The first two give targets and keys; further ones are matched to them."""
    local_views: int = 0
    """Further, small views of `local_size`, matched to the targets of the first two."""
    local_size: int = 96
    """Side of a local view, pixels."""
    global_scale: tuple[float, float] = (0.2, 1.0)
    """Least and largest share of the image's area that a view takes (not of the digits, which are moved as a whole)."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """The same of a local view."""
    augmentation: Literal["digits", "simclr", "dino"] = "digits"
    """`digits`: move, gamma, contrast, noise. `simclr`: crop, flip, colour, grey, blur. `dino`: the same, with blur and
    solarisation by view, as BAM published it: DINO's with a stronger saturation."""
    augment: float = 1.0
    """Strength of the augmentation, a multiple of the built-in one; crops keep their scales. 0: the images as they
    are."""
    blur: float = 0.3
    """Probability of the blur in `simclr`."""
    held_out: float = 0.25
    """Share of the labelled images kept out of training for the evaluation, where the source has no such part of
    its own (CIFAR-10 and a folder with `val/` have)."""
    on_device: bool = False
    """Decode every image once to `size` and keep all on the device, where they are augmented. For small sets."""
    max_unreadable: float = 0.01
    """Largest share of images that may be unreadable. Up to it each is named once, and another image takes its
    place; beyond it the run ends."""
    workers: int = 2
    """Processes that decode and augment. 0: the main process. Images that are on the device need them at the
    start alone, to decode."""


@helpful
@dataclass(frozen=True)
class Boxes:
    """ContrastiveCrop (Peng et al., CVPR 2022): crops around what the network attends to."""

    every: int = 0
    """Epochs between refreshes of the images' boxes. 0: plain random crops."""
    after: int = 0
    """Epochs before the first boxes."""
    threshold: float = 0.1
    """Share of an image's strongest attention (ViT) or feature norm (others) from which a place is in its box."""
    alpha: float = 0.6
    """Centres are drawn in the box from Beta(alpha, alpha): below 1 they avoid the middle, 1 is uniform."""


@helpful
@dataclass(frozen=True)
class Model:
    """Backbone, projection head and teacher."""

    name: str = "convnet"
    """Backbone: `convnet` (built in) or any model of timm, which then has its options below."""
    weights: Path | None = None
    """Start the backbone from this file: an exported one, a checkpoint of the driver, or one of the authors'."""
    norm: Literal["batch", "layer", "none"] = "batch"
    """Normalisation in `convnet` and the head: `batch`, by the statistics of one micro-batch of one rank; `layer`, by
    each image's own (then the run does not depend on ranks and micro-batches); `none`. Models of timm keep theirs."""
    width: int = 32
    """Channels of the first stage of `convnet`; doubled at each stage, up to 8 times."""
    sync_batch_norm: bool = False
    """Batch norms, also those of timm's models, by the statistics of one micro-batch of every rank. GPUs only."""
    stem: Literal["own", "small"] = "own"
    """`small`: in ResNets a 3x3 convolution of stride 1 and no max-pool at the beginning, for images of 32 pixels."""
    heads: int = 0
    """Attention heads in a ViT. 0: the model's own number."""
    positions: Literal["own", "sincos"] = "own"
    """`sincos`: in ViTs fixed 2-D sine and cosine position embeddings."""
    frozen_patches: bool = False
    """ViTs keep their initial patch projection, which steadies training (Chen et al., MoCo v3)."""
    drop_path: float = 0.0
    """Stochastic depth of models of timm."""
    head_layers: int = 2
    """Linear layers of the projection head."""
    head_width: int = 512
    """Hidden units of the projection head."""
    head_dim: int = 128
    """Features that the head gives to the loss."""
    activation: Literal["relu", "gelu"] = "relu"
    """Between the layers of the head."""
    teacher_momentum: float = 0.0
    """Momentum per step of a teacher that follows the student and gives keys and targets. 0: no teacher."""
    teacher_momentum_end: float = 1.0
    """Where the momentum ends, by a cosine over the run."""
    teacher_views: Literal["global", "all"] = "global"
    """What the teacher sees: the first two views, or all, whose rows then take part in the balance (as published)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time. Models of timm."""
    compile: bool = False
    """torch.compile student and teacher."""
    channels_last: bool = True
    """Convolutions with channels as the last dimension in memory."""


@helpful
@dataclass(frozen=True)
class Loss:
    """BAM's own options; `bam_kernels.bam_loss` explains them."""

    temperature: float = 0.1
    """Softmax temperature of the self-attention that is trained (the source)."""
    epsilon: float = 0.025
    """Entropic regularisation of the balanced target: smaller is sharper."""
    epsilon_end: float | None = None
    """Where epsilon ends, by a cosine over the run. None: constant."""
    iterations: int = 3
    """Sinkhorn iterations."""
    top_k: int = 0
    """Columns kept in each row of the target. 0: all."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """What computes the loss. A named one that cannot run here is an error."""


@helpful
@dataclass(frozen=True)
class Optim:
    """The optimiser and its schedules, all by step."""

    name: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    """AdamW, SGD, or LARS or LAMB (from timm, for large batches)."""
    epochs: int = 100
    """Passes over the training images."""
    lr: float = 5e-3
    """Learning rate after the linear warm-up; then a cosine to `lr_end`."""
    lr_end: float = 0.0
    """Learning rate at the end."""
    lr_images: int = 0
    """`lr` is meant for this many images per step and is scaled to the virtual batch (`lr_end` is not). 0: as given."""
    warmup_epochs: float = 5.0
    """Length of the warm-up, epochs."""
    momentum: float = 0.9
    """Of SGD and LARS."""
    weight_decay: float = 0.05
    """Weight decay, decoupled in AdamW and LAMB; norms, biases and other vectors have none."""
    weight_decay_end: float | None = None
    """Where the weight decay ends, by a cosine over the run. None: constant."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient. 0: no clipping."""


@helpful
@dataclass(frozen=True)
class Run:
    """Where and how often things are written."""

    name: str = "digits"
    """Runs are written to ./runs/NAME-001, then NAME-002 and so on."""
    resume: Path | None = None
    """Continue the run in this directory from its newest checkpoint (or from this checkpoint of it, a file), with its
    own options; others given here replace them."""
    stop_after: int | None = None
    """Stop once this many epochs are done, as if interrupted: `resume` goes on. None: run to the end."""
    device: str = "auto"
    """Torch device, e.g. cpu, cuda, cuda:1. auto: the GPU where there is one; under torchrun, one for each rank."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """Arithmetic. bfloat16 and float16 (with gradient scaling): autocast, the weights stay float32. auto: bfloat16 on
    GPUs that have it; else float32, since most CPUs only emulate it, slower. float64 is for comparing runs."""
    deterministic: bool = False
    """Only algorithms that repeat bit for bit, slower: for a GPU run that resumes exactly. CPUs do without."""
    seed: int = 0
    """Seed of weights, order and augmentation. The held-out images are the same for every seed."""
    log_every: int = 20
    """Steps between log lines; only there does the host wait for the device, and do several ranks heed a signal."""
    eval_every: int = 10
    """Epochs between evaluations of the frozen features. 0: before and after only."""
    save_every: int = 10
    """Epochs between checkpoints; the last epoch is always saved."""
    save_steps: int = 0
    """Steps between further checkpoints, within an epoch. 0: none."""
    keep_last: int = 1
    """Newest checkpoints that are kept: checkpoint.pt, and with 2 or more also step-N.pt. A run that goes
    back to an older one removes those after it at its first save."""
    keep_every: int = 0
    """Epochs between checkpoints that are kept for good, as epoch-N.pt. 0: none."""
    neighbours: int = 10
    """Neighbours that vote in the k-NN evaluation."""
    tensorboard: bool = False
    """Also write the curves for TensorBoard, under the run's directory."""
    wandb: str | None = None
    """Also send the curves to this project of Weights & Biases, with the key of `wandb login` or WANDB_API_KEY."""


@helpful
@dataclass(frozen=True)
class Config:
    """Pretrain a vision backbone without labels, by Balanced self-Attention Matching.

    With no option: a small convolutional network on scikit-learn's handwritten digits, on any machine, no download.
    `--recipe NAME --help` shows the values of a recipe.
    """

    recipe: str = "digits"
    """Where all other values come from, each to be replaced by its own option: `digits`; `images` (a folder of yours,
    chosen by `--data.root` alone); `cifar10-resnet18`; `imagenette-vit-s`; and, as published, `imagenet-vit-s`,
    `imagenet-vit-b`, `imagenet-caformer-m36`."""
    config: Path | None = None
    """A YAML file of options, such as the config.yaml of a run; what it leaves out comes from its recipe."""
    data: Data = field(default_factory=Data)
    boxes: Boxes = field(default_factory=Boxes)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


PARTS = {"data": Data, "boxes": Boxes, "model": Model, "loss": Loss, "optim": Optim, "run": Run}


def save(config: Config, directory: Path) -> None:
    """Write config.yaml, which `--config` reads."""
    with replacing(directory / FILE) as temporary:
        temporary.write_text(yaml.safe_dump(as_plain(config), sort_keys=False))


def as_plain(config: Config) -> dict[str, Any]:
    """Nested dictionaries of numbers, strings and lists. What concerns one process alone (config, resume, stop_after)
    is not kept."""
    plain = asdict(replace(config, run=replace(config.run, resume=None, stop_after=None)))
    del plain["config"]
    for part in (plain["data"], plain["model"]):
        for name, value in part.items():
            if isinstance(value, Path):
                part[name] = os.path.abspath(value)
            elif isinstance(value, tuple):
                part[name] = list(value)
    return plain
