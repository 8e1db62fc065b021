"""Data sets that live on the device whole, and are augmented there: the digits, and small sets of photographs.

B images per micro-batch, V views per image, C channels, S pixels a side.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Boxes, Data
from ..distributed import World
from .images import Crops, check_batch, epoch_order, split, virtual_batch
from .random_keys import keys_of
from .views_of_digits import augment_digits

EVAL_PIXELS = 256 * 96 * 96
"""Of images evaluated at once."""

Augment = Callable[[Tensor, int, Tensor, Tensor | None], Tensor]
"""images (n, C, S, S), view, keys (n,), boxes (n, 4) or None -> that view of each image."""


class Held:
    """Images (n, C, S, S), float in [0, 1] or uint8, and labels, on the device."""

    boxes: Tensor | None = None

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        augment: Augment,
        data: Data,
        device: torch.device,
        seed: int,
        world: World,
    ) -> None:
        self.train, self.test = ([part.to(device) for part in pair] for pair in (train, test))
        self.training, self.tested, self.channels = len(train[0]), len(test[0]), train[0].shape[1]
        self.classes = int(torch.cat([train[1], test[1]]).max()) + 1
        self.augment, self.data, self.seed, self.world = augment, data, seed, world
        self.device = device
        self.eval_batch = max(1, EVAL_PIXELS // data.size**2)

    def set_boxes(self, boxes: Tensor) -> None:
        self.boxes = boxes.to(self.device)

    def views(self, epoch: int, first: int = 0) -> Iterator[list[Crops]]:
        order = epoch_order(self.training, virtual_batch(self.data, self.world), self.seed, epoch, self.world)[first:]
        if self.device.type == "cuda":
            order = order.contiguous().pin_memory()  # so that the copy need not wait for the device
        for step in order.to(self.device, non_blocking=True):
            yield [self._crops(places, epoch) for places in step.split(self.data.batch_size)]

    def _crops(self, places: Tensor, epoch: int) -> Crops:
        images = _floats(self.train[0][places])
        boxes = None if self.boxes is None else self.boxes[places]
        made = []
        for v in range(self.data.views + self.data.local_views):
            keys = keys_of(self.seed, epoch, places, range(v, v + 1))
            made.append(self.augment(images, v, keys, boxes))
        parts = made[: self.data.views], made[self.data.views :]
        return [torch.cat(part) for part in parts if part]

    def bank(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches(*self.train)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches(*self.test)

    def whole(self, places: Tensor) -> Iterator[Tensor]:
        for part in places.to(self.device).split(self.eval_batch):
            yield _floats(self.train[0][part])

    def _batches(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = (part[self.world.rank :: self.world.size] for part in (images, labels))
        for part, of_part in zip(images.split(self.eval_batch), labels.split(self.eval_batch), strict=True):
            yield _floats(part), of_part


def _floats(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def digits(data: Data, device: torch.device, seed: int, world: World) -> Held:
    """scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels. Raises: UserError."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float().div_(16)[:, None]
    if data.size != images.shape[-1]:
        images = F.interpolate(images, size=(data.size, data.size), mode="bilinear", antialias=True)
    labels = torch.from_numpy(source.target).long()
    train, test = split(labels, data.held_out)
    check_batch(len(train), data, world, "the digits")

    def augment(images: Tensor, view: int, keys: Tensor, boxes: Tensor | None) -> Tensor:
        return augment_digits(images, data.augment, keys)

    return Held((images[train], labels[train]), (images[test], labels[test]), augment, data, device, seed, world)


def photographs(source, data: Data, boxes: Boxes, device: torch.device, seed: int, world: World) -> Held:
    """Every image of a Source (sources.py), its middle square at S x S in bytes. Raises: UserError."""
    from . import views_on_device
    from .unreadable import Tally
    from .views import kinds
    from .workers import everything

    of_view = kinds(data)

    def augment(images: Tensor, view: int, keys: Tensor, of_images: Tensor | None) -> Tensor:
        size = data.size if view < data.views else data.local_size
        if data.augment == 0:
            return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return views_on_device.augment(images, of_view[view], size, keys, of_images, boxes.alpha)

    tally = Tally(source, data.max_unreadable, len(source.train) + len(source.test))
    train, test = (everything(source, numbers, data, tally) for numbers in (source.train, source.test))
    tally.settle(world)  # every rank reads all
    return Held(
        train,
        test,
        augment,
        data,
        device,
        seed,
        world,
    )
