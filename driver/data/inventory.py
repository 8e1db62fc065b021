"""Inventory of a run's images: their names and sizes in order, by which a resumed run knows that it has them again.

The run keeps the inventory beside its checkpoints in images.tsv.gz, a line per image: part, size in bytes, name.
"""

import gzip
import os
import re
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from bam_kernels.whole_files import replacing

from .images import Source

FILE = "images.tsv.gz"
PARTS = {"training": "training image", "held_out": "held-out image"}
"""The two parts of a source, and what a message calls an image of each."""
THREADS = 16
"""Threads that ask for sizes: on a network disk each answer takes long, and answers come side by side."""
CHUNK = 1000
LINE = re.compile(rf"({'|'.join(PARTS)})\t-?[0-9]{{1,20}}\t[^\n\r]*\n".encode())
"""Line of the inventory: part, size, name."""
LINE_LIMIT, LIMIT = 4 << 20, 1 << 30
"""Largest number of bytes of a line and of all lines that are read: a small file may unpack to terabytes."""


@dataclass(frozen=True)
class Inventory:
    """Names and sizes of the training images and of the held-out images: in each part, a line of text per image."""

    training: bytes
    held_out: bytes

    @classmethod
    def of(cls, source: Source) -> "Inventory":
        """Inventory of a source. Asks for the size of every image, so only rank 0 should call it."""
        return cls(_lines(source, source.train, "training"), _lines(source, source.test, "held_out"))

    @property
    def digests(self) -> dict[str, str]:
        """A digest of each part, for the checkpoint."""
        return {part: blake2b(getattr(self, part), digest_size=16).hexdigest() for part in PARTS}

    def write(self, directory: Path) -> None:
        with replacing(directory / FILE) as temporary:
            temporary.write_bytes(gzip.compress(self.training + self.held_out, compresslevel=1, mtime=0))

    def difference(self, digests: dict[str, str], directory: Path) -> str:
        """First difference from the images of the run in `directory`, whose checkpoint has `digests`; "" if none."""
        now = self.digests
        part = next((part for part in PARTS if now[part] != digests[part]), None)
        if part is None:
            return ""
        before = read(directory)
        if before is None or before.digests[part] != digests[part]:
            return f"the digest of its {PARTS[part]}s differs, and no {FILE} beside it names the first other one"
        lines = (getattr(inventory, part).splitlines() for inventory in (before, self))
        place, (was, found) = next(
            (place, pair) for place, pair in enumerate(zip_longest(*lines)) if pair[0] != pair[1]
        )
        counts = [getattr(inventory, part).count(b"\n") for inventory in (before, self)]
        return (
            f"{PARTS[part]} {place} (from 0) was {_shown(was)}, is {_shown(found)}; "
            f"{counts[0]:,} {PARTS[part]}s then, {counts[1]:,} now"
        )


def read(directory: Path) -> Inventory | None:
    """Inventory that the run in `directory` has kept; None where it is missing, damaged or larger than LIMIT."""
    parts = {part.encode(): bytearray() for part in PARTS}
    try:
        with gzip.open(directory / FILE) as file:
            while line := file.readline(LINE_LIMIT):
                match = LINE.fullmatch(line)
                if match is None or sum(map(len, parts.values())) > LIMIT:
                    return None
                parts[match[1]] += line
    except (OSError, EOFError, zlib.error):
        return None
    return Inventory(*map(bytes, parts.values()))


def file_size(path: str) -> int:
    """Size of a file in bytes; -1 where it is gone or cannot be asked for."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def pixel_digest(pixels: bytes) -> str:
    """Short digest of an image that has no file, as a part of its name."""
    return blake2b(pixels, digest_size=8).hexdigest()


def _lines(source: Source, indices: Tensor, part: str) -> bytes:
    def chunk(some: Tensor) -> str:
        entries = map(source.entry, some.tolist())
        return "".join(f"{part}\t{size}\t{_on_one_line(name)}\n" for name, size in entries)

    with ThreadPoolExecutor(THREADS) as pool:
        return "".join(pool.map(chunk, indices.split(CHUNK))).encode(errors="surrogateescape")


def _on_one_line(name: str) -> str:
    """A name with escapes for what `bytes.splitlines` takes for the end of a line.

    File systems differ in whether they compose accents; a folder that was copied between two of them has equal names.
    """
    return unicodedata.normalize("NFC", name).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _shown(line: bytes | None) -> str:
    if line is None:
        return "none"
    _, size, name = line.decode(errors="backslashreplace").split("\t", 2)
    return f"{name} of {int(size):,} bytes" if int(size) >= 0 else f"{name}, which is gone"
