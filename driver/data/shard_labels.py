"""Labels of shards: which .cls file belongs to an image, what it says, and the classes of all labels."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..config import UserError
from .archive import LeftOut, Member, place_of

Label = int | str | None
"""Number or name of a class; None where an image has no label."""
SUFFIX = ".cls"
LIMIT = 1000
"""Largest number of bytes of a label."""
SHOWN = 40
"""Bytes of a wrong label that a message shows."""


def labels_of(shard: Path, images: Sequence[Member], members: Sequence[Member], left_out: LeftOut) -> list[Label]:
    """Label of each image in a shard. If k images have one name and there are k labels, the k-th has the k-th.

    Raises: UserError where a label is neither a number nor a name, or it is not clear which image it belongs to.
    """
    files: dict[str, list[Member]] = {}
    for member in members:
        if member.kind == SUFFIX:
            files.setdefault(member.path[: -len(SUFFIX)], []).append(member)
    copies: dict[str, list[int]] = {}
    for index, image in enumerate(images):
        copies.setdefault(image.path, []).append(index)
    labels: list[Label] = [None] * len(images)
    lengths = sorted({len(key) for key in files}, reverse=True)
    used = set()
    with open(shard, "rb", buffering=0) as file:
        for path, indices in copies.items():
            key = _key(path, files, lengths)
            if key is not None:
                used.add(key)
                found = [_read(file.fileno(), shard, member) for member in files[key]]
                for place, index in enumerate(indices):
                    labels[index] = found[place if len(found) == len(indices) else 0]
                if len(found) != len(indices) and len(set(found)) > 1:
                    raise UserError(
                        f"{place_of(shard, files[key][0].name)}: {len(found)} labels that differ, but {len(indices)} "
                        "images of that name; give each image a name of its own"
                    )
    if unused := len(files.keys() - used):
        left_out.kinds[f"{SUFFIX} without an image"] += unused
    return labels


def _key(path: str, files: dict[str, list[Member]], lengths: Sequence[int]) -> str | None:
    """Path, without its ending, of the labels of an image: the longest that equals the image's up to one of its dots.

    So `b.v2.jpg` has the label `b.v2.cls`, or else `b.cls`, which it may share with `b.v1.jpg`. Only parts as long as a
    key are compared, the longest first: a hostile name has a million dots.
    """
    folder_end = path.rfind("/") + 1
    for length in lengths:
        ends = length == len(path) or (length > folder_end and path[length : length + 1] == ".")
        if ends and path[:length] in files:
            return path[:length]
    return None


def _read(file: int, shard: Path, member: Member) -> Label:
    """Number or name of a class, from an open file; a negative number stands for no label."""
    content = os.pread(file, min(member.size, LIMIT + 1), member.offset)
    wrong = f"{place_of(shard, member.name)}: a label must be an integer or the name of a class on one line"
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable() or len(content) > LIMIT:
        raise UserError(f"{wrong}, got {content[:SHOWN]!r}{'...' if len(content) > SHOWN else ''}")
    if text.isdecimal():
        return int(text)
    try:
        number = float(text) if text[0] in "+-.0123456789" else None
    except ValueError:
        number = None  # a name such as 3d-printer
    if number is None:
        return text
    if not number.is_integer():
        raise UserError(f"{wrong}, got {text}")
    return None if number < 0 else int(number)
