"""A folder of images: decoded, and augmented by torchvision, in loader processes.

B images per micro-batch, G per step over all ranks and micro-batches, V views per image, S pixels a side; images are
float32 in [0, 1]. Without at least two classes there is nothing to test with, and every image is trained on.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder, pil_loader
from torchvision.transforms import v2

from .config import Data, UserError
from .data import check_batch, seed_of, split, virtual_batch
from .world import World

BANK_LIMIT = 10_000
EVAL_BATCH = 256

Transform = Callable[[Image.Image], Tensor]


class Folder:
    """Views and labelled images of one folder."""

    channels = 3

    def __init__(self, data: Data, device: torch.device, seed: int, world: World) -> None:
        assert data.root is not None
        paths, labels = list_images(data.root)
        train, test = split(labels, data.held_out if len(labels.unique()) > 1 else 0.0)
        check_batch(len(train), data, world, str(data.root))
        self.training, self.tested = len(train), len(test)
        self.device, self.data = device, data

        G = virtual_batch(data, world)
        self.order = EpochOrder(self.training, seed, G, world)
        self.micro_batches = G // world.size // data.batch_size
        views = Views([paths[i] for i in train], two_views(data), data.views, seed)
        self.train = self._loader(views, data.batch_size, self.order)
        bank = train[torch.randperm(len(train), generator=Generator().manual_seed(0))[:BANK_LIMIT]]
        self.eval_loaders = [
            self._loader(Labelled([paths[i] for i in part], labels[part], centred(data.size)), EVAL_BATCH)
            for part in (bank, test)
        ]

    def views(self, epoch: int) -> Iterator[list[Tensor]]:
        """Micro-batches stay on the host, where a large virtual batch has room; the network fetches them one by one."""
        self.order.epoch = epoch
        return map(list, zip(*[iter(self.train)] * self.micro_batches, strict=True))

    def bank(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._labelled(0)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._labelled(1)

    def _labelled(self, part: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.eval_loaders[part]:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _loader(self, dataset: Dataset, batch_size: int, order: Sampler | None = None) -> DataLoader:
        """With an order: the training loader, whose processes stay and whose batches are (V*B, C, S, S)."""
        return DataLoader(
            dataset,
            batch_size,
            sampler=order,
            collate_fn=None if order is None else by_view,
            num_workers=self.data.workers,
            persistent_workers=order is not None and self.data.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=Generator(),  # its own, so that loading does not advance torch's
        )


class EpochOrder(Sampler):
    """(epoch, index) of this rank's images of every virtual batch, in an order that depends on seed and epoch alone.

    The last images, fewer than a virtual batch, are left out.
    """

    def __init__(self, count: int, seed: int, G: int, world: World) -> None:
        self.count, self.seed, self.G, self.world, self.epoch = count, seed, G, world, 0

    def __len__(self) -> int:
        return self.count // self.G * self.G // self.world.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)[: self.count // self.G * self.G]
        for index in order.view(-1, self.world.size, self.G // self.world.size)[:, self.world.rank].flatten().tolist():
            yield self.epoch, index


class Views(Dataset):
    """V augmented views (V, C, S, S) of an image. Its randomness is that of (seed, epoch, index), in any process."""

    def __init__(self, paths: list[str], transform: Transform, views: int, seed: int) -> None:
        self.paths, self.transform, self.count, self.seed = paths, transform, views, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        image = decode(self.paths[key[1]])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, *key))
            return torch.stack([self.transform(image) for _ in range(self.count)])


def by_view(images: list[Tensor]) -> Tensor:
    """(V*B, C, S, S), row v*B + i is view v of image i, from B images (V, C, S, S)."""
    return torch.stack(images, dim=1).flatten(0, 1)


class Labelled(Dataset):
    """Images (C, S, S) without augmentation, and their labels."""

    def __init__(self, paths: list[str], labels: Tensor, transform: Transform) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(decode(self.paths[index])), self.labels[index]


def two_views(data: Data) -> Transform:
    """Crop, flip, colour, grey and blur, as is usual for photographs, times the strength asked for."""
    a = data.augment
    if a == 0:
        return centred(data.size)
    kernel = max(3, data.size // 10 // 2 * 2 + 1)
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(data.size, scale=(max(0.05, 1 - 0.8 * a), 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4 * a, 0.4 * a, 0.2 * a, min(0.5, 0.1 * a))], p=0.8),
            v2.RandomGrayscale(p=min(1.0, 0.2 * a)),
            v2.RandomApply([v2.GaussianBlur(kernel, sigma=(0.1, 0.1 + 1.9 * a))], p=min(1.0, 0.3 * a)),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def centred(size: int) -> Transform:
    return v2.Compose(
        [v2.ToImage(), v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    )


def decode(path: str) -> Image.Image:
    """The image in RGB. Raises: UserError with the file's name."""
    try:
        return pil_loader(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from error


def list_images(root: Path) -> tuple[list[str], Tensor]:
    """Files and int64 labels: a class per subfolder; with no image in subfolders, the folder's own files, of class 0.

    Raises: UserError if there are none.
    """
    if not root.is_dir():
        raise UserError(f"--data.root {root}: {'not a folder' if root.exists() else 'no such folder'}")
    files = sorted(str(path) for path in root.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
    samples = []
    if any(entry.is_dir() for entry in root.iterdir()):
        samples = ImageFolder(str(root), allow_empty=True).samples
    if samples:
        if files:
            print(f"note: {len(files)} images beside the class subfolders of {root} are left out")
        return [path for path, _ in samples], torch.tensor([label for _, label in samples])
    if not files:
        raise UserError(
            f"--data.root {root}: no images in it or in its subfolders (looked for {' '.join(sorted(IMG_EXTENSIONS))})"
        )
    return files, torch.zeros(len(files), dtype=torch.int64)
