"""Which .tar files under a folder are shards, and the part that each belongs to by its name or its folder's."""

import os
import re
from pathlib import Path

from ..config import UserError
from .archive import LeftOut
from .listing import Listing, counted
from .parts import TEST_NAMES, part_of

COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zstd?|lz4|lzma|z)|tgz|tbz2?|txz)$", re.IGNORECASE)
"""End of the name of a compressed archive."""
WORD = re.compile(r"[A-Z]*[a-z]+|[A-Z]+")
"""Word in a name such as `pets-train_000` or `petsTrain000`."""
OF_A_PART = re.compile(r"(set|data)$", re.IGNORECASE)
"""End of a word such as `valset` and `traindata`, which names a part as `val` and `train` do."""


def find_shards(root: Path) -> list[Path]:
    """The shard `root`, or all shards in the folder `root` and below it, in the order of their paths.

    Raises: UserError where there is none, one is compressed, or a file is met twice.
    """
    if not root.exists():
        raise UserError(
            f"--data.root {root}: no such folder or .tar file; brace patterns and addresses of a network are not read"
        )
    if not root.is_dir():
        _check_compression(root, set())
        _status(root)
        return [root]
    listing = Listing(root, lambda name: name.lower().endswith(".tar") or COMPRESSED.search(name) is not None)
    files = {Path(path) for path in [*listing.paths(listing.files), *listing.unusable]}
    for path in sorted(files):
        _check_compression(path, files)
    shards = sorted(path for path in files if path.suffix.lower() == ".tar")
    if not shards:
        there = counted(listing.left_out) or "nothing"
        raise UserError(
            f"--data.root {root}: no .tar shards in it or below it, but {there}; --data.source folder reads image files"
        )
    first: dict[tuple[int, int], Path] = {}
    for shard in shards:
        status = _status(shard)
        other = first.setdefault((status.st_dev, status.st_ino), shard)
        if other is not shard:
            raise UserError(f"--data.root {root}: {shard} and {other} are one file; remove one of the two links")
    return shards


def parts_of_shards(root: Path, shards: list[Path], left_out: LeftOut) -> tuple[list[Path], list[Path], str]:
    """Shards of training images, shards of held-out images, and the name of the held-out part.

    Unless there are shards of both kinds, the first part has all shards and the name is empty.
    """
    named: dict[str | None, list[Path]] = {}
    for shard in shards:
        named.setdefault(_part(shard.relative_to(root)), []).append(shard)
    test = next((name for name in TEST_NAMES if name in named), None)
    if "train" not in named or test is None:
        return shards, [], ""
    for part, others in named.items():
        if part not in ("train", test):
            left_out.kinds[f"{part or 'other'} .tar"] += len(others)
    return named["train"], named[test], test


def _part(path: Path) -> str | None:
    """Part that a shard belongs to: by the first word in its name that names a part, or else in its folders' names."""
    names = [path.stem, *reversed(path.parent.parts)]
    words = (OF_A_PART.sub("", word) for name in names for word in WORD.findall(name))
    return next((part for word in words if (part := part_of(word))), None)


def _check_compression(path: Path, files: set[Path]) -> None:
    """Raise a UserError for a compressed shard, unless the decompressed one is among `files` too."""
    match = COMPRESSED.search(path.name)
    if match and path.with_name(path.name[: match.start()] + ".tar") not in files:
        raise UserError(
            f"--data.root {path}: shards must be uncompressed .tar files, this one ends in {match[0]}; decompress it"
        )


def _status(shard: Path) -> os.stat_result:
    try:
        status = os.stat(shard)
    except OSError as error:
        raise UserError(f"{shard}: not a readable shard ({error.strerror})") from error
    if not shard.is_file():
        raise UserError(f"{shard}: not a readable shard, since it is no file")
    return status
