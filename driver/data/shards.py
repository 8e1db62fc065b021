"""WebDataset shards: images and labels in uncompressed .tar files, listed once and then read in any order."""

import io
import re
import tarfile
from pathlib import Path

import torch
from PIL import Image

from ..config import UserError
from .decode import DEFAULT, Decoder
from .images import Source
from .parts import TEST_NAMES, split


class Shards(Source):
    """WebDataset shards: every .tar in a folder; a sample is KEY.jpg (or another image) and, with labels, KEY.cls.

    Shards named `train` beside shards named `val` or `test` are the two parts; otherwise all shards are split here.
    The shards are listed once; then any image is one seek and one read, in any order.
    """

    def __init__(self, root: Path, held_out: float, decode: Decoder = DEFAULT) -> None:
        self.root, self.decode = root, decode
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
            return self.decode(io.BytesIO(file.read(size)))

    def name(self, index: int) -> str:
        shard, _, _, member = self.members[index]
        return f"{shard}:{member}"

    def entry(self, index: int) -> tuple[str, int]:
        shard, _, size, member = self.members[index]
        return f"{shard.relative_to(self.root)}:{member}", size


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
