"""Images read in worker processes: labelled ones for the evaluation, augmented views for training.

B images per micro-batch, G per step over all ranks and micro-batches, V views per image, images of S x S pixels.

Workers are forked by a server process that has no threads: a fork of the run itself could wait for ever for a lock that
one of its threads held. A scheduler such as Slurm sends its signals to every process of the run. The main process saves
and ends, and needs its workers until then, so workers block these signals.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from multiprocessing import forkserver
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import Boxes, Data
from ..distributed import World
from ..exits import StopSignal
from .crops import WHOLE
from .images import Batches, Crops, Source, Transform, epoch_order, virtual_batch
from .unreadable import Report, Tally, read

EVAL_BATCH = 256
BANK_LIMIT = 10_000
"""Largest number of training images in the evaluation of a run, over all ranks."""

Key = int | tuple[int, int]
"""Place of an image among the images read; or a seed and the place, where the transform is random."""


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
        # In shared memory, so that workers that are running see new boxes.
        self._boxes = torch.tensor(WHOLE).repeat(self.training, 1).share_memory_()
        self._boxed = torch.zeros(1, dtype=torch.bool).share_memory_()
        dataset = TrainingViews(source, views.Views(data, boxes.alpha), seed, self._boxes, self._boxed)
        self.loader = loader(dataset, data.batch_size, data.workers, device, self.order, stay=True)
        self.reader = Reader(source, data, device)
        self.tally = self.reader.tally
        chosen = torch.randperm(self.training, generator=Generator().manual_seed(0))[:BANK_LIMIT]
        self.bank_indices, self.test_indices = (
            indices[world.rank :: world.size] for indices in (source.train[chosen], source.test)
        )
        self.centred, self.squeezed = views.centred(data.size), views.squeezed(data.size)

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

    def __init__(self, source: Source, data: Data, device: torch.device) -> None:
        self.source, self.device = source, device
        self.workers = 0 if source.decoded else data.workers
        self.tally = Tally(source, data.max_unreadable)

    def batches(
        self, indices: Tensor, transform: Transform, batch_size: int = EVAL_BATCH, keys: Sequence[Key] | None = None
    ) -> Batches:
        """Batches of the images `indices` of the source: all in order, or the images that `keys` name."""
        dataset = LabelledImages(self.source, indices, transform)
        for images, labels, reports in loader(dataset, batch_size, self.workers, self.device, keys):
            self.tally.add(reports)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class LabelledImages(Dataset):
    """Images (C, S, S) through a transform, their labels, and reports of images that could not be read."""

    def __init__(self, source: Source, indices: Tensor, transform: Transform) -> None:
        self.source, self.indices, self.transform = source, indices.tolist(), transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, list[Report]]:
        seed, place = key if isinstance(key, tuple) else (None, key)
        index, image, reports = read(self.source, self.indices, place)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return self.transform(image), self.source.labels[index], reports

    @staticmethod
    def collate(items: list[tuple[Tensor, Tensor, list[Report]]]) -> tuple[Tensor, Tensor, list[Report]]:
        images, labels, reports = zip(*items, strict=True)
        return torch.stack(images), torch.stack(labels), list(chain.from_iterable(reports))


class TrainingViews(Dataset):
    """The views of training images; their random numbers follow from (seed, epoch, place, view) in any process."""

    def __init__(self, source: Source, views: Callable, seed: int, boxes: Tensor, boxed: Tensor) -> None:
        self.source, self.views, self.seed, self.boxes, self.boxed = source, views, seed, boxes, boxed
        self.indices = source.train.tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], list[Report]]:
        epoch, place = key
        _, image, reports = read(self.source, self.indices, place)
        box = self.boxes[place] if self.boxed else None
        return self.views(image, (self.seed, epoch, place), box), reports

    @staticmethod
    def collate(items: list[tuple[list[Tensor], list[Report]]]) -> tuple[Crops, list[Report]]:
        """One tensor for each size of views, in which row v*B + i is view v of image i; and all reports."""
        sizes = zip(*(views for views, _ in items), strict=True)
        crops = [torch.stack(size, dim=1).flatten(0, 1) for size in sizes]
        return crops, list(chain.from_iterable(reports for _, reports in items))


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


def loader(
    dataset: LabelledImages | TrainingViews,
    batch_size: int,
    workers: int,
    device: torch.device,
    keys: Sampler | Sequence[Key] | None = None,
    stay: bool = False,
) -> DataLoader:
    """Batches of `dataset` for `device`, in its own order or in that of `keys`; `stay`: workers outlive an epoch."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=keys,
        collate_fn=dataset.collate,
        num_workers=workers,
        multiprocessing_context=_fork_server() if workers else None,
        persistent_workers=stay and workers > 0,
        pin_memory=device.type == "cuda",
        generator=Generator(),  # its own, so that loading does not advance torch's
    )


@cache
def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2"])
    # Processes started meanwhile inherit the blocked signals for good; the run gets a blocked signal later.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.NAMES)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
