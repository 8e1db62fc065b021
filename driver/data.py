"""What the loop and the evaluation need of a data set, and the embedded digits. Folders are in folder.py.

B images per micro-batch, G per step over all ranks and micro-batches (the virtual batch), V views per image,
C channels, S pixels a side; images are float32 in [0, 1]. The images of a step, their order and their views depend on
seed and epoch alone: rank r of W has images r*G/W to (r+1)*G/W - 1 of the virtual batch, B after B.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .augment import augment_digits
from .config import Data, UserError, missing
from .world import World

SPLIT_SEED = 0


class Images(Protocol):
    """A data set on its device."""

    channels: int
    training: int
    """Images to train on."""
    tested: int
    """Held-out images; 0 where there are no labels to test with."""
    classes: int
    """Labels are below this number."""

    def views(self, epoch: int) -> Iterator[list[Tensor]]:
        """This rank's micro-batches of each step: (V*B, C, S, S), row v*B + i is view v of image i."""

    def bank(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the training images (n, C, S, S) as they are, and their labels (n,)."""

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Held-out images rank, rank + W, ... as they are, and their labels; always in the same order."""


def make_images(data: Data, device: torch.device, seed: int, world: World) -> Images:
    """The data set that the options name. Raises: UserError."""
    if data.root is None:
        return Digits(data, device, seed, world)
    try:
        from .folder import Folder
    except ImportError as error:
        raise UserError(missing("--data.root", "torchvision", error)) from error
    return Folder(data, device, seed, world)


class Digits:
    """scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, on the device, augmented there."""

    channels = 1

    def __init__(self, data: Data, device: torch.device, seed: int, world: World) -> None:
        from sklearn.datasets import load_digits

        source = load_digits()
        images = torch.from_numpy(source.images).float().div_(16)[:, None]
        if data.size != images.shape[-1]:
            images = F.interpolate(images, size=(data.size, data.size), mode="bilinear", antialias=True)
        labels = torch.from_numpy(source.target).long()
        train, test = split(labels, data.held_out)
        check_batch(len(train), data, world, "the digits")
        self.images, self.labels = images[train].to(device), labels[train].to(device)
        self.test_images, self.test_labels = images[test].to(device), labels[test].to(device)
        self.training, self.tested, self.classes = len(train), len(test), int(labels.max()) + 1
        self.data, self.device, self.seed, self.world = data, device, seed, world

    def views(self, epoch: int) -> Iterator[list[Tensor]]:
        """Every rank makes the views of the whole virtual batch, at most all the digits, and takes its own."""
        generator = Generator(self.device).manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(self.training, generator=generator, device=self.device)
        V, G = self.data.views, virtual_batch(self.data, self.world)
        for step in range(self.training // G):
            batch = self.images[order[step * G : (step + 1) * G]]
            views = augment_digits(batch.repeat(V, 1, 1, 1), self.data.augment, generator).unflatten(0, (V, G))
            own = views.chunk(self.world.size, dim=1)[self.world.rank]
            yield [part.flatten(0, 1) for part in own.split(self.data.batch_size, dim=1)]

    def bank(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._share(self.images, self.labels)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._share(self.test_images, self.test_labels)

    def _share(self, *whole: Tensor) -> tuple[Tensor, ...]:
        return tuple(part[self.world.rank :: self.world.size] for part in whole)


def split(labels: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """Indices of training and held-out images: the same share of every class, the same for every run."""
    generator = Generator().manual_seed(SPLIT_SEED)
    train, test = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(held_out * len(members))
        test.append(members[:cut])
        train.append(members[cut:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def seed_of(*parts: int) -> int:
    """One seed from several numbers: run, epoch, image."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed


def virtual_batch(data: Data, world: World) -> int:
    """G, images per step over all ranks and micro-batches. Raises: UserError."""
    least = data.batch_size * world.size
    G = data.virtual_batch or least
    if G % least:
        raise UserError(
            f"--data.virtual_batch must be a multiple of batch_size times ranks, {data.batch_size} x {world.size} = "
            f"{least}, got {G}; another --data.batch-size may divide it"
        )
    return G


def check_batch(training: int, data: Data, world: World, where: str) -> None:
    """At least one whole virtual batch. Raises: UserError."""
    G = virtual_batch(data, world)
    if training >= G:
        return
    advice = "a smaller --virtual-batch or --data.batch-size" if training > 1 else "at least 2 are needed"
    if training > 1 and G == data.batch_size:
        advice = f"give --data.batch-size {training} or less"
    raise UserError(f"{where}: {training} images to train on, fewer than one batch of {G}; {advice}")
