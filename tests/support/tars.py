"""Small tar archives for tests: images of one colour, texts, links and other members, in a given order."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def picture(level: int) -> bytes:
    """PNG of 12 x 12 pixels of one grey level, by which a test knows it again."""
    file = io.BytesIO()
    Image.new("RGB", (12, 12), (level,) * 3).save(file, "PNG")
    return file.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes] | tarfile.TarInfo], format: int = tarfile.GNU_FORMAT
) -> None:
    """Write names with contents, and headers without content, as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(count: int, first: int = 0, classes: int = 2) -> list[tuple[str, bytes]]:
    """Images of the grey levels `first` and on, with labels that take turns."""
    numbers = range(first, first + count)
    return [
        member for i in numbers for member in ((f"{i:03d}.png", picture(i)), (f"{i:03d}.cls", b"%d" % (i % classes)))
    ]


def header(name: bytes = b"x.png", size: bytes = b"0", kind: bytes = b"0", link: bytes = b"") -> bytes:
    """Header of a member with fields as they are given, which tarfile would refuse to write."""
    block = bytearray(512)
    for place, field in ((0, name), (100, b"0000644\0"), (124, size), (136, b"0" * 11), (148, b" " * 8)):
        block[place : place + len(field)] = field
    for place, field in ((156, kind), (157, link), (257, b"ustar\x0000")):
        block[place : place + len(field)] = field
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    """Content of a member up to the next header."""
    return content + bytes(-len(content) % 512)


def attributes(kind: bytes = b"x", **values: bytes) -> bytes:
    """Pax header with attributes of the next member, or with kind g of all later ones; __ in a key stands for a dot."""
    records = b""
    for key, value in values.items():
        record = b" %s=%s\n" % (key.replace("__", ".").encode(), value)
        length = next(n for n in range(len(record), len(record) + 20) if len(str(n)) + len(record) == n)
        records += b"%d%s" % (length, record)
    return header(b"attributes", b"%011o" % len(records), kind) + padded(records)
