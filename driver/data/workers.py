"""Photographs decoded and augmented by torchvision in loader processes.

B images per micro-batch, G per step over all ranks and micro-batches, V views per image, S pixels a side; images are
float32 in [0, 1].

Loader processes are forked by a process that has no threads: a fork of the run itself, whose threads it does not take
along, may wait for ever for what one of them held. Signals that ask the run to save and end reach all its processes, as
from Slurm; the main one answers, and needs the others.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from functools import cache, partial
from multiprocessing import forkserver
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import Boxes, Data
from ..distributed import World
from ..exits import StopSignal
from .crops import WHOLE
from .images import EVAL_BATCH, Crops, epoch_order, virtual_batch
from .sources import Source
from .unreadable import Report, Tally, read
from .views import Views, centred, whole

BANK_LIMIT = 10_000


class Loaded:
    """Views and labelled images of one source. What could not be read is in `tally`, settled at log lines."""

    channels = 3

    def __init__(self, source: Source, data: Data, boxes: Boxes, device: torch.device, seed: int, world: World) -> None:
        self.source, self.data, self.device = source, data, device
        self.training, self.tested = len(source.train), len(source.test)
        self.classes = int(source.labels.max()) + 1
        G = virtual_batch(data, world)
        self.order = Order(self.training, G, seed, world)
        self.micro_batches = G // world.size // data.batch_size
        # Workers see what is written here later: the memory is shared.
        self._boxes = torch.tensor(WHOLE).repeat(self.training, 1).share_memory_()
        self._boxed = torch.zeros(1, dtype=torch.bool).share_memory_()
        views = Augmented(source, Views(data, boxes.alpha), seed, self._boxes, self._boxed)
        self.train = self._loader(views, data.batch_size, self.order)
        self.tally = Tally(source, data.max_unreadable, self.training + self.tested)
        chosen = torch.randperm(self.training, generator=Generator().manual_seed(0))[:BANK_LIMIT]
        self.eval_numbers = [part[world.rank :: world.size] for part in (source.train[chosen], source.test)]

    @property
    def boxes(self) -> Tensor | None:
        return self._boxes if self._boxed else None

    def set_boxes(self, boxes: Tensor) -> None:
        self._boxes.copy_(boxes)
        self._boxed.fill_(True)

    def views(self, epoch: int, first: int = 0) -> Iterator[list[Crops]]:
        """One micro-batch per step is brought to the device. Several stay on the host, where a large virtual batch has
        room, and are fetched by the network one by one.
        """
        self.order.epoch, self.order.first = epoch, first
        return map(list, zip(*[self._readable()] * self.micro_batches, strict=True))

    def _readable(self) -> Iterator[Crops]:
        for crops, reports in self.train:
            self.tally.add(reports)
            yield [part.to(self.device, non_blocking=True) for part in crops] if self.micro_batches == 1 else crops

    def bank(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._plain(self.eval_numbers[0], centred)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._plain(self.eval_numbers[1], centred)

    def whole(self, places: Tensor) -> Iterator[Tensor]:
        for images, _ in self._plain(self.source.train[places], whole):
            yield images

    def _plain(
        self, numbers: Tensor, transform: Callable[[Image.Image, int], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        dataset = Plain(self.source, numbers, partial(transform, size=self.data.size))
        for images, labels, reports in self._loader(dataset, EVAL_BATCH):
            self.tally.add(reports)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _loader(self, dataset: Dataset, batch_size: int, order: Sampler | None = None) -> DataLoader:
        """With an order: the training loader, whose processes stay."""
        return loader(dataset, batch_size, self.data.workers, order, pin_memory=self.device.type == "cuda")


def loader(
    dataset: Dataset, batch_size: int, workers: int, order: Sampler | None = None, pin_memory: bool = False
) -> DataLoader:
    """Batches of `dataset`, in its order or in the one given."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=order,
        collate_fn=by_image if order is None else by_view,
        **processes(workers),
        persistent_workers=order is not None and workers > 0,
        pin_memory=pin_memory,
        generator=Generator(),  # its own, so that loading does not advance torch's
    )


class Order(Sampler):
    """(epoch, place) of this rank's images of every virtual batch of `epoch`, from step `first` on."""

    def __init__(self, training: int, G: int, seed: int, world: World) -> None:
        self.training, self.G, self.seed, self.world = training, G, seed, world
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return (self.training // self.G - self.first) * self.G // self.world.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = epoch_order(self.training, self.G, self.seed, self.epoch, self.world)
        for place in order[self.first :].flatten().tolist():
            yield self.epoch, place


class Augmented(Dataset):
    """The views of a training image, its randomness that of (seed, epoch, place, view) in any process."""

    def __init__(self, source: Source, views: Views, seed: int, boxes: Tensor, boxed: Tensor) -> None:
        self.source, self.views, self.seed, self.boxes, self.boxed = source, views, seed, boxes, boxed
        self.numbers = source.train.tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], list[Report]]:
        epoch, place = key
        _, image, reports = read(self.source, self.numbers, place)
        box = self.boxes[place] if self.boxed else None
        return self.views(image, (self.seed, epoch, place), box), reports


class Plain(Dataset):
    """Images (C, S, S) without augmentation, and their labels."""

    def __init__(self, source: Source, numbers: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.numbers, self.transform = source, numbers.tolist(), transform

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, list[Report]]:
        index, image, reports = read(self.source, self.numbers, place)
        return self.transform(image), self.source.labels[index], reports


def by_view(images: list[tuple[list[Tensor], list[Report]]]) -> tuple[Crops, list[Report]]:
    """Row v*B + i is view v of image i, in a tensor for each size."""
    sizes = zip(*(views for views, _ in images), strict=True)
    return [torch.stack(size, dim=1).flatten(0, 1) for size in sizes], [r for _, reports in images for r in reports]


def by_image(images: list[tuple[Tensor, Tensor, list[Report]]]) -> tuple[Tensor, Tensor, list[Report]]:
    pixels, labels, reports = zip(*images, strict=True)
    return torch.stack(pixels), torch.stack(labels), [r for of_image in reports for r in of_image]


def everything(source: Source, numbers: Tensor, data: Data, tally: Tally) -> tuple[Tensor, Tensor]:
    """(n, 3, S, S) uint8 and labels (n,) of these images, decoded once."""
    images = torch.empty(len(numbers), 3, data.size, data.size, dtype=torch.uint8)
    labels = torch.empty(len(numbers), dtype=torch.int64)
    done = 0
    for part, of_part, reports in loader(
        Plain(source, numbers, partial(centred, size=data.size)), EVAL_BATCH, data.workers
    ):
        tally.add(reports)
        images[done : done + len(part)] = part.mul(255).round()
        labels[done : done + len(part)] = of_part
        done += len(part)
    return images, labels


def processes(count: int) -> dict[str, Any]:
    """A DataLoader's arguments for this many."""
    return {"num_workers": count, "multiprocessing_context": _server() if count else None}


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2"])
    # What is blocked stays so in the processes that are started meanwhile; here it comes late, and is not lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.NAMES)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
