"""What training and evaluation need of a data set, and which images each rank sees in a step.

B images per micro-batch of one rank, G per step over all W ranks and all micro-batches (the virtual batch); V views per
image, of which V' are local; C channels; images of S x S pixels, local views of S' x S'. Pixels are float32 in [0, 1],
or uint8 where they come from workers. An index numbers an image in its source; a place numbers it among the training
images.

The images of a step, their order and their views depend on seed and epoch alone, not on the number of ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Generator, Tensor

from ..config import Data, UserError
from ..distributed import World
from .random_keys import seed_of

Crops = list[Tensor]
"""A micro-batch: ((V - V')*B, C, S, S) and, with local views, (V'*B, C, S', S'); row v*B + i is view v of image i."""

Batches = Iterator[tuple[Tensor, Tensor]]
"""Images (n, C, S, S) float32 in [0, 1] and their labels (n,) int64, batch by batch, on the device."""

Transform = Callable[[Any], Tensor]
"""Function from one image, as its source reads it, to pixels (C, S, S), uint8 or float32 in [0, 1]."""

Augment = Callable[[Tensor, int, Tensor, Tensor | None], Tensor]
"""Function from images (n, C, S, S), a view's number, keys (n,), and boxes (n, 4) or None, to a view of each image."""


class Source(Protocol):
    """Images by index, with their labels, divided into training and held-out images."""

    decoded: bool = False
    """Whether `read` gives pixels that are ready in memory, for which worker processes would have nothing to do."""
    labels: Tensor
    """Labels (n,) int64 of all images."""
    train: Tensor
    """Indices of the training images."""
    test: Tensor
    """Indices of the held-out images."""
    summary: str = ""
    """One line on how the images were found and divided; empty where there is nothing to say."""

    def read(self, index: int) -> Image.Image | Tensor:
        """A photograph in RGB, or pixels (C, H, W) in [0, 1] where the source is decoded.

        Raises: any exception where the image is not readable; UserError where more than this image is at fault.
        """

    def name(self, index: int) -> str:
        """File name of image `index`, for messages."""

    def entry(self, index: int) -> tuple[str, int]:
        """Name of image `index`, relative to the folder of the images, and its size in bytes, -1 where it is gone.

        The name of an image without a file has a digest of its pixels.
        """


class Images(Protocol):
    """The data set of a run: training views for the loop, images without augmentation for the evaluation."""

    source: Source
    channels: int
    training: int
    """Number of training images."""
    tested: int
    """Number of held-out images; 0 where there are no labels to test with."""
    classes: int
    """Number of classes: labels are below it."""
    boxes: Tensor | None
    """Box of each training image for the centres of its crops: (training, 4) top, left, bottom, right, in shares of the
    image's sides. None until `set_boxes`."""

    def set_boxes(self, boxes: Tensor) -> None:
        """Keep the centres of crops in these boxes, from the next call of `views` on."""

    def views(self, epoch: int, first: int = 0) -> Iterator[list[Crops]]:
        """This rank's micro-batches of each step of the epoch, from step `first` on."""

    def bank(self) -> Batches:
        """This rank's share of the training images without augmentation, for the evaluation."""

    def held_out(self) -> Batches:
        """This rank's share of the held-out images without augmentation: images r, r + W, r + 2*W, ... on rank r."""

    def whole(self, places: Tensor) -> Iterator[Tensor]:
        """Training images (n, C, S, S) in [0, 1] at `places`, squeezed to a square without a crop."""


def floats(pixels: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: bytes are multiplied by 1/255, as torchvision does; floats stay as they are."""
    return pixels.float().mul_(1 / 255) if pixels.dtype == torch.uint8 else pixels


def virtual_batch(data: Data, world: World) -> int:
    """G: images per step over all ranks and micro-batches.

    Raises: UserError where it is not a multiple of batch size times ranks.
    """
    least = data.batch_size * world.size
    G = data.virtual_batch or least
    if G % least:
        raise UserError(
            f"--data.virtual-batch must be a multiple of batch_size times ranks, {data.batch_size} x {world.size} = "
            f"{least}, got {G}; another --data.batch-size may divide it"
        )
    return G


def check_batch(training: int, data: Data, world: World) -> None:
    """Require at least one whole virtual batch of training images. Raises: UserError where there are fewer."""
    G = virtual_batch(data, world)
    if training >= G:
        return
    advice = "a smaller --virtual-batch or --data.batch-size" if training > 1 else "at least 2 are needed"
    if training > 1 and G == data.batch_size:
        advice = f"give --data.batch-size {training} or less"
    raise UserError(
        f"{data.root or 'the digits'}: {training} images to train on, fewer than one batch of {G}; {advice}"
    )


def epoch_order(training: int, G: int, seed: int, epoch: int, world: World, interleaved: bool = False) -> Tensor:
    """(steps, G/W) places of this rank's images in each step of an epoch, in random order.

    Rank r of W has images r*G/W to (r+1)*G/W - 1 of a step; interleaved: images r, r + W, r + 2*W and so on.
    The last images of the order, fewer than G, are left out of the epoch.
    """
    order = torch.randperm(training, generator=Generator().manual_seed(seed_of(seed, epoch)))
    steps = order[: training // G * G].view(training // G, G)
    W, share = world.size, G // world.size
    return steps.view(-1, share, W)[:, :, world.rank] if interleaved else steps.view(-1, W, share)[:, world.rank]
