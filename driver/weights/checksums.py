"""Checkpoints of the driver as files: written with a checksum of the whole file, and checked before they are read.

PyTorch writes a CRC32 for each member of its zip archives, and never looks at it again. Files of this driver have one
more checksum, over the whole file, as comment of the archive: `bam_kernels.blake2b:` and 64 hexadecimal digits. It is
that of the file as torch.save writes it, without a comment.
"""

import shutil
import struct
import zipfile
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bam_kernels.whole_files import replacing

from ..config import UserError

DIGEST = "bam_kernels.blake2b"
"""Name of the checksum of a whole file."""
DIGITS = 64
"""Hexadecimal digits of the checksum."""
_MARK = f"{DIGEST}:".encode()
_COMMENT = len(_MARK) + DIGITS
_END, _END_MARK = 22, b"PK\x05\x06"
"""Bytes of the record that ends a zip archive, without its comment, and the first of them."""
_LAST = 1 << 16
"""Last bytes of a file, in which the end record of an archive is looked for that has other bytes behind it."""
_PIECE = 1 << 22


class Checksum:
    """Checksum of the bytes that are given to it."""

    def __init__(self) -> None:
        self.hash = blake2b(digest_size=DIGITS // 2)

    def add(self, data: Any) -> None:
        self.hash.update(data)

    def add_span(self, file: BinaryIO, first: int, end: int) -> None:
        """Add the bytes from `first` to before `end` of a file, in pieces of some MB."""
        file.seek(first)
        while piece := file.read(min(_PIECE, end - first)):
            self.add(piece)
            first += len(piece)

    def digits(self) -> bytes:
        return self.hash.hexdigest().encode()


class _Hashed:
    """Binary file that hashes what is written to it, so that nothing is read again for its checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.checksum = file, Checksum()

    def write(self, data: Any) -> int:
        self.checksum.add(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint by torch.save, with its checksum. Raises: UserError; a file that was there stays whole."""
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            hashed = _Hashed(file)
            torch.save(content, hashed)
            file.seek(-2, 2)  # the length of the comment, 0 so far
            file.write(_comment(hashed.checksum))
    except (OSError, RuntimeError) as error:
        kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
        raise UserError(f"{path}: not written ({error}; {_room(path.parent)}); {kept}") from error


def _comment(checksum: Checksum) -> bytes:
    """Last bytes of a checkpoint: the length of its comment, and the comment."""
    return struct.pack("<H", _COMMENT) + _MARK + checksum.digits()


def _room(folder: Path) -> str:
    """Free space of a folder in words, since torch's error does not say whether the disk is full."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free there"
    except OSError as error:
        return f"{folder}: {error.strerror}"


def is_marked(path: Path) -> bool:
    """Whether a file ends in a comment with a checksum of this driver."""
    with path.open("rb") as file:
        return _last(file, _COMMENT).startswith(_MARK)


def _last(file: BinaryIO, count: int) -> bytes:
    file.seek(max(0, file.seek(0, 2) - count))
    return file.read()


def fault_of_zip(path: Path) -> str:
    """What is damaged in a zip archive of PyTorch; empty where its checksums hold.

    A file of this driver is read once, for its own checksum. Its members are looked at only where that is wrong.
    """
    with path.open("rb") as file:
        size, last = file.seek(0, 2), _last(file, _LAST)
        if last[-_COMMENT:].startswith(_MARK):
            checksum = Checksum()
            checksum.add_span(file, 0, max(0, size - _COMMENT - 2))
            checksum.add(b"\0\0")
            if last[-_COMMENT - 2 :] == _comment(checksum):
                return ""
            return _fault_of_members(file, size) or "damaged outside of its members, in headers, padding or directory"
        if last[-_END:].startswith(_END_MARK) and last[-2:] == b"\0\0":
            return _fault_of_members(file, size)
    if _END_MARK in last:
        return "damaged at its end, which is not as PyTorch writes it"
    return f"not whole: it ends within its content, after {size} bytes"


def _fault_of_members(file: BinaryIO, size: int) -> str:
    """First member of a zip archive that differs from its CRC32, or that torch.save would not write; empty if none."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if fault := _fault_of_directory(members, size):
                return fault
            if not any(member.CRC for member in members):  # as after torch.serialization.set_crc32_options(False)
                return ""
            for member in members:
                try:
                    with archive.open(member) as content:
                        while content.read(_PIECE):
                            pass
                except Exception as error:  # damaged headers make zipfile raise errors of many types
                    return f"damaged in its member {_inner(member.filename)} ({error})"
    except Exception as error:  # likewise
        return f"damaged in the directory of its members ({error})"
    return ""


def _fault_of_directory(members: list[zipfile.ZipInfo], size: int) -> str:
    """First thing in a zip archive's directory that torch.save would not write and that could cost much memory."""
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            return (
                f"its member {_inner(member.filename)} is compressed, {member.compress_size:,} bytes for "
                f"{member.file_size:,}; torch.save compresses nothing"
            )
    if (claimed := sum(member.file_size for member in members)) > size:
        return f"its members claim {claimed:,} bytes, but the file has {size:,}"
    twice = [name for name, count in Counter(member.filename for member in members).items() if count > 1]
    return f"it has several members {_inner(twice[0])}" if twice else ""


def _inner(name: str) -> str:
    """Name of a member without the folder that PyTorch puts all members in, such as `data/17`."""
    return name.partition("/")[2] or name
