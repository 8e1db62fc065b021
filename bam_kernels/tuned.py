"""Results of `python -m bam_kernels.tune` on a GPU: rates for the planner, tiles for the Triton kernels.

There is one JSON file per kind of GPU, found by the GPU's name. Without a file, rates are those of one H200 and tiles
follow from shapes. backends/triton/tiles.py defines the kernels and shapes that are keys of tiles.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .user_files import cache_folder, read, write

FILE = "BAM_KERNELS_TUNED"
RATES = ("product_flops", "flash_flops", "memory_bytes", "exponentials")
CUDA_RATES = ("cuda_exponentials",)  # measured where the CUDA kernels can run
SLOWEST, FASTEST = 1.0, 1e24  # a rate per second outside of these is no measurement
MOST_BYTES = 1 << 20  # of a file; a tile takes about 60
NUMBERS = {"row": (2, 5), "column": (2, 5), "image": (2, 5), "flash": (5, 6)}  # of a key, and of its tile
LARGEST_BLOCK = 1 << 20  # elements of a block, Triton's limit
MOST_CHUNKS = {"row": 1 << 16, "column": 64}  # of a launch's grid, and of the kernel that merges columns

Key = tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Tuning:
    """Rates per second, by the field names of engine.cost.Rates, and the numbers of tiles, by kernel and shape."""

    rates: dict[str, float] = field(default_factory=dict)
    tiles: dict[Key, tuple[int, ...]] = field(default_factory=dict)


def path() -> Path | None:
    """Path of the tuning file: BAM_KERNELS_TUNED, else one named after the first GPU, in the user's cache folder.

    None without a GPU, or for a user without a home.
    """
    if os.environ.get(FILE):
        return Path(os.environ[FILE])
    if not torch.cuda.is_available():
        return None
    try:
        return cache_folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', torch.cuda.get_device_name(0))}.json"
    except OSError:
        return None


@lru_cache
def tuning() -> Tuning:
    """Contents of the tuning file, read once per process. Raises: ValueError naming the file and its fault."""
    file = path()
    if file is None or (not os.environ.get(FILE) and not file.exists()):
        return Tuning()
    try:
        plain = json.loads(read(file, MOST_BYTES), object_pairs_hook=_without_doubles)
        _check_names(plain, "the file", ("rates", "tiles"))
        _check_names(plain["rates"], "rates", RATES, CUDA_RATES)
        _check_names(plain["tiles"], "tiles", (), plain["tiles"])
        rates = {name: _rate(name, rate) for name, rate in plain["rates"].items()}
        return Tuning(rates, dict(_tile(text, numbers) for text, numbers in plain["tiles"].items()))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a file that `python -m bam_kernels.tune` wrote: {error}") from error


def save(contents: Tuning, file: Path) -> None:
    """Write the tuning file, which readers never see half-written. Raises: OSError."""
    tiles = {" ".join(map(str, key)): list(numbers) for key, numbers in contents.tiles.items()}
    write(file, json.dumps({"rates": contents.rates, "tiles": tiles}, indent=1) + "\n")
    tuning.cache_clear()


def tile_of(*key: str | int) -> tuple[int, ...] | None:
    """Numbers of a tuned tile, or of a candidate inside `use_tiles`; None: compute the tile from the shape."""
    return tuning().tiles.get(key) if _candidate_tiles is None else _candidate_tiles.get(key)


_candidate_tiles: dict[Key, tuple[int, ...]] | None = None


@contextmanager
def use_tiles(tiles: dict[Key, tuple[int, ...]]) -> Iterator[None]:
    """Launch with these tiles in the block; other tiles follow from shapes, and the tuning file is not read."""
    global _candidate_tiles
    before, _candidate_tiles = _candidate_tiles, tiles
    try:
        yield
    finally:
        _candidate_tiles = before


def uses_candidates() -> bool:
    """Whether launches take their tiles from `use_tiles`."""
    return _candidate_tiles is not None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((double, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{double[:60]!r} stands twice")
    return found


def _check_names(of: Any, what: str, needed: Iterable[str], more: Iterable[str] = ()) -> None:
    """Raise a ValueError where `of` is no dictionary, lacks a name or has another one."""
    if not isinstance(of, dict):
        raise ValueError(f"{what} must be an object, got {str(of)[:60]}")
    for name in needed:
        if name not in of:
            raise ValueError(f"{what} has no {name}")
    known = {*needed, *more}
    for name in of:
        if name not in known:
            raise ValueError(f"{what} has {name[:60]!r}, which is unknown")


def _rate(name: str, rate: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not SLOWEST <= rate <= FASTEST:
        raise ValueError(f"{name} must be a number from {SLOWEST:g} to {FASTEST:g}, got {str(rate)[:60]}")
    return float(rate)


def _tile(text: str, numbers: Any) -> tuple[Key, tuple[int, ...]]:
    """Key and numbers of a tile. Raises: ValueError where its kernel could not run with it, or would leave out rows."""
    name, *words = text.split(" ")
    if name not in NUMBERS or len(words) != NUMBERS[name][0] or not all(map(_is_size, words)):
        raise ValueError(f"{text[:60]!r} names no kernel with the sizes of a launch")
    shape = tuple(map(int, words))
    whole = isinstance(numbers, list) and len(numbers) == NUMBERS[name][1] and all(type(n) is int for n in numbers)
    if not whole or (fault := _fault(name, shape, *numbers)):
        must = fault if whole else f"{NUMBERS[name][1]} integers"
        raise ValueError(f"the tile of {text} must have {must}, got {str(numbers)[:60]}")
    return (name, *shape), tuple(numbers)


def _is_size(word: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,9}", word) is not None


def _fault(name: str, shape: tuple[int, ...], block_m: int, block_n: int, *more: int) -> str:
    """What a tile of backends/triton/tiles.py must have and lacks; empty if it has all."""
    flash = name == "flash"
    blocks = (block_m, block_n, *more[:2]) if flash else (block_m, block_n)
    warps, stages = (more[2], more[3]) if flash else (more[2], 1)
    if not all(16 * flash <= n <= LARGEST_BLOCK and _is_power_of_two(n) for n in blocks):
        return f"blocks that are powers of two{', of at least 16' if flash else ''}"
    if math.prod(blocks[:2]) > LARGEST_BLOCK:
        return f"at most {LARGEST_BLOCK} elements"
    if not (_is_power_of_two(warps) and warps <= 32 and 1 <= stages <= 8):
        return "1, 2, 4, 8, 16 or 32 warps and 1 to 8 stages"
    if flash:
        return ""
    rows, chunks = more[:2]
    if name == "image":
        return "" if block_m >= shape[0] and block_n >= shape[1] and rows == chunks == 1 else "room for the whole image"
    if name == "row" and block_n < shape[1]:
        return f"at least {shape[1]} columns"
    if rows < 1 or rows % block_m or not (chunks - 1) * rows < shape[0] <= chunks * rows or chunks > MOST_CHUNKS[name]:
        return f"1 to {MOST_CHUNKS[name]} chunks of whole blocks that cover {shape[0]} rows"
    return ""


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
