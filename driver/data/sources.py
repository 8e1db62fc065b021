"""Where images come from: the embedded digits, image files, CIFAR-10, tar shards.

An index numbers an image in its source; a source gives images by index, labels, and the indices of its two parts.
torchvision is optional: only photographs need it.
"""

import fcntl
import io
import re
import tarfile
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Generator, Tensor

from ..config import Data, UserError

TEST_NAMES = ("val", "test")
"""Names of held-out folders or shards that stand beside `train`; the first name that is there counts."""
SPLIT_SEED = 0


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

    def read(self, index: int) -> Image.Image | Tensor:
        """A photograph in RGB, or pixels (C, H, W) in [0, 1] where the source is decoded.

        Raises: OSError, ValueError or SyntaxError where the image is not readable.
        """

    def name(self, index: int) -> str:
        """File name of image `index`, for messages."""


def make_source(data: Data) -> Source:
    """The source that the options name.

    Raises: UserError where there are no images; ImportError where torchvision is missing.
    """
    if data.source == "digits":
        return Digits(data.held_out)
    assert data.root is not None
    if data.source == "webdataset":
        return Shards(data.root, data.held_out)
    if data.source == "cifar10" and not _has_class_folders(data.root):
        return Cifar(data.root)
    return Files(data.root, data.held_out)


class Digits(Source):
    """scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels in one channel."""

    decoded = True

    def __init__(self, held_out: float) -> None:
        from sklearn.datasets import load_digits  # slow to import, and photographs do without

        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float().div_(16)[:, None]
        self.labels = torch.from_numpy(digits.target).long()
        self.train, self.test = split(self.labels, held_out)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"scikit-learn's digit {index}"


class Files(Source):
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
            self.train, self.test = split(self.labels, held_out)

    def read(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB")

    def name(self, index: int) -> str:
        return self.paths[index]


class Cifar(Source):
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


def _has_class_folders(root: Path) -> bool:
    """Whether `root` has folders besides the one that torchvision's CIFAR-10 is kept in."""
    from torchvision.datasets import CIFAR10

    return root.is_dir() and any(entry.is_dir() and entry.name != CIFAR10.base_folder for entry in root.iterdir())


def _cifar(root: Path) -> list[Any]:
    """CIFAR-10's training and test part, downloaded where they are missing.

    A file lock lets one process download while other ranks and runs wait; it is released when its holder ends.
    Raises: OSError or RuntimeError where the download fails.
    """
    from torchvision.datasets import CIFAR10

    try:
        return [CIFAR10(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError:  # missing, or not yet whole
        root.mkdir(parents=True, exist_ok=True)
        with open(root / "cifar10.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return [CIFAR10(str(root), train=train, download=True) for train in (True, False)]


class Shards(Source):
    """WebDataset shards: every .tar in a folder; a sample is KEY.jpg (or another image) and, with labels, KEY.cls.

    Shards named `train` beside shards named `val` or `test` are the two parts; otherwise all shards are split here.
    The shards are listed once; then any image is one seek and one read, in any order.
    """

    def __init__(self, root: Path, held_out: float) -> None:
        shards = sorted(root.glob("*.tar")) if root.is_dir() else []
        self.members: list[tuple[Path, int, int, str]] = []  # shard, offset, size in bytes and name of each image
        labels: list[int | None] = []
        sizes = [0, 0]
        for part, shards_of_part in enumerate(_parts(shards)):
            for shard in shards_of_part:
                images, classes = _members(shard)
                sizes[part] += len(images)
                for key in sorted(images):
                    self.members.append((shard, *images[key]))
                    labels.append(classes.get(key))
        if not sizes[0]:
            raise UserError(f"--data.root {root}: no images in its {len(shards)} .tar shards, or none to train on")
        if None in labels and any(label is not None for label in labels):
            raise UserError(f"{self.name(labels.index(None))}: no .cls beside it, as other images have")
        self.labels = torch.tensor([label or 0 for label in labels])
        if sizes[1]:
            self.train, self.test = torch.arange(len(labels)).split(sizes)
        else:
            self.train, self.test = split(self.labels, held_out)

    def read(self, index: int) -> Image.Image:
        shard, offset, size, _ = self.members[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size))).convert("RGB")

    def name(self, index: int) -> str:
        shard, _, _, member = self.members[index]
        return f"{shard}:{member}"


def _parts(shards: list[Path]) -> tuple[list[Path], list[Path]]:
    """Shards of training images and shards of held-out images, by the beginning of the name or what follows a prefix.

    Unless there are shards of both kinds, the first part has all shards.
    """
    named: dict[str, list[Path]] = {"train": [], **{name: [] for name in TEST_NAMES}}
    for shard in shards:
        if match := re.search(rf"(?:^|[-_.])({'|'.join(named)})", shard.name):
            named[match[1]].append(shard)
    test = next((named[name] for name in TEST_NAMES if named[name]), [])
    return (named["train"], test) if named["train"] and test else (shards, [])


def _members(shard: Path) -> tuple[dict[str, tuple[int, int, str]], dict[str, int]]:
    """Images (offset, size in bytes, name) and classes of a shard, by key: a member's path up to its first dot.

    Raises: UserError where the shard is not readable.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

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


def split(labels: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """Indices of training and held-out images: an equal share of every class, chosen alike in every run.

    With fewer than two classes there is nothing to test, and every image is a training image.
    """
    classes = labels.unique()
    share = held_out if len(classes) > 1 else 0.0
    generator = Generator().manual_seed(SPLIT_SEED)
    train, test = [], []
    for label in classes:
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(share * len(members))
        test.append(members[:cut])
        train.append(members[cut:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def list_images(root: Path) -> tuple[list[str], Tensor]:
    """Image files and their labels (n,) int64, a class per subfolder.

    Where no subfolder has an image, the folder's own files, all of class 0. Raises: UserError where there is no image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

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
