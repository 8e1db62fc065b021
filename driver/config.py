"""The driver's options: one dataclass per part, read by tyro from the command line, saved as YAML with the run.

The text under a field is its help. The defaults are for the embedded digits; recipes.py holds other sets of values.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import docstring_parser
import tyro
import yaml

from bam_kernels.whole_files import replacing

from .bounds import (
    PIXELS,
    PROCESSES,
    RISING,
    RISING_SHARES,
    SEED,
    SHARE,
    SHARE_BELOW_1,
    TEMPERATURE,
    at_least,
    bounds_of,
)

FILE = "config.yaml"


class UserError(Exception):
    """An error that the user can put right: shown as one message, without a traceback."""


class LostWorker(UserError):
    """Error of a run whose data-loading worker was ended or hangs: the run can go on from its last checkpoint."""


def helpful(cls: type) -> type:
    """Class decorator: the help of an option is the text under its field, as one paragraph, and the option's bound.

    tyro alone would keep the line breaks of indented text.
    """
    types = dict(cls.__annotations__)
    for option in docstring_parser.parse_from_object(cls).params:
        annotation = types[option.arg_name]
        bounds = [f"Must be {bound.words}." for bound in bounds_of(annotation)]
        text = " ".join([*(option.description or "").split(), *bounds])
        types[option.arg_name] = Annotated[annotation, tyro.conf.arg(help=text)]
    cls.__annotations__ = types
    return cls


def missing(what: str, package: str, error: ImportError, extra: str = "driver") -> str:
    """Error message for an optional package that is not installed: what needs it, and the command that installs it."""
    return f'{what} needs {package}, which is not installed ({error}). Type:\n\n    pip install -e ".[{extra}]"\n'


@helpful
@dataclass(frozen=True)
class Data:
    """Images, views and augmentation."""

    source: Literal["digits", "cifar10", "folder", "webdataset"] = "digits"
    """Kind of data set. `digits`: the handwritten digits of scikit-learn, embedded. `cifar10`: CIFAR-10, downloaded by
    torchvision into `root`, or read from class folders there. `folder`: image files under `root`, flat or with a
    subfolder per class; `root` may also hold two such folders, `train/` and `val/` (or `test/`). `webdataset`: the .tar
    shards in the folder `root` and below it, or the one shard `root`."""
    root: Path | None = None
    """Folder of the images. Given without a recipe or a file of options, it selects the recipe `images`."""
    size: Annotated[int, PIXELS] = 8
    """Side of the square images that the network sees, pixels."""
    batch_size: Annotated[int, at_least(2)] = 128
    """Images in one micro-batch of one rank. Each image gives `views` + `local_views` views."""
    virtual_batch: Annotated[int, at_least(0), tyro.conf.arg(aliases=["--virtual-batch"])] = 0
    """Images per optimiser step, over all ranks and micro-batches: a multiple of `batch_size` times the number of
    ranks. The loss is over all these images; the memory is that of one micro-batch. 0: `batch_size` times ranks."""
    views: Annotated[int, at_least(2, 1000)] = 2
    """Augmented views of `size` pixels per image. The first two views give targets and keys; further views are matched
    to these targets."""
    local_views: Annotated[int, at_least(0, 1000)] = 0
    """Additional small views per image, of `local_size` pixels, matched to the targets of the first two views."""
    local_size: Annotated[int, PIXELS] = 96
    """Side of a local view, pixels."""
    global_scale: Annotated[tuple[float, float], RISING_SHARES] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a view of `size` pixels shows. Digits are moved as a whole
    instead."""
    local_scale: Annotated[tuple[float, float], RISING_SHARES] = (0.05, 0.25)
    """Smallest and largest share of the image's area that a local view shows."""
    augmentation: Literal["digits", "simclr", "dino"] = "digits"
    """Random changes of a view. `digits`: move, gamma, contrast, noise. `simclr`: crop, flip, colour, grey, blur.
    `dino`: as `simclr`, but blur and solarisation depend on the view, as BAM published it: DINO's augmentation with
    stronger saturation."""
    augment: Annotated[float, at_least(0, 1000)] = 1.0
    """Strength of the augmentation, a multiple of the built-in strength; crops keep their scales. 0: the images are
    used as they are."""
    blur: Annotated[float, SHARE] = 0.3
    """Probability of blur in the augmentation `simclr`."""
    held_out: Annotated[float, SHARE_BELOW_1] = 0.25
    """Share of the labelled images that is kept out of training for the evaluation, where the source has no such part
    of its own. CIFAR-10 and a folder with `val/` have one."""
    on_device: bool = False
    """Decode every image once to `size` and keep all images on the device, where they are augmented. For small sets."""
    max_unreadable: Annotated[float, SHARE] = 0.01
    """Largest share of the images that may be unreadable. Each unreadable image is named once and another image takes
    its place; beyond this share the run ends with an error. Fewer than 10 are no error while they are at most a quarter
    of the images, except where the share is 0."""
    pixel_range: Annotated[tuple[float, float] | None, RISING] = None
    """Values that become black and white in images of more than 8 bits per sample; values outside become black or white
    too. None: the range of the values' type, 0 to 1 for floats; an image that would lose its levels is unreadable."""
    exif: bool = True
    """Turn images upright by their EXIF orientation. False: as they are stored; only TIFFs are always turned."""
    workers: Annotated[int, at_least(0, PROCESSES)] = 2
    """Processes that decode and augment images. 0: the main process does it. With `on_device`, workers only decode, at
    the start."""

    @property
    def channels(self) -> int:
        """Channels of the images: the digits are grey, photographs are read in RGB."""
        return 1 if self.source == "digits" else 3


@helpful
@dataclass(frozen=True)
class Boxes:
    """ContrastiveCrop (Peng et al., CVPR 2022): crops around what the network attends to."""

    every: Annotated[int, at_least(0)] = 0
    """Epochs between refreshes of the boxes, one box per image around what the network attends to. 0: plain random
    crops."""
    after: Annotated[int, at_least(0)] = 0
    """Epochs before the first boxes."""
    threshold: Annotated[float, SHARE_BELOW_1] = 0.1
    """Attention (ViTs) or feature norm (other models) above which a place is in the image's box. 0 stands for the
    smallest value in the image, 1 for the largest."""
    alpha: Annotated[float, at_least(0.01, 1000)] = 0.6
    """Crop centres are drawn in the box from the distribution Beta(alpha, alpha): values below 1 avoid the middle, 1 is
    uniform."""


@helpful
@dataclass(frozen=True)
class Model:
    """Backbone, projection head and teacher."""

    name: str = "convnet"
    """Backbone: `convnet` (built in) or any model of timm, by its name there."""
    weights: Path | None = None
    """File of initial backbone weights: an export of driver/export.py, a checkpoint of the driver, or a checkpoint of
    other training code, whose heads are left out. All weights of the backbone must be in it."""
    pretrained: bool = False
    """Start from timm's own weights of the model `name`, which are downloaded. The name may have a tag, as
    `vit_small_patch16_224.dino`. Images are standardised as these weights expect."""
    norm: Literal["batch", "layer", "none"] = "batch"
    """Normalisation in `convnet` and in the projection head. `batch`: by the statistics of one micro-batch of one rank.
    `layer`: by each image's own statistics, so that the run does not depend on ranks and micro-batches. `none`: no
    normalisation. Models of timm keep their own."""
    width: Annotated[int, at_least(1, 2**16)] = 32
    """Channels of the first stage of `convnet`; each further stage doubles them, up to 8 times the first."""
    sync_batch_norm: bool = False
    """Take the statistics of batch norms, also in models of timm, over one micro-batch of every rank. GPUs only."""
    stem: Literal["own", "small"] = "own"
    """First layers of the backbone. `own`: as the model has them. `small`: in ResNets a 3x3 convolution of stride 1 and
    no max-pool, for images of 32 pixels."""
    heads: Annotated[int, at_least(0, 2**16)] = 0
    """Attention heads of a ViT. 0: the model's own number."""
    positions: Literal["own", "sincos"] = "own"
    """Position embeddings of a ViT. `own`: as the model has them. `sincos`: fixed 2-D sines and cosines."""
    frozen_patches: bool = False
    """Keep the patch projection of a ViT at its initial weights, which steadies training (Chen et al., MoCo v3)."""
    drop_path: Annotated[float, SHARE_BELOW_1] = 0.0
    """Rate of stochastic depth in models of timm."""
    head_layers: Annotated[int, at_least(1, 100)] = 2
    """Linear layers of the projection head."""
    head_width: Annotated[int, at_least(1, 2**20)] = 512
    """Hidden units of the projection head."""
    head_dim: Annotated[int, at_least(1, 2**20)] = 128
    """Features that the projection head gives to the loss."""
    activation: Literal["relu", "gelu"] = "relu"
    """Activation between the layers of the projection head."""
    teacher_momentum: Annotated[float, SHARE_BELOW_1] = 0.0
    """Momentum per step of a teacher: a moving average of the student that gives keys and targets. 0: no teacher."""
    teacher_momentum_end: Annotated[float, SHARE] = 1.0
    """Teacher momentum at the end of the run, reached along a cosine."""
    teacher_views: Literal["global", "all"] = "global"
    """Views that the teacher sees. `global`: the first two. `all`: every view; the rows of all views then take part in
    the balance, as published."""
    checkpointing: bool = False
    """Recompute activations of models of timm in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile student and teacher with torch.compile."""
    channels_last: bool = True
    """Convolutions keep channels as the last dimension in memory."""


@helpful
@dataclass(frozen=True)
class Loss:
    """Options of the BAM loss; `bam_kernels.bam_loss` explains them."""

    temperature: Annotated[float, TEMPERATURE] = 0.1
    """Softmax temperature of the self-attention that is trained (the source)."""
    epsilon: Annotated[float, TEMPERATURE] = 0.025
    """Entropic regularisation of the balanced target: smaller is sharper."""
    epsilon_end: Annotated[float | None, TEMPERATURE] = None
    """Epsilon at the end of the run, reached along a cosine. None: constant."""
    iterations: Annotated[int, at_least(1, 10_000)] = 3
    """Sinkhorn iterations that balance the target."""
    top_k: Annotated[int, at_least(0)] = 0
    """Columns kept in each row of the target: the ones with the largest weights. 0: all."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of the library that computes the loss. `auto`: kernels that are verified here, else the reference. A
    named backend that cannot run here is an error."""


@helpful
@dataclass(frozen=True)
class Optim:
    """Optimiser and its schedules, which are functions of the step."""

    name: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    """Optimiser: AdamW or SGD; or, for large batches, LARS or LAMB from timm."""
    epochs: Annotated[int, at_least(1)] = 100
    """Passes over the training images."""
    lr: Annotated[float, at_least(0)] = 5e-3
    """Learning rate after the linear warm-up; from there it follows a cosine to `lr_end`."""
    lr_end: Annotated[float, at_least(0)] = 0.0
    """Learning rate at the end of the run."""
    lr_images: Annotated[int, at_least(0)] = 0
    """Images per step for which `lr` is meant: `lr` is scaled in proportion to the virtual batch, `lr_end` is not. 0:
    `lr` as given."""
    warmup_epochs: Annotated[float, at_least(0)] = 5.0
    """Length of the learning rate's warm-up, epochs."""
    momentum: Annotated[float, SHARE_BELOW_1] = 0.9
    """Momentum of SGD and LARS."""
    weight_decay: Annotated[float, at_least(0)] = 0.05
    """Weight decay, decoupled in AdamW and LAMB. Norms, biases and other vectors have none."""
    weight_decay_end: Annotated[float | None, at_least(0)] = None
    """Weight decay at the end of the run, reached along a cosine. None: constant."""
    clip_norm: Annotated[float, at_least(0)] = 0.0
    """Largest norm of the gradient of all weights together; a larger one is scaled down to it. 0: no clipping."""


@helpful
@dataclass(frozen=True)
class Run:
    """Name, device, arithmetic and seed of the run; how often it logs, evaluates and saves."""

    name: str = "digits"
    """Name of the run. Runs are written to `directory`/NAME-001, then NAME-002 and so on."""
    directory: Path = Path("runs")
    """Folder of the runs; it is made if it is missing. A resumed run stays in its own."""
    resume: Path | None = None
    """Directory of a run to continue from its newest checkpoint, or one checkpoint file in it to continue from. The
    run's own options hold; options given here replace them, and an error names one that only a new run can take."""
    stop_after: Annotated[int | None, at_least(1)] = None
    """Stop once this many epochs are done, as if interrupted; `--run.resume` continues the run. None: run to the
    end."""
    device: str = "auto"
    """Torch device, e.g. cpu, cuda, cuda:1. auto: the GPU where there is one; under torchrun, one GPU per rank."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """Arithmetic. bfloat16 and float16 (with gradient scaling): autocast; the weights stay float32. auto: bfloat16 on
    GPUs that have it; else float32, since most CPUs only emulate bfloat16, slowly. float64: for comparing runs."""
    deterministic: bool = False
    """Use only algorithms that repeat bit for bit, which are slower: for a GPU run that resumes exactly. On CPUs runs
    resume exactly without it."""
    seed: Annotated[int, SEED] = 0
    """Seed of weights, image order and augmentation. The held-out images are the same for every seed."""
    log_every: Annotated[int, at_least(1)] = 20
    """Steps between log lines. The host waits for the device only there, and several ranks react to a signal only
    there."""
    eval_every: Annotated[int, at_least(0)] = 10
    """Epochs between evaluations of the frozen features. 0: only before and after the run."""
    save_every: Annotated[int, at_least(1)] = 10
    """Epochs between checkpoints. The last epoch is always saved."""
    save_steps: Annotated[int, at_least(0)] = 0
    """Steps between additional checkpoints, within an epoch. 0: none."""
    keep_last: Annotated[int, at_least(1)] = 1
    """Newest checkpoints that are kept: checkpoint.pt, and with 2 or more also step-N.pt. A run that continues from an
    older checkpoint removes the later ones at its first save."""
    keep_every: Annotated[int, at_least(0)] = 0
    """Epochs between checkpoints that are kept for good, as epoch-N.pt. 0: none."""
    neighbours: Annotated[int, at_least(1)] = 10
    """Neighbours that vote in the k-NN evaluation."""
    tensorboard: bool = False
    """Also write the curves for TensorBoard, into the run's directory."""
    wandb: str | None = None
    """Project of Weights & Biases that also gets the curves, with the key of `wandb login` or WANDB_API_KEY. None: the
    curves are not sent."""


@helpful
@dataclass(frozen=True)
class Config:
    """Pretrain a vision backbone without labels, by Balanced self-Attention Matching.

    With no option: a small convolutional network on scikit-learn's handwritten digits, on any machine, no download.
    `--recipe NAME --help` shows the values of a recipe.
    """

    recipe: str = "digits"
    """Name of the set of values that all options start from; an option given here replaces its value. `digits`;
    `images` (a folder of your own images, chosen by `--data.root` alone); `cifar10-resnet18`; `imagenette-vit-s`; and,
    as published, `imagenet-vit-s`, `imagenet-vit-b`, `imagenet-caformer-m36`."""
    config: Path | None = None
    """YAML file of options, such as the config.yaml of a run. Options that it leaves out come from its recipe."""
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
        temporary.write_text(yaml.safe_dump(as_plain(config), sort_keys=False), encoding="utf-8")


def as_plain(config: Config) -> dict[str, Any]:
    """Options as nested dictionaries of numbers, strings and lists, with absolute paths.

    Options of one process are left out: `config`, `run.directory`, `run.resume` and `run.stop_after`.
    """
    plain = asdict(replace(config, run=replace(config.run, resume=None, stop_after=None)))
    del plain["config"], plain["run"]["directory"]
    for part in (plain["data"], plain["model"]):
        for name, value in part.items():
            if isinstance(value, Path):
                part[name] = os.path.abspath(value)
            elif isinstance(value, tuple):
                part[name] = list(value)
    return plain
