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
