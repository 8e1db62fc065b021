"""Image files in folders, with a class per subfolder, and one line of text on how the folders were understood."""

import os
import stat
from itertools import chain
from pathlib import Path

import torch
from PIL import Image

from ..config import UserError
from ..messages.text import amount, listed, printable
from .decode import DEFAULT, EXTENSIONS, Decoder
from .images import Source
from .inventory import file_size
from .layout import Layout, folders_of, understand
from .listing import Listing, counted
from .parts import divide

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
SHARDS = "--data.source webdataset reads the .tar shards in a folder, or one shard"


class Files(Source):
    """Image files in folders: `train/` beside `val/` or `test/`, or one folder that is split here.

    A label is the place of a class among the sorted class names of both parts. Where the training images are of fewer
    than two classes, no image is held out.
    """

    def __init__(self, root: Path, held_out: float, decode: Decoder = DEFAULT) -> None:
        """Find the images under `root`. Raises: UserError where there are none, or it is not clear what they are."""
        self.decode = decode
        listing = Listing(existing_folder(root))
        self.root = listing.root
        layout = understand(listing)
        classes = sorted({name for part in layout.parts for name in part.classes})
        label_of = {name: label for label, name in enumerate(classes)}
        self.paths: list[str] = []
        labels: list[int] = []
        ends = []  # of each part, as a number of images
        for part in layout.parts:
            for name, directories in part.classes.items():
                self.paths += listing.paths(directories)
                labels += [label_of[name]] * (len(self.paths) - len(labels))
            ends.append(len(labels))
        if not labels:
            raise no_images(listing)
        self.labels = torch.tensor(labels)
        self.train, self.test = divide(self.labels, ends[0] if len(ends) > 1 else None, held_out)
        self.summary = "; ".join(filter(None, [self._numbers(layout, classes, held_out), *remarks(listing, layout)]))

    def read(self, index: int) -> Image.Image:
        return self.decode(Path(self.paths[index]))

    def name(self, index: int) -> str:
        return printable(self.paths[index], None)

    def entry(self, index: int) -> tuple[str, int]:
        path = self.paths[index]
        return path.removeprefix(f"{self.root}/"), file_size(path)

    def _numbers(self, layout: Layout, classes: list[str], held_out: float) -> str:
        """Numbers of images and classes, and of images in each part, as text."""
        images, training, tested = len(self.paths), len(self.train), len(self.test)
        number = amount(len(classes), "class", "classes")
        kinds = "without classes" if classes == [""] else f"in {number} ({listed(classes, text=printable)})"
        text = f"{printable(layout.base, None)}: {images:,} images {kinds}, "
        names = [f"{printable(part.name)}/" for part in layout.parts]
        if len(names) == 2 and tested:
            return f"{text}{training:,} to train on ({names[0]}) and {tested:,} held out ({names[1]})"
        if len(names) == 2:
            rest = f"the other {images - training:,} ({names[1]}) are not used"
            return f"{text}{training:,} to train on ({names[0]}); {rest}, as accuracies need two classes in {names[0]}"
        if len(classes) > 1:
            return f"{text}{training:,} to train on and {tested:,} held out (--data.held-out {held_out:g})"
        return f"{text}all to train on, without accuracies"


def existing_folder(root: Path) -> Path:
    """The folder `root`. Raises: UserError where it is no folder."""
    try:
        mode = root.stat().st_mode
    except OSError as error:
        why = "no such folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"--data.root {root}: {why}") from error
    if stat.S_ISDIR(mode):
        return root
    if root.suffix.lower() not in ARCHIVES:
        raise UserError(f"--data.root {root}: not a folder")
    shards = f"; {SHARDS}" if root.suffix.lower() == ".tar" else ""
    raise UserError(f"--data.root {root}: not a folder but an archive; unpack it and give the new folder{shards}")


def no_images(listing: Listing) -> UserError:
    """Error for a folder without images, with what is there instead."""
    there = f": {counted(listing.left_out)}" if listing.left_out else ""
    shards = f"; {SHARDS}" if listing.left_out[".tar"] else ""
    return UserError(
        f"--data.root {listing.root}: no images in it or in its subfolders{there} "
        f"(looked for {' '.join(sorted(EXTENSIONS))}){shards}"
    )


def remarks(listing: Listing, layout: Layout) -> list[str]:
    """What a reader may not expect, as texts: classes that one part lacks, folders in classes, what is left out."""
    texts = []
    for part, other in (layout.parts, layout.parts[::-1]) if len(layout.parts) == 2 else ():
        if lacking := sorted(other.classes.keys() - part.classes.keys()):
            texts.append(
                f"{printable(part.name)}/ lacks {len(lacking):,} of the {len(other.classes):,} classes of "
                f"{printable(other.name)}/ ({listed(lacking, text=printable)})"
            )
    if within := [folders for part in layout.parts for folders in part.classes.values() if len(folders) > 1]:
        names = listed(chain.from_iterable(within), text=lambda path: printable(os.path.relpath(path, layout.base)))
        texts.append(f"folders within a class are no classes of their own ({names})")
    others = f"{folders_of(list(layout.others))} ({sum(layout.others.values()):,} images)" if layout.others else ""
    if out := ", ".join(filter(None, [others, counted(listing.left_out)])):
        texts.append(f"left out: {out}")
    return texts
