"""What the loop and the evaluation need of a data set.

B images per micro-batch, G per step over all ranks and micro-batches (the virtual batch), V views per image, of which
V' local ones; C channels, S pixels a side; images are float32 in [0, 1]. The images of a step, their order and their
views depend on seed and epoch alone: rank r of W has images r*G/W to (r+1)*G/W - 1 of the virtual batch, B after B.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Generator, Tensor

from ..config import Data, UserError
from ..distributed import World
from .random_keys import seed_of

SPLIT_SEED = 0
EVAL_BATCH = 256

Crops = list[Tensor]
"""A micro-batch: ((V - V')*B, C, S, S) and, with local views, (V'*B, C, S', S'); row v*B + i is view v of image i."""


class Images(Protocol):
    """A data set on its device or in loader processes."""

    channels: int
    training: int
    """Images to train on."""
    tested: int
    """Held-out images; 0 where there are no labels to test with."""
    classes: int
    """Labels are below this number."""
    boxes: Tensor | None
    """(training, 4) top, left, bottom, right in shares of the image's sides, in which crops have their centres. Put
    in place by `set_boxes`."""

    def set_boxes(self, boxes: Tensor) -> None:
        """Crops from the next call of `views` on keep to these."""

    def views(self, epoch: int, first: int = 0) -> Iterator[list[Crops]]:
        """This rank's micro-batches of each step of the epoch, from step `first` on."""

    def bank(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of training images (n, C, S, S) as they are, and their labels (n,)."""

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images r, r + W, r + 2*W, ... of rank r as they are, and their labels."""

    def whole(self, places: Tensor) -> Iterator[Tensor]:
        """The training images at these places, squeezed to (n, C, S, S) without a crop."""


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


def epoch_order(training: int, G: int, seed: int, epoch: int, world: World) -> Tensor:
    """(steps, G/W) places of this rank's images. The last images of an epoch, fewer than G, are left out."""
    order = torch.randperm(training, generator=Generator().manual_seed(seed_of(seed, epoch)))
    return order[: training // G * G].view(-1, world.size, G // world.size)[:, world.rank]


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
