"""Images read in worker processes: labelled ones for the evaluation, augmented views for training.

B images per micro-batch, G per step over all ranks and micro-batches, V views per image, images of S x S pixels. They
leave the workers as uint8, a quarter of the shared memory and of the copy to the device that float32 would take.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Generator, Tensor
from torch.utils.data import Sampler

from ..config import Boxes, Data
from ..distributed import World
from . import shared_memory
from .crops import WHOLE
from .images import Batches, Crops, Source, Transform, epoch_order, floats, virtual_batch
from .loading import ImagesOf, Key, Loader
from .unreadable import Report, Tally, read

EVAL_BATCH = 256
"""Largest number of images in one batch of the evaluation."""
EVAL_PIXELS = EVAL_BATCH * 96 * 96
"""Largest number of pixels, over all images, in one batch of the evaluation."""
BANK_LIMIT = 10_000
"""Largest number of training images in the evaluation of a run, over all ranks."""


class InWorkers:
    """Photographs of one source, decoded and augmented in worker processes. See `Images`.

    `tally` counts the images that could not be read; it is settled at log lines.
    """

    def __init__(self, source: Source, data: Data, boxes: Boxes, device: torch.device, seed: int, world: World) -> None:
        from . import views  # torchvision is optional

        self.source, self.device = source, device
        self.training, self.tested = len(source.train), len(source.test)
        self.channels, self.classes = data.channels, int(source.labels.max()) + 1
        G = virtual_batch(data, world)
        self.order = Order(self.training, G, seed, world)
        self.micro_batches = G // world.size // data.batch_size
        self.reader = Reader(source, data, device)
        self.tally = self.reader.tally
        shared_memory.check(self._shared_bytes(data, world), data.workers, world)
        self._boxes = torch.tensor(WHOLE).repeat(self.training, 1)
        self._boxed = torch.zeros(1, dtype=torch.bool)
        if data.workers:  # workers that are running see new boxes
            shared_memory.share(self._boxes)
            shared_memory.share(self._boxed)
        dataset = TrainingViews(source, data.workers, views.Views(data, boxes.alpha), seed, self._boxes, self._boxed)
        self.loader = Loader(dataset, data.batch_size, device, self.order, stay=True)
        chosen = torch.randperm(self.training, generator=Generator().manual_seed(0))[:BANK_LIMIT]
        self.bank_indices, self.test_indices = (
            indices[world.rank :: world.size] for indices in (source.train[chosen], source.test)
        )
        self.centred, self.squeezed = views.centred(data.size), views.squeezed(data.size)

    def _shared_bytes(self, data: Data, world: World) -> int:
        """Bytes of shared memory that this rank needs: boxes, and the batches of training or of an evaluation."""
        # A GPU's batches are copied to pinned memory as they come; a CPU's stay while a step uses them.
        in_use = 0 if self.device.type == "cuda" else self.micro_batches
        share, B = self.training // world.size, data.batch_size
        views = data.channels * (data.views * data.size**2 + data.local_views * data.local_size**2)
        training = shared_memory.bytes_of_batches(views, B, data.workers, max(2 * in_use - 1, 0), share)
        evaluation = self.reader.shared_bytes(max(share, self.tested)) + in_use * B * views
        return self.training * 4 * len(WHOLE) + max(training, evaluation)

    @property
    def boxes(self) -> Tensor | None:
        return self._boxes if self._boxed else None

    def set_boxes(self, boxes: Tensor) -> None:
        self._boxes.copy_(boxes)
        self._boxed.fill_(True)

    def views(self, epoch: int, first: int = 0) -> Iterator[list[Crops]]:
        """This rank's micro-batches of each step of the epoch, from step `first` on.

        A single micro-batch is copied to the device. Several stay on the host, which has room for a large virtual
        batch; the loop copies each when its turn comes.
        """
        self.order.epoch, self.order.first = epoch, first
        return map(list, zip(*[self._micro_batches()] * self.micro_batches, strict=True))

    def _micro_batches(self) -> Iterator[Crops]:
        for crops, reports in self.loader:
            self.tally.add(reports)
            yield [part.to(self.device, non_blocking=True) for part in crops] if self.micro_batches == 1 else crops

    def bank(self) -> Batches:
        return self.reader.batches(self.bank_indices, self.centred)

    def held_out(self) -> Batches:
        return self.reader.batches(self.test_indices, self.centred)

    def whole(self, places: Tensor) -> Iterator[Tensor]:
        for images, _ in self.reader.batches(self.source.train[places], self.squeezed):
            yield images


class Reader:
    """Reads labelled images of one source in batches and tallies the images that could not be read."""

    def __init__(self, source: Source, data: Data, device: torch.device, batch_size: int | None = None) -> None:
        """batch_size: images in a batch. None: as many as suit an evaluation during a run."""
        self.source, self.device = source, device
        self.workers = 0 if source.decoded else data.workers
        self.batch_size = batch_size or max(1, min(EVAL_BATCH, EVAL_PIXELS // data.size**2))
        self.image_bytes = data.channels * data.size**2
        self.tally = Tally(source, data.max_unreadable)

    def shared_bytes(self, images: int) -> int:
        """Bytes of shared memory that reading so many images needs."""
        in_use = 0 if self.device.type == "cuda" else 1
        return shared_memory.bytes_of_batches(self.image_bytes, self.batch_size, self.workers, in_use, images)

    def batches(self, indices: Tensor, transform: Transform, keys: Sequence[Key] | None = None) -> Batches:
        """Batches of the images `indices` of the source: all in order, or the images that `keys` name."""
        for images, labels in self.pixels(indices, transform, keys):
            yield floats(images), labels

    def pixels(self, indices: Tensor, transform: Transform, keys: Sequence[Key] | None = None) -> Batches:
        """Batches as `batches` gives them, but with the pixels that the transform gives, which may be bytes."""
        dataset = LabelledImages(self.source, indices, self.workers, transform)
        for images, labels, reports in Loader(dataset, self.batch_size, self.device, keys):
            self.tally.add(reports)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class LabelledImages(ImagesOf):
    """Images (C, S, S) through a transform, their labels, and reports of images that could not be read."""

    def __init__(self, source: Source, indices: Tensor, workers: int, transform: Transform) -> None:
        super().__init__(source, indices, workers)
        self.transform = transform

    def make(self, place: int, seed: int | None) -> tuple[Tensor, Tensor, list[Report]]:
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            index, pixels, reports = read(self.source, self.indices, place, self.transform)
        return pixels, self.source.labels[index], reports

    @staticmethod
    def collate(items: list[tuple[Tensor, Tensor, list[Report]]]) -> tuple[Tensor, Tensor, list[Report]]:
        images, labels, reports = zip(*items, strict=True)
        images, labels = shared_memory.send(torch.stack(images), torch.stack(labels))
        return images, labels, list(chain.from_iterable(reports))


class TrainingViews(ImagesOf):
    """The views of training images; their random numbers follow from (seed, epoch, place, view) in any process."""

    def __init__(self, source: Source, workers: int, views: Callable, seed: int, boxes: Tensor, boxed: Tensor) -> None:
        super().__init__(source, source.train, workers)
        self.views, self.seed, self.boxes, self.boxed = views, seed, boxes, boxed

    def make(self, place: int, epoch: int | None) -> tuple[list[Tensor], list[Report]]:
        box = self.boxes[place] if self.boxed else None
        _, views, reports = read(
            self.source, self.indices, place, lambda image: self.views(image, (self.seed, epoch, place), box)
        )
        return views, reports

    @staticmethod
    def collate(items: list[tuple[list[Tensor], list[Report]]]) -> tuple[Crops, list[Report]]:
        """One tensor for each size of views, in which row v*B + i is view v of image i; and all reports."""
        sizes = zip(*(views for views, _ in items), strict=True)
        crops = [torch.stack(size, dim=1).flatten(0, 1) for size in sizes]
        return shared_memory.send(*crops), list(chain.from_iterable(reports for _, reports in items))


class Order(Sampler):
    """(epoch, place) of this rank's images in every step of `epoch`, from step `first` on."""

    def __init__(self, training: int, G: int, seed: int, world: World) -> None:
        self.training, self.G, self.seed, self.world = training, G, seed, world
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return (self.training // self.G - self.first) * self.G // self.world.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = epoch_order(self.training, self.G, self.seed, self.epoch, self.world)
        for place in order[self.first :].flatten().tolist():
            yield self.epoch, place
