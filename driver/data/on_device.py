"""Data sets that are kept whole on the device and augmented there: the digits, and small sets of photographs.

B images per micro-batch, V views per image, C channels, images of S x S pixels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import Boxes, Data
from ..distributed import World
from . import shared_memory, views_of_digits
from .images import Augment, Batches, Crops, Source, Transform, epoch_order, floats, virtual_batch
from .random_keys import keys_of
from .workers import EVAL_PIXELS, Reader


class OnDevice:
    """Images and labels of one source, decoded once and kept on the device. See `Images`."""

    boxes: Tensor | None = None

    def __init__(self, source: Source, data: Data, boxes: Boxes, device: torch.device, seed: int, world: World) -> None:
        self.source, self.data, self.device, self.seed, self.world = source, data, device, seed, world
        self.training, self.tested = len(source.train), len(source.test)
        self.channels, self.classes = data.channels, int(source.labels.max()) + 1
        self.eval_batch = max(1, EVAL_PIXELS // data.size**2)
        transform, self.augment = pixels_and_augmentation(data, boxes)
        reader = Reader(source, data, device)
        shared_memory.check(reader.shared_bytes(max(self.training, self.tested)), reader.workers, world)
        self.train, self.test = (self._decode(reader, indices, transform) for indices in (source.train, source.test))
        reader.tally.settle(world)

    def _decode(self, reader: Reader, indices: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
        """Pixels (n, C, S, S), float or uint8, and labels (n,) of the images `indices` of the source."""
        n, size = len(indices), self.data.size
        dtype = torch.float32 if reader.source.decoded else torch.uint8
        images = torch.empty(n, self.channels, size, size, dtype=dtype, device=self.device)
        labels = torch.empty(n, dtype=torch.int64, device=self.device)
        done = 0
        for pixels, classes in reader.pixels(indices, transform):
            images[done : done + len(pixels)] = pixels
            labels[done : done + len(pixels)] = classes
            done += len(pixels)
        return images, labels

    def set_boxes(self, boxes: Tensor) -> None:
        self.boxes = boxes.to(self.device)

    def views(self, epoch: int, first: int = 0) -> Iterator[list[Crops]]:
        order = epoch_order(self.training, virtual_batch(self.data, self.world), self.seed, epoch, self.world)[first:]
        if self.device.type == "cuda":
            order = order.contiguous().pin_memory()  # so that the copy need not wait for the device
        for step in order.to(self.device, non_blocking=True):
            yield [self._crops(places, epoch) for places in step.split(self.data.batch_size)]

    def _crops(self, places: Tensor, epoch: int) -> Crops:
        images = floats(self.train[0][places])
        boxes = None if self.boxes is None else self.boxes[places]
        views = []
        for v in range(self.data.views + self.data.local_views):
            keys = keys_of(self.seed, epoch, places, range(v, v + 1))
            views.append(self.augment(images, v, keys, boxes))
        parts = views[: self.data.views], views[self.data.views :]
        return [torch.cat(part) for part in parts if part]

    def bank(self) -> Batches:
        return self._batches(*self.train)

    def held_out(self) -> Batches:
        return self._batches(*self.test)

    def whole(self, places: Tensor) -> Iterator[Tensor]:
        for part in places.to(self.device).split(self.eval_batch):
            yield floats(self.train[0][part])

    def _batches(self, images: Tensor, labels: Tensor) -> Batches:
        images, labels = (part[self.world.rank :: self.world.size] for part in (images, labels))
        for pixels, classes in zip(images.split(self.eval_batch), labels.split(self.eval_batch), strict=True):
            yield floats(pixels), classes


def pixels_and_augmentation(data: Data, boxes: Boxes) -> tuple[Transform, Augment]:
    """The transform from an image of the source to the pixels kept on the device, and the augmentation of these."""
    if data.augmentation == "digits":
        return views_of_digits.Resize(data.size), views_of_digits.augmentation(data)
    from . import views, views_on_device  # torchvision and kornia are optional

    return views.centred(data.size), views_on_device.augmentation(data, boxes.alpha)
