"""Free memory, and huge pages.

Free memory is read anew each time: of a GPU from its driver, of the host from /proc/meminfo and its cgroups.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backends.addresses import first_address
from ..backends.extension import _C

UNLIMITED = 1 << 62  # cgroup v1 writes "no limit" as the largest whole number of pages in an int64


@dataclass(frozen=True)
class Controller:
    """File names of a cgroup's memory controller; reclaimable: entry of memory.stat with memory freed on demand."""

    limit: str
    used: str
    reclaimable: str


V1 = Controller("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Controller("memory.max", "memory.current", "inactive_file")

# malloc gets more than this from the system anew at each call, page after page as it is first written. Pages of 2 MB
# take a fifth of the time.
LEAST_HUGE_BYTES = 32 << 20

_last_read: dict[torch.device, int] = {}


def use_huge_pages(x: Tensor) -> Tensor:
    """Ask for huge pages for a large CPU tensor that has just been allocated; returns x."""
    if x.is_cpu and x.nbytes >= LEAST_HUGE_BYTES and _C is not None:
        _C.use_huge_pages(first_address(x), x.nbytes)
    return x


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that can be allocated on the device without swapping.

    While the current CUDA stream is captured the driver must not be asked: returns the result of the last call for this
    device, or None if there was none.
    """
    if device.type != "cuda":
        return host_free_bytes()
    if not torch.cuda.is_current_stream_capturing():
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by torch
        _last_read[device] = torch.cuda.mem_get_info(device)[0] + reserved
    return _last_read.get(device)


def host_free_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes available on the host: the least of MemAvailable and of the bytes left under each cgroup limit."""
    return min([_available_bytes(proc / "meminfo"), *_left_by_cgroups(proc / "self" / "cgroup", cgroups)])


def _available_bytes(meminfo: Path) -> int:
    available = _entry(meminfo, "MemAvailable:")
    if available is not None:
        return available << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_by_cgroups(memberships: Path, cgroups: Path) -> Iterator[int]:
    for line in _text(memberships).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            yield from _left_by_ancestors(V1, cgroups / "memory", path)
        elif number == "0" and not controllers:
            yield from _left_by_ancestors(V2, cgroups, path)


def _left_by_ancestors(files: Controller, mount: Path, path: str) -> Iterator[int]:
    """Bytes left under the limit of the cgroup at `path`, and under the limit of each ancestor that is mounted.

    In a container, `path` is often a path of the host, or leads above the mount; the container's own cgroup is then the
    root of the mount.
    """
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    for depth in range(len(parts), -1, -1):
        left = _left(files, mount.joinpath(*parts[:depth]))
        if left is not None:
            yield left


def _left(files: Controller, cgroup: Path) -> int | None:
    """Bytes left under the limit of this cgroup; None if it has no limit, or its files cannot be read."""
    limit = _number(_text(cgroup / files.limit))
    if limit is None or limit >= UNLIMITED:
        return None
    used = _number(_text(cgroup / files.used))
    if used is None:
        return None
    return max(0, limit - max(0, used - (_entry(cgroup / "memory.stat", files.reclaimable) or 0)))


def _entry(file: Path, name: str) -> int | None:
    """The number that follows `name` on the line of `file` that begins with it; None if there is no such line."""
    for line in _text(file).splitlines():
        fields = line.split()
        if len(fields) > 1 and fields[0] == name:
            return _number(fields[1])
    return None


def _number(text: str) -> int | None:
    """The non-negative whole number that `text` holds; None for "max" and any other text."""
    try:
        number = int(text)
    except ValueError:
        return None
    return number if number >= 0 else None


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
