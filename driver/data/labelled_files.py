"""Labelled photographs at the crops of the published evaluations, decoded in loader processes.

Plain: the shorter side at 8/7 of S, then the middle square of S (256 and 224). Augmented: RandomResizedCrop and flip.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from ..config import Data, UserError
from ..distributed import World
from .labelled import Batches, shuffled
from .random_keys import seed_of
from .sources import Source, make_source
from .unreadable import Report, Tally, read
from .workers import by_image, processes

Key = int | tuple[int, int]
"""Place of an image; with a seed before it, cropped at random by that seed."""
RESIZED = 8 / 7
SMALL = 64
"""Images of at most so many pixels are not cut: they have no margin."""


class LabelledFiles:
    """See Labelled."""

    def __init__(self, data: Data, device: torch.device, world: World) -> None:
        self.source, self.data, self.device, self.world = make_source(data), data, device, world
        self.training, self.tested = len(self.source.train), len(self.source.test)
        if not self.tested:
            raise UserError(f"{data.root}: no labelled images to test with; there must be at least two classes")
        self.tally = Tally(self.source, data.max_unreadable, self.training + self.tested)
        self.classes = int(self.source.labels.max()) + 1

    def plain(self, part: Literal["train", "test"]) -> Batches:
        numbers = self.source.train if part == "train" else self.source.test
        return self._batches(numbers, range(self.world.rank, len(numbers), self.world.size))

    def augmented(self, seed: int, epoch: int) -> Batches:
        places = shuffled(self.training, self.data.batch_size, seed, epoch, self.world).tolist()
        return self._batches(self.source.train, [(seed_of(seed, epoch, place), place) for place in places])

    def _batches(self, numbers: Tensor, keys: Sequence[Key]) -> Batches:
        loader = DataLoader(
            Crops(self.source, numbers, self.data.size),
            self.data.batch_size,
            sampler=keys,
            **processes(self.data.workers),
            collate_fn=by_image,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels, reports in loader:
            self.tally.add(reports)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        self.tally.settle(self.world)


class Crops(Dataset):
    """Images (3, S, S), their labels, and what could not be read."""

    def __init__(self, source: Source, numbers: Tensor, size: int) -> None:
        self.source, self.numbers = source, numbers.tolist()
        resized = size if size <= SMALL else round(size * RESIZED)
        cubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
        floats = v2.ToDtype(torch.float32, scale=True)
        self.plain = v2.Compose([v2.ToImage(), v2.Resize(resized, **cubic), v2.CenterCrop(size), floats])
        self.random = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(size, **cubic), v2.RandomHorizontalFlip(), floats])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, list[Report]]:
        seed, place = key if isinstance(key, tuple) else (None, key)
        index, image, reports = read(self.source, self.numbers, place)
        if seed is None:
            return self.plain(image), self.source.labels[index], reports
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.random(image), self.source.labels[index], reports
