"""WebDataset shards: images and labels in uncompressed .tar files, listed once and then read in any order."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..config import UserError
from ..messages.text import amount, listed, printable
from .archive import LeftOut, Member, key_of, list_members, place_of
from .decode import DEFAULT, EXTENSIONS, Decoder, check_bytes
from .images import Source
from .parts import divide
from .shard_files import find_shards, parts_of_shards
from .shard_labels import SUFFIX, Label, labels_of


class Shards(Source):
    """WebDataset shards: one .tar, or every .tar under a folder, with images and perhaps a .cls file for each.

    Shards of training images beside shards of held-out images, by name, are the two parts; otherwise all are split
    here. The shards are listed once; then any image is one seek and one read, in any order.
    """

    def __init__(self, root: Path, held_out: float, decode: Decoder = DEFAULT) -> None:
        """List the shards under `root`. Raises: UserError where there is no image, or a shard or label is malformed."""
        self.folder = root if root.is_dir() else root.parent
        self.decode, left_out = decode, LeftOut()
        shards = find_shards(root)
        train, test, test_name = parts_of_shards(root, shards, left_out)
        images = [image for shard in train for image in _images(shard, left_out)]
        training = len(images)
        images += [image for shard in test for image in _images(shard, left_out)]
        if not training:
            shown = f"--data.root {root}: no images in {amount(len(train), 'shard')}"
            raise UserError("; ".join(filter(None, [shown, str(left_out)])))
        self.members = [(image.shard, image.member.offset, image.member.size, image.member.name) for image in images]
        self.labels, classes = _classes(images)
        self.train, self.test = divide(self.labels, training if test else None, held_out)
        names = listed(classes, text=lambda label: printable(str(label)))
        kinds = f" in {amount(len(classes), 'class', 'classes')} ({names})" if classes else ""
        texts = [
            f"{root}: {amount(len(images), 'image')}{kinds} in {amount(len(train) + len(test), 'shard')}, "
            f"{self._division(test_name, held_out)}",
            *_remarks(images),
            self._untrained(classes),
            str(left_out),
        ]
        self.summary = printable("; ".join(filter(None, texts)), None)

    def read(self, index: int) -> Image.Image:
        shard, offset, size, _ = self.members[index]
        check_bytes(size)
        with open(shard, "rb") as file:
            file.seek(offset)
            return self.decode(io.BytesIO(file.read(size)))

    def name(self, index: int) -> str:
        shard, _, _, member = self.members[index]
        return place_of(shard, member)

    def entry(self, index: int) -> tuple[str, int]:
        """Name of image `index`, relative to the folder of the shards, and its size in bytes."""
        shard, _, size, member = self.members[index]
        return f"{shard.relative_to(self.folder)}:{member}", size

    def _division(self, test_name: str, held_out: float) -> str:
        """Numbers of training and held-out images, as text."""
        training, tested, images = len(self.train), len(self.test), len(self.labels)
        if tested:
            return f"{training:,} to train on and {tested:,} held out ({test_name or f'--data.held-out {held_out:g}'})"
        if training < images:
            reason = "as accuracies need two classes to train on"
            return f"{training:,} to train on; the other {images - training:,} ({test_name}) are not used, {reason}"
        return "all to train on"

    def _untrained(self, classes: Sequence[int | str]) -> str:
        """Classes of which there are held-out images alone, as text; empty where there is none."""
        of_train, of_test = (set(self.labels[part].tolist()) for part in (self.train, self.test))
        names = [str(classes[label]) for label in sorted(of_test - of_train)]
        return f"no image to train on is of {len(names):,} of the classes held out ({listed(names)})" if names else ""


class _Image(NamedTuple):
    """An image in a shard, and its label."""

    shard: Path
    member: Member
    label: Label

    def __str__(self) -> str:
        return place_of(self.shard, self.member.name)


def _images(shard: Path, left_out: LeftOut) -> Iterator[_Image]:
    """Images of a shard in the order of their keys, then of their names."""
    files = list_members(shard, left_out)
    images = sorted(
        (file for file in files if file.kind in EXTENSIONS), key=lambda file: (key_of(file.path), file.path)
    )
    others = (file.kind for file in files if file.kind not in EXTENSIONS and file.kind != SUFFIX)
    left_out.kinds.update(printable(kind) or "without extension" for kind in others)
    labels = labels_of(shard, images, files, left_out)
    return (_Image(shard, image, label) for image, label in zip(images, labels, strict=True))


def _classes(images: Sequence[_Image]) -> tuple[Tensor, list[int | str]]:
    """Class (n,) int64 of each image, and the labels of the classes in order: none, unless every image has a label.

    Raises: UserError where labels of some images are numbers and of others names.
    """
    if any(image.label is None for image in images):
        return torch.zeros(len(images), dtype=torch.int64), []
    first: dict[type, _Image] = {}
    for image in images:
        first.setdefault(type(image.label), image)
    if len(first) > 1:
        number, name = first[int], first[str]
        raise UserError(
            f"{name}: its label is the name {name.label!r}, but {number} has the number {number.label}; "
            "labels must be all numbers or all names of classes"
        )
    classes = sorted({image.label for image in images})  # type: ignore[type-var]
    number_of = {label: number for number, label in enumerate(classes)}
    return torch.tensor([number_of[image.label] for image in images]), classes  # type: ignore[return-value]


def _remarks(images: Sequence[_Image]) -> Iterator[str]:
    """What the owner may not expect, as texts: images without a label, several images of one key in a shard."""
    unlabelled = [image for image in images if image.label is None]
    if len(unlabelled) == len(images):
        yield "without labels"
    elif unlabelled:
        yield (
            f"without accuracies, since .cls is missing or negative for {len(unlabelled):,} of {len(images):,} images "
            f"(first: {unlabelled[0]})"
        )
    keys = [(image.shard, key_of(image.member.path)) for image in images]
    count = Counter(keys)
    if shared := [image for image, key in zip(images, keys, strict=True) if count[key] > 1]:
        yield f"{len(shared):,} images share their key with another of their shard (first: {shared[0]}); all are used"
