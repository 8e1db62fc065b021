"""Results of `python -m bam_kernels.tune` on a GPU: rates for the planner, tiles for the Triton kernels.

There is one JSON file per kind of GPU, found by the GPU's name. Without a file, rates are stated constants and tiles
follow from shapes. backends/triton/tiles.py defines the kernels and shapes that are keys of tiles.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from .user_files import cache_folder, write

FILE = "BAM_KERNELS_TUNED"
RATES = ("product_flops", "flash_flops", "memory_bytes", "exponentials")
CUDA_RATES = ("cuda_exponentials",)  # measured where the CUDA kernels can run

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
        plain = json.loads(file.read_text())
        known = [*RATES, *(name for name in CUDA_RATES if name in plain["rates"])]
        rates = {name: float(plain["rates"][name]) for name in known}
        if not all(rate > 0 for rate in rates.values()):
            raise ValueError("rates must be positive")
        tiles = {_key(text): tuple(int(n) for n in numbers) for text, numbers in plain["tiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a file that `python -m bam_kernels.tune` wrote: {error!r}") from error
    return Tuning(rates, tiles)


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


def _key(text: str) -> Key:
    name, *shape = text.split()
    return (name, *map(int, shape))
