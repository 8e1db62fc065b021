"""Labelled images for the evaluation of frozen features, every rank with its share.

Images are (n, C, S, S) in [0, 1]; B at once on one of W ranks; rank r has images r, r + W, r + 2*W ... of an order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor

from ..config import Config, Data, UserError, helpful, missing
from ..distributed import World
from .random_keys import seed_of

Batches = Iterator[tuple[Tensor, Tensor]]


@helpful
@dataclass(frozen=True)
class Labels:
    """Which labelled images, and how they are read."""

    root: Path | None = None
    """Folder with `train/` beside `val/` or `test/`, each with a subfolder per class; or class folders alone, of which
    some images are held out. None: the data of the run."""
    batch_size: int = 128
    """Images at once on one rank."""
    workers: int = 2
    """Processes that decode. 0: the main process."""

    def load(self, options: Config, size: int, device: torch.device, world: World) -> "Labelled":
        """Raises: UserError."""
        if self.batch_size < 1 or self.workers < 0:
            raise UserError("--data.batch-size must be at least 1, and --data.workers at least 0")
        data = replace(options.data, size=size, batch_size=self.batch_size, virtual_batch=0, workers=self.workers)
        if self.root is not None:
            data = replace(data, source="folder", root=self.root)
        if data.source == "digits":
            return LabelledDigits(data, device, world)
        if data.root is None:
            raise UserError("--data.root is needed: a model of timm comes without data")
        try:
            from .labelled_files import LabelledFiles
        except ImportError as error:
            raise UserError(missing(f"--data.root {data.root}", "torchvision", error)) from error
        return LabelledFiles(data, device, world)


class Labelled(Protocol):
    """Two parts of a data set, as batches of images and labels (n,) int64 on the device."""

    training: int
    tested: int
    classes: int
    device: torch.device

    def plain(self, part: Literal["train", "test"]) -> Batches:
        """This rank's share of a part, in order, without augmentation."""

    def augmented(self, seed: int, epoch: int) -> Batches:
        """This rank's share of an epoch of training images, for the linear protocol."""


class LabelledDigits:
    """The embedded digits; they have no crops, so the augmented ones are shuffled only."""

    def __init__(self, data: Data, device: torch.device, world: World) -> None:
        from .on_device import digits

        held = digits(data, device, 0, World())
        self.parts = {"train": held.train, "test": held.test}
        self.training, self.tested, self.classes = held.training, held.tested, held.classes
        self.B, self.device, self.world = data.batch_size, device, world

    def plain(self, part: Literal["train", "test"]) -> Batches:
        images, labels = (x[self.world.rank :: self.world.size] for x in self.parts[part])
        return zip(images.split(self.B), labels.split(self.B), strict=True)

    def augmented(self, seed: int, epoch: int) -> Batches:
        images, labels = self.parts["train"]
        for batch in shuffled(self.training, self.B, seed, epoch, self.world).split(self.B):
            yield images[batch], labels[batch]


def shuffled(training: int, B: int, seed: int, epoch: int, world: World) -> Tensor:
    """This rank's places of an epoch; the last images, fewer than a batch on every rank, are left out."""
    G = min(B * world.size, training // world.size * world.size)
    order = torch.randperm(training, generator=Generator().manual_seed(seed_of(seed, epoch)))
    return order[: training // G * G][world.rank :: world.size]
