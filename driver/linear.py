"""Linear evaluation of a frozen backbone, as published: SGD on a linear layer, standard crops, several learning rates.

python driver/linear.py --backbone.run RUN_DIR
python driver/linear.py --backbone.name vit_base_patch16_224 --backbone.weights FILE --data.root IMAGENET
    --blocks 1 --average True --norm True                                   (BAM's ViT-B and DINO's)
torchrun --nproc-per-node 8 driver/linear.py ...

Each learning rate has a linear layer of its own. All layers share the features, since the backbone costs most.
"""

import json
import sys
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import driver  # noqa: F401 - it sets a variable that torch reads when it is imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bam_kernels.whole_files import replacing
from driver import weights
from driver.bounds import POSITIVE, SEED, at_least, each
from driver.cli import check_folder, run_script
from driver.config import UserError, helpful
from driver.data.inventory import Inventory
from driver.data.labelled import Labelled, Labels
from driver.distributed import World
from driver.evaluation.frozen import Backbone, Frozen
from driver.optim import cosine
from driver.weights.run_contents import WrongPart, check_module, check_optimizer, is_count, is_option, require
from driver.weights.way_back import damaged

MOMENTUM = 0.9
LINES, LAYERS = "linear.jsonl", "linear.pt"
"""Files in the folder --out."""


@helpful
@dataclass(frozen=True)
class Options:
    """Train linear classifiers on frozen features; print their accuracy on the test images."""

    backbone: Backbone = field(default_factory=Backbone)
    data: Labels = field(default_factory=Labels)
    epochs: Annotated[int, at_least(1)] = 100
    """Passes over the training images."""
    lr: Annotated[tuple[float, ...], each(POSITIVE)] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Learning rates to try, one linear layer for each. They are meant for 256 images per step and are
    scaled by --data.batch-size times the ranks, over 256. They follow a cosine to 0 over the epochs."""
    blocks: Annotated[int, at_least(1)] = 4
    """Last blocks of a ViT whose class tokens are the features, side by side."""
    average: bool = False
    """Also append the mean of the patches of a ViT's last block to the features."""
    norm: bool = False
    """Normalise the features by a batch norm without weights, over all ranks: then features of any scale suit one
    learning rate."""
    test_every: Annotated[int, at_least(1)] = 10
    """Epochs between tests; the last epoch is always tested."""
    seed: Annotated[int, SEED] = 0
    """Seed of the order of images and of the crops."""
    out: Path | None = None
    """Folder for linear.jsonl (a line per test) and linear.pt (the layers). None: nothing is written."""
    resume: bool = False
    """Continue from the linear.pt in `out`."""


class Heads(nn.Module):
    """One linear layer per learning rate, over the same features (n, D) -> logits (heads, n, classes)."""

    def __init__(self, width: int, classes: int, heads: int, norm: bool, world: World) -> None:
        super().__init__()
        self.norm = Norm(width, world) if norm else nn.Identity()
        self.layers = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        features = self.norm(features)
        return torch.stack([layer(features) for layer in self.layers])


class Norm(nn.BatchNorm1d):
    """Batch norm without weights, by the statistics of the features of all ranks; the features take no gradient.

    torch's SyncBatchNorm would need GPUs.
    """

    def __init__(self, width: int, world: World) -> None:
        super().__init__(width, affine=False, eps=1e-6, momentum=None)
        self.world = world

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return super().forward(features)
        whole = self.world.interleaved(features, len(features) * self.world.size)
        return super().forward(whole)[self.world.rank :: self.world.size]


def main(options: Options, world: World) -> dict[float, float]:
    """Print and return the top-1 accuracy for each learning rate. Raises: UserError where the options do not fit."""
    if options.resume and options.out is None:
        raise UserError("--resume needs --out, where linear.pt is")
    if (out := options.out) is not None:
        world.from_first("out", lambda: check_folder(out, f"--out {out}", LINES, LAYERS))
    frozen = options.backbone.load(world)
    world.start(frozen.device)
    labelled = options.data.load(options.backbone.options(), frozen.size, frozen.device, world)
    width = embed(frozen, next(labelled.plain("test"))[0][:1], options).shape[1]
    torch.manual_seed(options.seed)
    heads = Heads(width, labelled.classes, len(options.lr), options.norm, world).to(frozen.device)
    parallel = world.parallel(heads)
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(heads.layers, options.lr, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM)
    origin = None
    if options.out is not None:
        origin = world.from_first("origin", lambda: origin_of(options, frozen, labelled))
    first = load(options, heads, optimizer, origin) if options.resume else 0
    print(
        f"{labelled.training} training images, {labelled.tested} test images, {labelled.classes} classes, "
        f"{width} features"
    )

    accuracy: dict[float, float] = {}
    epochs = tqdm(range(first, options.epochs), unit="epoch", disable=not world.first)
    for epoch in epochs:
        train(parallel, optimizer, frozen, labelled, options, epoch, world)
        if (epoch + 1) % options.test_every == 0 or epoch + 1 == options.epochs:
            top1, top5 = test(heads, frozen, labelled, options, world)
            accuracy = dict(zip(options.lr, top1, strict=True))
            epochs.set_postfix_str(f"best {100 * max(top1):.2f}%")
            if world.first and options.out is not None:
                row = {"epoch": epoch + 1, "lr": options.lr, "top1": top1, "top5": top5}
                write(options.out, row, {"heads": heads, "optimizer": optimizer}, origin)
    for lr, share in accuracy.items():
        print(f"lr {lr:<8g} top-1 {100 * share:6.2f}%{'  best' if share == max(accuracy.values()) else ''}")
    return accuracy


def embed(frozen: Frozen, images: Tensor, options: Options) -> Tensor:
    return frozen.for_linear(images, options.blocks, options.average).float()


def train(
    heads: nn.Module,
    optimizer: torch.optim.Optimizer,
    frozen: Frozen,
    labelled: Labelled,
    options: Options,
    epoch: int,
    world: World,
) -> None:
    """Train all heads for one epoch. The loss is the sum of their losses, so no head sees another's gradient."""
    heads.train()
    scale = cosine(epoch / options.epochs, options.data.batch_size * world.size / 256, 0.0)
    for group, lr in zip(optimizer.param_groups, options.lr, strict=True):
        group["lr"] = lr * scale
    for images, labels in labelled.augmented(options.seed, epoch):
        logits = heads(embed(frozen, images, options))
        loss = sum(F.cross_entropy(head_logits, labels) for head_logits in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def test(
    heads: Heads, frozen: Frozen, labelled: Labelled, options: Options, world: World
) -> tuple[list[float], list[float] | None]:
    """Top-1 and top-5 accuracy of each head, over all ranks; with fewer than 5 classes there is no top-5."""
    heads.eval()
    right = torch.zeros(2, len(options.lr), dtype=torch.int64, device=frozen.device)
    for images, labels in labelled.plain("test"):
        logits = heads(embed(frozen, images, options))
        best = logits.topk(min(5, labelled.classes), dim=2).indices == labels[:, None]
        right += torch.stack([best[:, :, :1].sum((1, 2)), best.sum((1, 2))])
    top1, top5 = (world.sum(right) / labelled.tested).tolist()
    return top1, top5 if labelled.classes >= 5 else None


def origin_of(options: Options, frozen: Frozen, labelled: Labelled) -> dict[str, Any]:
    """What the layers in linear.pt are trained on, which cannot change between their epochs, by names for messages."""
    images = Inventory.of(labelled.source).digests
    backbone = blake2b(digest_size=16)
    for value in frozen.model.state_dict().values():
        backbone.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        **{f"--{name}": getattr(options, name) for name in ("blocks", "average", "norm", "seed")},
        "--lr": list(options.lr),
        "--backbone.size": frozen.size,
        "--backbone.heads": options.backbone.options().model.heads,
        "weights of the backbone": backbone.hexdigest(),
        "training images": images["training"],
        "test images": images["held_out"],
        "labels": blake2b(labelled.source.labels.numpy(), digest_size=16).hexdigest(),
    }


def write(out: Path, row: dict[str, Any], trained: dict[str, Any], origin: dict[str, Any] | None) -> None:
    """Add a line to linear.jsonl, without a last line that was cut short, and replace linear.pt.

    linear.pt holds the layers and the optimiser.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / LINES
    before = path.read_bytes() if path.exists() else b""
    with replacing(path) as temporary:
        temporary.write_bytes(before[: before.rfind(b"\n") + 1] + json.dumps(row).encode() + b"\n")
    states = {name: part.state_dict() for name, part in trained.items()}
    weights.save({**states, "epoch": row["epoch"], "origin": origin}, out / LAYERS)


def load(options: Options, heads: Heads, optimizer: torch.optim.Optimizer, origin: dict[str, Any] | None) -> int:
    """Put the layers and the optimiser of linear.pt in place; return the number of epochs that are done.

    Raises: UserError where linear.pt is missing, damaged, of another origin or of other options.
    """
    assert options.out is not None and origin is not None
    path = options.out / LAYERS
    content = weights.read(path)
    try:
        done, before = content["epoch"], content.get("origin")
        require(is_count(done), "epoch", "a whole number of at least 0", done)
        require(before is None or isinstance(before, dict), "origin", "a dict", before)
        if before is None:
            print(f"note: {path} is of an older version and does not know what its layers were trained on")
        for name, was in (before or {}).items():
            require(is_option(was), "origin", "a dict of numbers, text and lists", was)
            if origin[name] != was:
                raise UserError(
                    f"{path}: other {name}: {was} then, {origin[name]} now. --resume continues with what it had; "
                    "another --out begins anew"
                )
        if done > options.epochs:
            raise UserError(f"--epochs {options.epochs}: {path} has {done} epochs behind it; give more than that")
        check_module(content["heads"], heads, "heads")
        heads.load_state_dict(content["heads"])
        check_optimizer(content["optimizer"], optimizer)
        optimizer.load_state_dict(content["optimizer"])
        return done
    except WrongPart as error:
        raise damaged(path, str(error), "another --out begins anew") from error
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: does not fit these options: {error}") from error


if __name__ == "__main__":
    sys.exit(run_script(Options, main))
