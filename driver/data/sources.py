"""Where images come from: the embedded digits, image files, CIFAR-10, tar shards.

An index numbers an image in its source; a source gives images by index, labels, and the indices of its two parts.
torchvision is optional: only photographs need it.
"""

import os
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import Data, UserError
from ..files import lock
from ..messages.text import printable
from .decode import DEFAULT, Decoder
from .folders import Files
from .images import Source
from .inventory import pixel_digest
from .listing import is_hidden
from .parts import split
from .shards import Shards


def make_source(data: Data) -> Source:
    """The source that the options name; its summary is printed.

    Raises: UserError where there are no images; ImportError where torchvision is missing.
    """
    source = _open(data)
    if source.summary:
        print(source.summary)
    return source


def _open(data: Data) -> Source:
    decode = Decoder(data.pixel_range, data.exif)
    root = None if data.root is None else _recordable(data.root)
    if data.source in ("folder", "webdataset") or (data.source == "cifar10" and _has_class_folders(root)):
        assert root is not None
        return (Shards if data.source == "webdataset" else Files)(root, data.held_out, decode)
    if decode != DEFAULT:
        raise UserError(
            f"--data.pixel-range and --data.exif do nothing for --data.source {data.source}: no image files"
        )
    if data.source == "digits":
        return Digits(data.held_out)
    assert root is not None
    return Cifar(root)


def _recordable(root: Path) -> Path:
    """The folder `root`. Raises: UserError where the run's files cannot hold its path."""
    try:
        os.path.abspath(root).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--data.root {printable(str(root), None)}: the path must be UTF-8, as the run's files hold it; "
            "link the folder under another name"
        ) from error
    return root


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

    def entry(self, index: int) -> tuple[str, int]:
        return _entry(self.name(index), self.read(index).numpy())


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

    def entry(self, index: int) -> tuple[str, int]:
        return _entry(self.name(index), np.asarray(self.read(index)))


def _entry(name: str, pixels: np.ndarray) -> tuple[str, int]:
    """Entry in the inventory of an image that has no file of its own."""
    return f"{name}, pixels {pixel_digest(pixels.tobytes())}", pixels.nbytes


def _has_class_folders(root: Path | None) -> bool:
    """Whether `root` has folders that may hold images, and none that torchvision keeps CIFAR-10 in."""
    from torchvision.datasets import CIFAR10

    try:
        folders = [] if root is None else [entry.name for entry in root.iterdir() if entry.is_dir()]
    except OSError:  # torchvision makes the folder, or says why it cannot
        return False
    return CIFAR10.base_folder not in folders and any(not is_hidden(name) for name in folders)


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
        with FileIO(root / "cifar10.lock", "a") as file:
            lock(file, root, wait=True)
            return [CIFAR10(str(root), train=train, download=True) for train in (True, False)]
