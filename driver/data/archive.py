"""Files in one shard, an uncompressed .tar archive: the place of their bytes, with links followed.

tarfile reads the headers. It ends silently at a broken header or at the first end mark; here that is an error, or the
archive that follows is read too. Its reads are bounded, so that a broken size allocates nothing.
"""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import NamedTuple

from ..config import UserError
from ..messages.text import printable
from .listing import counted, is_hidden

BLOCK = 512
"""Bytes of a header; every header begins at a multiple of it."""
LONG_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
"""Types of headers that are followed by the name or the attributes of a member."""
HEADER_LIMIT = 1 << 20
"""Largest number of bytes of a name or of attributes."""
NAME_LIMIT = 300
"""Characters of a member's name that a message shows."""
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
"""First bytes of compressed files, and what compressed them."""


class LeftOut:
    """Files that are not used: their number by kind, and the names of files that their owner should look at."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.named: dict[str, list[str]] = {}

    def name(self, fault: str, name: str) -> None:
        """Keep the name of a file that is not used because of this fault."""
        self.named.setdefault(fault, []).append(name)

    def __str__(self) -> str:
        """Such as `left out: 3 .txt, 2 hidden; 1 left out as sparse (first: s.tar:a.jpg)`; empty where all is used."""
        kinds = [f"left out: {counted(self.kinds)}"] if self.kinds else []
        faults = [f"{len(names):,} {fault} (first: {names[0]})" for fault, names in self.named.items()]
        return "; ".join(kinds + faults)


class Member(NamedTuple):
    """A file in an archive, and the place and number of its bytes."""

    name: str
    """Name as the archive spells it, such as `./a.JPG`."""
    path: str
    """The name without `./` and doubled slashes."""
    kind: str
    """Ending of the name in lower case, with its dot."""
    offset: int
    size: int

    @classmethod
    def at(cls, name: str, offset: int, size: int) -> "Member":
        """Member of this name at a place in the archive."""
        path = normpath(name)
        stem, dot, ending = path.rpartition("/")[2].rpartition(".")
        return cls(name, path, dot + ending.lower() if stem else "", offset, size)


def key_of(path: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the file's own name."""
    folder, _, file = path.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def place_of(shard: Path, name: str) -> str:
    """Shard and name of a member, for messages: on one line, with odd characters escaped, a long name cut."""
    return f"{printable(str(shard), None)}:{printable(name, NAME_LIMIT)}"


def in_hidden(path: str) -> bool:
    """Whether a member or a folder that it is in is hidden, as in `__MACOSX/._a.jpg`, or left by tar's attributes."""
    return any(is_hidden(part) or part.startswith("PaxHeaders") for part in path.split("/"))


def list_members(shard: Path, left_out: LeftOut) -> list[Member]:
    """Files of a shard; a link has the bytes of the file that it leads to. Hidden files are counted and left out.

    Raises: UserError where the shard is not a readable, uncompressed archive.
    """
    found: list[Member] = []
    files: dict[str, Member] = {}
    links: list[tarfile.TarInfo] = []
    for info in _headers(shard, left_out):
        if info.isreg() and not info.issparse():
            found.append(member := Member.at(info.name, info.offset_data, info.size))
            files[member.path] = member
        elif info.isreg():
            left_out.name("left out as sparse", place_of(shard, info.name))
        elif info.islnk() and (target := files.get(normpath(info.linkname))):
            # The last file of that name so far, should the name come twice.
            member = Member.at(info.name, target.offset, target.size)
            if member.path != target.path:  # tar writes a file that it was given twice as a link to itself
                found.append(member)
                files[member.path] = member
        elif info.islnk() or info.issym():
            links.append(info)
        elif not info.isdir():
            left_out.name("left out as neither file nor folder", place_of(shard, info.name))
    by_path = {normpath(link.name): link for link in links}
    ends: dict[str, Member | None] = {}
    for info in links:
        if in_hidden(normpath(info.name)):
            left_out.kinds["hidden"] += 1
        elif target := _follow(info, by_path, files, ends):
            found.append(Member.at(info.name, target.offset, target.size))
        else:
            left_out.name(
                "left out as a link to no file of its shard", place_of(shard, f"{info.name} -> {info.linkname}")
            )
    shown = [member for member in found if not in_hidden(member.path)]
    if len(shown) < len(found):
        left_out.kinds["hidden"] += len(found) - len(shown)
    return shown


def _follow(
    link: tarfile.TarInfo, links: dict[str, tarfile.TarInfo], files: dict[str, Member], ends: dict[str, Member | None]
) -> Member | None:
    """File at the end of a chain of links; None where it ends at nothing or goes round.

    `ends` keeps where each path ends, so that a chain is followed once, however many of its links are asked for.
    """
    met = []
    while (path := _target(link)) not in ends:
        met.append(path)
        ends[path] = files.get(path)  # None while it is followed: a circle leads to nothing
        if path in files or path not in links:
            break
        link = links[path]
    ends.update(dict.fromkeys(met, ends[path]))
    return ends[path]


def _target(link: tarfile.TarInfo) -> str:
    """Path in the archive that a link leads to. Hard links name it whole, symbolic links from their own folder on."""
    return normpath(join(dirname(link.name), link.linkname) if link.issym() else link.linkname)


class _Header(tarfile.TarInfo):
    """Header of a member, in which an absurd length of a name or of attributes is an error: tarfile would read it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in LONG_HEADERS and not 0 <= header.size <= HEADER_LIMIT:
            raise tarfile.ReadError(f"a name or attributes of {header.size:,} bytes")
        return header


def _headers(shard: Path, left_out: LeftOut) -> Iterator[tarfile.TarInfo]:
    """Headers of all archives in the file: `cat a.tar b.tar` and tar's --append make several of them.

    Raises: UserError where a header or the end of the file is broken.
    """
    try:
        with open(shard, "rb") as file:
            start: int | None = 0
            end = file.seek(0, io.SEEK_END)
            while start is not None:
                file.seek(start)
                archive, last = tarfile.TarFile(fileobj=file, tarinfo=_Header), -1
                for info in archive:
                    if info.isreg() and not (info.issparse() or 0 <= info.size <= end - info.offset_data):
                        where = f"{printable(info.name, NAME_LIMIT)} has {info.size:,} bytes from byte"
                        raise tarfile.ReadError(f"{where} {info.offset_data:,} on, the shard ends at {end:,}")
                    if info.offset_data <= last:
                        raise tarfile.ReadError(f"a negative size at byte {last:,}")
                    last = info.offset_data
                    yield info
                start = _next_archive(file, archive.offset, shard, left_out)
    except Exception as error:  # tarfile raises errors of many kinds on broken headers
        raise UserError(f"{shard}: {_fault(shard, error)}") from error


def _next_archive(file: io.BufferedReader, end: int, shard: Path, left_out: LeftOut) -> int | None:
    """Where the next archive begins after the end mark at byte `end`, which is zeros; None at the end of the file."""
    file.seek(end)
    block = file.read(BLOCK)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"a broken header at byte {end:,}")
    if not block:
        left_out.name("without an end mark, as a shard that was cut", str(shard))
    while block:
        if rest := block.lstrip(b"\0"):
            return (file.tell() - len(rest)) // BLOCK * BLOCK
        block = file.read(HEADER_LIMIT)
    return None


def _fault(shard: Path, error: Exception) -> str:
    """Why a shard cannot be read, and what to do."""
    try:
        with open(shard, "rb") as file:
            first = file.read(8)
    except OSError:
        first = b""
    for magic, program in MAGIC.items():
        if first.startswith(magic):
            return f"compressed by {program}; shards must be uncompressed .tar files: decompress it"
    what = printable(str(error), NAME_LIMIT) or type(error).__name__
    if isinstance(error, RecursionError):  # tarfile calls itself for each
        what = "hundreds of headers of one member"
    return f"not a readable shard, an uncompressed .tar ({what}); copy or pack it again"
