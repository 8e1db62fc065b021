"""Labelled images for the evaluation of frozen features, at the crops of the published evaluations.

B images per batch on one of W ranks; rank r has images r, r + W, r + 2*W, ... of an order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..bounds import PROCESSES, RISING, SHARE, at_least
from ..config import Config, Data, UserError, helpful, missing
from ..distributed import World
from . import shared_memory
from .images import Batches, Source, Transform, epoch_order
from .loading import Key
from .random_keys import seed_of
from .sources import make_source
from .views_of_digits import Resize
from .workers import Reader


@helpful
@dataclass(frozen=True)
class Labels:
    """Which labelled images, and how they are read."""

    root: Path | None = None
    """Folder with `train/` beside `val/` or `test/`, each with a subfolder per class; or class folders alone, of which
    some images are held out. None: the data of the run."""
    batch_size: Annotated[int, at_least(1)] = 128
    """Images in a batch of one rank."""
    workers: Annotated[int, at_least(0, PROCESSES)] = 2
    """Worker processes that decode images. 0: the main process decodes them."""
    max_unreadable: Annotated[float | None, SHARE] = None
    """Largest share of the images that may be unreadable, as in pretraining. None: as in the run, or 0.01."""
    pixel_range: Annotated[tuple[float, float] | None, RISING] = None
    """Values that become black and white in images of more than 8 bits per sample. None: as in the run, or the range of
    the values' type."""

    def load(self, options: Config, size: int, device: torch.device, world: World) -> "Labelled":
        """Open the images: those under `root`, or the data set of the run whose options are given.

        Raises: UserError where a package is missing, the images have other channels, or none is labelled.
        """
        data = replace(options.data, size=size, batch_size=self.batch_size, virtual_batch=0, workers=self.workers)
        for name in ("max_unreadable", "pixel_range"):
            if (value := getattr(self, name)) is not None:
                data = replace(data, **{name: value})
        if self.root is not None:
            if data.source == "digits":
                raise UserError(f"--data.root {self.root}: the backbone was trained on digits, not on colour images")
            data = replace(data, source="folder", root=self.root)
        if data.source != "digits" and data.root is None:
            raise UserError("--data.root is needed: a model of timm comes without data")
        try:
            return Labelled(make_source(data), data, device, world)
        except ImportError as error:
            raise UserError(missing(f"--data.root {data.root}", "torchvision", error)) from error


class Labelled:
    """Training and test images of one source with their labels, as batches on the device."""

    def __init__(self, source: Source, data: Data, device: torch.device, world: World) -> None:
        self.source, self.B, self.world = source, data.batch_size, world
        self.training, self.tested = len(source.train), len(source.test)
        if not self.tested:
            where = data.root or "the digits"
            must = "there must be at least two classes"
            if len(source.labels.unique()) > 1:
                must = f"--data.held-out {data.held_out:g} of each class is less than an image; put some into val/"
            raise UserError(f"{where}: no labelled images to test with; {must}")
        self.classes = int(source.labels.max()) + 1
        self.reader = Reader(source, data, device, self.B)
        needed = self.reader.shared_bytes(max(self.training, self.tested) // world.size)
        shared_memory.check(needed, self.reader.workers, world)
        self.plain_crop, self.random_crop = evaluation_crops(source, data.size)

    def plain(self, part: Literal["train", "test"]) -> Batches:
        """This rank's share of a part, in order, without augmentation."""
        indices = self.source.train if part == "train" else self.source.test
        return self._batches(indices, self.plain_crop, range(self.world.rank, len(indices), self.world.size))

    def augmented(self, seed: int, epoch: int) -> Batches:
        """This rank's share of an epoch of training images, cropped at random, for the linear evaluation.

        The last images, fewer than a batch on every rank, are left out; a set smaller than that is one batch.
        """
        W = self.world.size
        G = min(self.B * W, self.training // W * W)
        places = epoch_order(self.training, G, seed, epoch, self.world, interleaved=True).flatten().tolist()
        keys = [(seed_of(seed, epoch, place), place) for place in places]
        return self._batches(self.source.train, self.random_crop, keys)

    def _batches(self, indices: Tensor, transform: Transform, keys: Sequence[Key]) -> Batches:
        yield from self.reader.batches(indices, transform, keys)
        self.reader.tally.settle(self.world)


def evaluation_crops(source: Source, size: int) -> tuple[Transform, Transform]:
    """The plain and the random crop of a source's images; the digits are only resized."""
    if source.decoded:
        return Resize(size), Resize(size)
    from . import views  # torchvision is optional

    return views.published_crop(size), views.published_random_crop(size)
