"""What `python -m bam_kernels.tune` has measured on a GPU: rates for the planner, tiles for the Triton kernels.

One JSON file per kind of GPU, found by its name; without one, stated rates and tiles that follow from shapes. Letters
of keys are those of backends/triton/tiles.py.
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

FILE = "BAM_KERNELS_TUNED"
RATES = ("product_flops", "flash_flops", "memory_bytes", "exponentials")

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Tuning:
    """rates: by the names of engine.cost.Rates; tiles: the numbers of a tile by kernel and shape."""

    rates: dict[str, float] = field(default_factory=dict)
    tiles: dict[Key, tuple[int, ...]] = field(default_factory=dict)


def path() -> Path | None:
    """The file of this process's first GPU, or the one that BAM_KERNELS_TUNED names; None where there is neither."""
    if os.environ.get(FILE):
        return Path(os.environ[FILE])
    if not torch.cuda.is_available():
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "bam_kernels" / f"{re.sub(r'[^A-Za-z0-9]+', '-', torch.cuda.get_device_name(0))}.json"


@lru_cache
def tuning() -> Tuning:
    """What the file says, read once. Raises: ValueError naming the file and what is wrong with it."""
    file = path()
    if file is None or (FILE not in os.environ and not file.exists()):
        return Tuning()
    try:
        plain = json.loads(file.read_text())
        rates = {name: float(plain["rates"][name]) for name in RATES}
        if not all(rate > 0 for rate in rates.values()):
            raise ValueError("rates must be positive")
        tiles = {_key(text): tuple(int(n) for n in numbers) for text, numbers in plain["tiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a file that `python -m bam_kernels.tune` wrote: {error!r}") from error
    return Tuning(rates, tiles)


def save(found: Tuning, file: Path) -> None:
    """Written under another name and renamed: the file in place is always whole."""
    tiles = {" ".join(map(str, key)): list(numbers) for key, numbers in found.tiles.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".writing")
    temporary.write_text(json.dumps({"rates": found.rates, "tiles": tiles}, indent=1) + "\n")
    os.replace(temporary, file)
    tuning.cache_clear()


def tile_of(*key: str | int) -> tuple[int, ...] | None:
    """The numbers of a tile that a tuning run tries now or has found; None: those that follow from the shape."""
    return tuning().tiles.get(key) if _candidate_tiles is None else _candidate_tiles.get(key)


_candidate_tiles: dict[Key, tuple[int, ...]] | None = None


@contextmanager
def use_tiles(tiles: dict[Key, tuple[int, ...]]) -> Iterator[None]:
    """In the block launches take these tiles, and others those that follow from their shapes; the file is not read."""
    global _candidate_tiles
    before, _candidate_tiles = _candidate_tiles, tiles
    try:
        yield
    finally:
        _candidate_tiles = before


def _key(text: str) -> Key:
    name, *shape = text.split()
    return (name, *map(int, shape))
