"""Slab plan: how much of the score matrix the slab engine holds at once. layout.py defines the dimension letters."""

import sys
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import memory

DEFAULT_SHARE = 0.25  # share of the free memory that scores may take by default
# Scores may always take this much, and free memory is not read. Libraries take more memory for themselves, and on a CPU
# a step over as many scores takes hundreds of times as long as reading the free memory.
ALWAYS_BYTES = 64 << 20
BUDGET_BITS = 4  # leading bits kept of a budget from free memory, so that small changes do not change the plan
FLASH_FEATURES = 512  # most features of the flash engine: with more, computing scores costs more than reading them
PRODUCT_ROWS = 1024  # a matrix product gains no speed from more rows than this
PRODUCT_TILE = 128  # rows of a matrix product that one block of a GPU computes
LEAST_PRODUCT_ROWS = 512  # a matrix product loses speed with fewer rows than this


@dataclass(frozen=True)
class SlabPlan:
    """How many scores the slab engine holds, in `score_bytes` bytes.

    cached          the target scores are kept whole
    source_cached   the source scores of a student with a teacher are kept whole too
    sweep_rows      rows whose scores are computed at once in a sweep
    match_images    images that are matched at once
    slab_rows       rows of the buffer for scores that are not kept
    product_rows    rows of the float32 buffer that int16 scores are computed from
    """

    cached: bool
    source_cached: bool
    sweep_rows: int
    match_images: int
    slab_rows: int
    product_rows: int
    score_bytes: int


def product_rows(columns: int, device: torch.device) -> int:
    """Number of float32 rows of products that int16 scores are computed from at once.

    On a GPU they should stay in the L2 cache: they may fill two thirds of it, the rest is for int16 scores and keys. If
    that holds too few rows for a fast product, the rows go through memory. Fewer rows, which leave more of the cache,
    were slower on an H200: each slab takes three launches more.
    """
    if device.type != "cuda":
        return PRODUCT_ROWS
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    rows_in_l2 = l2_bytes * 2 // 3 // (4 * columns) // PRODUCT_TILE * PRODUCT_TILE
    return min(rows_in_l2, PRODUCT_ROWS) if rows_in_l2 >= LEAST_PRODUCT_ROWS else PRODUCT_ROWS


def plan_slabs(name: str, *, budget: int | None, device: torch.device, **shape: int) -> SlabPlan:
    """Choose slabs within `budget` bytes of scores; None: a quarter of the memory that is free at this call.

    shape: the arguments of `_plan_within`. If all scores need at most ALWAYS_BYTES, they are kept without reading the
    free memory.
    Raises: ValueError if the budget does not hold the scores of one image or, with regather, all scores.
    """
    if budget is not None:
        return _plan_within(name, budget=budget, device=device, **shape)
    whole = _plan_within(name, budget=sys.maxsize, device=device, **shape)
    if whole.score_bytes <= ALWAYS_BYTES:
        return whole
    free = memory.free_bytes(device)
    budget = sys.maxsize if free is None else _default_budget(free)
    return whole if budget >= whole.score_bytes else _plan_within(name, budget=budget, device=device, **shape)


def _default_budget(free: int) -> int:
    share = int(free * DEFAULT_SHARE)
    dropped = max(0, share.bit_length() - BUDGET_BITS)
    return max(ALWAYS_BYTES, share >> dropped << dropped)


def _even(rows: int, most: int) -> int:
    """Rows per slab when the fewest slabs of at most `most` rows share `rows` evenly, in whole tiles of a product.

    A short last slab would take a product nearly as long as a full one.
    """
    slabs = -(-rows // most)
    return min(most, -(-rows // slabs // PRODUCT_TILE) * PRODUCT_TILE)


@lru_cache
def _plan_within(
    name: str,
    *,
    rows: int,
    images: int,
    columns: int,
    target_views: int,
    source_views: int,
    shared: bool,
    sixteen_bit: bool,
    ranks: int,
    regather: bool,
    budget: int,
    device: torch.device,
) -> SlabPlan:
    """Choose slabs within `budget` bytes; cached by arguments.

    rows, columns   shape of the target scores; `images` images on this rank
    target_views    rows of target scores in the match of one image
    source_views    rows of source scores in the match of one image
    shared          source and target scores are one tensor
    sixteen_bit     scores are int16, computed from a float32 slab, and overwritten by their gradient
    ranks           with several ranks, source scores are kept too if they fit: they are computed during the all-reduce
                    of column sums
    regather        all scores must be kept
    """
    row_bytes, made_bytes = (2 * columns, 4 * columns) if sixteen_bit else (4 * columns, 0)
    kept = rows * row_bytes
    source = 0 if shared else source_views * images * row_bytes
    at_once = max(product_rows(columns, device), source_views)
    if shared or ranks > 1:
        left = budget - kept - source
        made_rows = min(rows, at_once, left // made_bytes) if sixteen_bit else 0
        if left >= 0 and made_rows >= (min(rows, source_views) if sixteen_bit else 0):
            made_rows = _even(rows, made_rows) if sixteen_bit else 0
            sweep_rows = made_rows if sixteen_bit else rows
            score_bytes = kept + source + made_rows * made_bytes
            return SlabPlan(True, not shared, sweep_rows, images, 0, made_rows, score_bytes)
    if regather and ranks > 1:
        raise ValueError(
            f"{name}: regather=True keeps all scores, {kept + source} bytes, more than memory_budget={budget}"
        )
    slab_row_bytes = row_bytes + made_bytes
    left = budget - kept
    if not shared and left >= source_views * slab_row_bytes:
        match_images = min(images, -(-at_once // source_views), left // (source_views * slab_row_bytes))
        slab_rows = match_images * source_views
        made_rows, sweep_rows = (slab_rows, min(rows, slab_rows)) if sixteen_bit else (0, rows)
        score_bytes = kept + slab_rows * slab_row_bytes
        return SlabPlan(True, False, sweep_rows, match_images, slab_rows, made_rows, score_bytes)

    image_rows = source_views if shared else source_views + target_views
    image_bytes = image_rows * row_bytes + source_views * made_bytes
    if budget < image_bytes:
        raise ValueError(
            f"{name}: memory_budget={budget} bytes does not hold the scores of one image: {image_rows} rows of "
            f"{columns}, {image_bytes} bytes"
        )
    match_images = min(images, budget // image_bytes)
    made_rows = match_images * source_views if sixteen_bit else 0
    sweep_rows = min(rows, made_rows if sixteen_bit else budget // row_bytes)
    slab_rows = max(sweep_rows, match_images * image_rows)
    score_bytes = slab_rows * row_bytes + made_rows * made_bytes
    return SlabPlan(False, False, sweep_rows, match_images, slab_rows, made_rows, score_bytes)
