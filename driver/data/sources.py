"""Where photographs come from: files, CIFAR-10, tar shards. Each gives labels, a split, and an image by its number."""

import fcntl
import io
import re
import tarfile
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

from ..config import Data, UserError
from .images import split

TEST_NAMES = ("val", "test")
"""Of held-out images, folders or shards, beside `train`: the first that is there."""


class Source(Protocol):
    """Images by number. `labels` (n,) int64; `train` and `test` are numbers of images."""

    labels: Tensor
    train: Tensor
    test: Tensor

    def read(self, index: int) -> Image.Image:
        """The image in RGB. Raises: OSError, ValueError or SyntaxError where it is not readable."""

    def name(self, index: int) -> str:
        """Of its file."""


def make_source(data: Data) -> Source:
    """The source that the options name. Raises: UserError where there are no images."""
    assert data.root is not None
    if data.source == "webdataset":
        return Shards(data.root, data.held_out)
    has_folders = data.root.is_dir() and any(e.is_dir() and e.name != CIFAR10.base_folder for e in data.root.iterdir())
    if data.source == "cifar10" and not has_folders:
        return Cifar(data.root)
    return Files(data.root, data.held_out)


class Files:
    """Image files in folders: `train/` beside `val/` or `test/`, or one folder that is split here."""

    def __init__(self, root: Path, held_out: float) -> None:
        if not root.is_dir():
            raise UserError(f"--data.root {root}: {'not a folder' if root.exists() else 'no such folder'}")
        test = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
        if test is not None and (root / "train").is_dir():
            paths, labels = list_images(root / "train")
            test_paths, test_labels = list_images(test)
            self.train, self.test = torch.arange(len(paths)), len(paths) + torch.arange(len(test_paths))
            self.paths, self.labels = paths + test_paths, torch.cat([labels, test_labels])
        else:
            self.paths, self.labels = list_images(root)
            self.train, self.test = split_labelled(self.labels, held_out)

    def read(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB")

    def name(self, index: int) -> str:
        return self.paths[index]


class Cifar:
    """CIFAR-10 (Krizhevsky, 2009) as torchvision downloads it; its 10,000 test images are held out."""

    def __init__(self, root: Path) -> None:
        try:
            parts = _cifar(root)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data.root {root}: CIFAR-10 is neither there nor to be downloaded ({error})") from error
        self.pixels = [part.data for part in parts]
        self.labels = torch.tensor(parts[0].targets + parts[1].targets)
        self.train, self.test = torch.arange(len(self.labels)).split([len(pixels) for pixels in self.pixels])

    def read(self, index: int) -> Image.Image:
        first = len(self.pixels[0])
        return Image.fromarray(self.pixels[0][index] if index < first else self.pixels[1][index - first])

    def name(self, index: int) -> str:
        return f"CIFAR-10 image {index}"


def _cifar(root: Path) -> list[CIFAR10]:
    """Training and test part. Ranks and runs that lack them wait for one that downloads: the lock goes with its holder.

    Raises: OSError, RuntimeError.
    """
    try:
        return [CIFAR10(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError:  # not there, or not yet whole
        root.mkdir(parents=True, exist_ok=True)
        with open(root / "cifar10.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return [CIFAR10(str(root), train=train, download=True) for train in (True, False)]


class Shards:
    """WebDataset shards: every .tar in a folder; a sample is KEY.jpg (or another image) and, with labels, KEY.cls.
    Shards named `train` beside `val` or `test` are used as such folders are; others are split here.

    The members' places are read once, then any image is one read at its place: order, split and resume are those of
    any other source, at the price of one seek per image.
    """

    def __init__(self, root: Path, held_out: float) -> None:
        shards = sorted(root.glob("*.tar")) if root.is_dir() else []
        self.places: list[tuple[Path, int, int, str]] = []
        labels: list[int | None] = []
        sizes = [0, 0]
        for part, of_part in enumerate(_parts(shards)):
            for shard in of_part:
                images, classes = _members(shard)
                sizes[part] += len(images)
                for key in sorted(images):
                    self.places.append((shard, *images[key]))
                    labels.append(classes.get(key))
        if not sizes[0]:
            raise UserError(f"--data.root {root}: no images in its {len(shards)} .tar shards, or none to train on")
        if None in labels and any(label is not None for label in labels):
            raise UserError(f"{self.name(labels.index(None))}: no .cls beside it, as other images have")
        self.labels = torch.tensor([label or 0 for label in labels])
        if sizes[1]:
            self.train, self.test = torch.arange(len(labels)).split(sizes)
        else:
            self.train, self.test = split_labelled(self.labels, held_out)

    def read(self, index: int) -> Image.Image:
        shard, offset, size, _ = self.places[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size))).convert("RGB")

    def name(self, index: int) -> str:
        shard, _, _, member = self.places[index]
        return f"{shard}:{member}"


def _parts(shards: list[Path]) -> tuple[list[Path], list[Path]]:
    """Those to train on and the held-out ones, by the beginning of the name or what follows a prefix; without both, all
    and none."""
    named: dict[str, list[Path]] = {"train": [], **{name: [] for name in TEST_NAMES}}
    for shard in shards:
        if found := re.search(rf"(?:^|[-_.])({'|'.join(named)})", shard.name):
            named[found[1]].append(shard)
    test = next((named[name] for name in TEST_NAMES if named[name]), [])
    return (named["train"], test) if named["train"] and test else (shards, [])


def _members(shard: Path) -> tuple[dict[str, tuple[int, int, str]], dict[str, int]]:
    """By key, which ends at the first dot: (offset, bytes, name) of each image, and classes. Raises: UserError."""
    images, classes = {}, {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                key, _, kind = file.partition(".")
                if f".{kind.lower()}" in IMG_EXTENSIONS:
                    images[f"{folder}/{key}"] = (member.offset_data, member.size, member.name)
                elif kind == "cls":
                    content = tar.extractfile(member)
                    classes[f"{folder}/{key}"] = int(content.read()) if content else 0
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"{shard}: not a readable shard, an uncompressed .tar ({error})") from error
    return images, classes


def split_labelled(labels: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """`split`; without at least two classes there is nothing to test with, and every image is trained on."""
    return split(labels, held_out if len(labels.unique()) > 1 else 0.0)


def list_images(root: Path) -> tuple[list[str], Tensor]:
    """Files and int64 labels: a class per subfolder; with no image in subfolders, the folder's own files, of class 0.

    Raises: UserError if there are none.
    """
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
