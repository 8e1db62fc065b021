"""How much of the score matrix is held at once. Letters are those of layout.py."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

DEFAULT_SHARE = 0.25  # of the memory that is free
PRODUCT_ROWS = 1024  # rows from which a library product no longer gains by having more


@dataclass(frozen=True)
class SlabPlan:
    """Whether target scores are kept, rows per sweep slab, images per match slab, and the rows that slabs need.

    source_cached: the student's scores are kept whole beside a teacher's.
    """

    cached: bool
    sweep_rows: int
    match_images: int
    slab_rows: int
    score_bytes: int
    source_cached: bool = False


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@lru_cache
def plan_slabs(
    name: str,
    *,
    rows: int,
    images: int,
    columns: int,
    target_views: int,
    source_views: int,
    shared: bool,
    fixed: bool,
    ranks: int,
    regather: bool,
    budget: int | None,
    device: torch.device,
) -> SlabPlan:
    """Choose slabs within `budget` bytes of scores (None: a quarter of the memory that is free).

    rows x columns are the target scores; an image's match takes `target_views` rows of them and `source_views` rows of
    source scores, the same rows where `shared`. fixed: scores are int16, made from a float32 slab. With several ranks
    source scores are kept too where they fit: they are made while the ranks add up columns. regather: all must be kept.
    Raises: ValueError if the budget does not hold one image, or with regather all scores. Made once per shape.
    """
    if budget is None:
        budget = int(free_bytes(device) * DEFAULT_SHARE)
    kept_bytes = rows * columns * (2 if fixed else 4)
    slab_row_bytes = columns * (6 if fixed else 4)
    if shared and not fixed and kept_bytes <= budget:
        return SlabPlan(True, rows, images, 0, kept_bytes)
    source_bytes = 0 if shared else source_views * images * columns * 4
    if ranks > 1 and not shared and not fixed and kept_bytes + source_bytes <= budget:
        return SlabPlan(True, rows, images, 0, kept_bytes + source_bytes, source_cached=True)
    if regather and ranks > 1:
        raise ValueError(
            f"{name}: regather=True keeps all scores, {kept_bytes + source_bytes} bytes, "
            f"more than memory_budget={budget}"
        )
    image_bytes = source_views * slab_row_bytes
    left = budget - kept_bytes
    if not (shared and not fixed) and left >= image_bytes:
        sweep_rows = min(rows, PRODUCT_ROWS, left // slab_row_bytes) if fixed else rows
        match_images = min(images, -(-PRODUCT_ROWS // source_views), left // image_bytes)
        slab_rows = max(match_images * source_views, sweep_rows if fixed else 0)
        return SlabPlan(True, sweep_rows, match_images, slab_rows, kept_bytes + slab_rows * slab_row_bytes)

    image_rows = source_views if shared else source_views + target_views
    image_bytes = image_rows * slab_row_bytes
    if budget < image_bytes:
        raise ValueError(
            f"{name}: memory_budget={budget} bytes does not hold the scores of one image: {image_rows} rows of "
            f"{columns}, {image_bytes} bytes"
        )
    sweep_rows = min(rows, budget // slab_row_bytes)
    match_images = min(images, budget // image_bytes)
    slab_rows = max(sweep_rows, match_images * image_rows)
    return SlabPlan(False, sweep_rows, match_images, slab_rows, slab_rows * slab_row_bytes)
