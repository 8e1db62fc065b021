"""How much of the score matrix is held at once. Letters are those of layout.py."""

import sys
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import memory

DEFAULT_SHARE = 0.25  # of the memory that is free
# Scores that may always be taken: libraries take more memory for themselves, and on a CPU a step over as many takes
# hundreds of times as long as reading what is free.
ALWAYS_BYTES = 64 << 20
BUDGET_BITS = 4  # a budget that was read keeps its leading bits: a plan outlasts small changes of what is free
FLASH_FEATURES = 512  # the flash engine takes: beyond, making scores again costs more than reading them
PRODUCT_ROWS = 1024  # rows from which a library product no longer gains by having more
LEAST_PRODUCT_ROWS = 512  # rows below which it loses


@dataclass(frozen=True)
class SlabPlan:
    """What is held of the scores, in bytes `score_bytes`.

    cached, source_cached: the target's scores are kept whole, the student's beside a teacher's too. sweep_rows: rows
    whose scores are made at once. match_images: images that are matched at once. slab_rows: rows of the buffer for
    scores that are not kept. product_rows: float32 rows that int16 scores are made from.
    """

    cached: bool
    source_cached: bool
    sweep_rows: int
    match_images: int
    slab_rows: int
    product_rows: int
    score_bytes: int


def product_rows(columns: int, device: torch.device) -> int:
    """Float32 rows that int16 scores are made from at once: few enough to be read where the product left them, in L2.

    A third of it holds them; the rest is for the int16 scores and the keys. Where that holds too few rows for a
    product, they go through memory.
    """
    if device.type != "cuda":
        return PRODUCT_ROWS
    rows_in_l2 = torch.cuda.get_device_properties(device).L2_cache_size // 3 // (4 * columns) // 128 * 128
    return min(rows_in_l2, PRODUCT_ROWS) if rows_in_l2 >= LEAST_PRODUCT_ROWS else PRODUCT_ROWS


def plan_slabs(name: str, *, budget: int | None, device: torch.device, **shape: int) -> SlabPlan:
    """Choose slabs within `budget` bytes of scores (None: a quarter of the memory that is free at this call).

    shape: what `_plan_within` takes. Where keeping everything needs no more than ALWAYS_BYTES it is kept, whatever is
    free, and nothing is read.
    Raises: ValueError if the budget does not hold one image, or with regather all scores.
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
    """The slabs of a shape within `budget` bytes, made once.

    rows x columns are the target scores; an image's match takes `target_views` rows of them and `source_views` rows of
    source scores, the same rows where `shared`. sixteen_bit: scores are int16, made from a float32 slab, and their
    gradient takes their place. With several ranks source scores are kept too where they fit: they are made while the
    ranks add up columns. regather: all must be kept.
    """
    row_bytes, made_bytes = (2 * columns, 4 * columns) if sixteen_bit else (4 * columns, 0)
    kept = rows * row_bytes
    source = 0 if shared else source_views * images * row_bytes
    at_once = max(product_rows(columns, device), source_views)
    if shared or ranks > 1:
        left = budget - kept - source
        made_rows = min(rows, at_once, left // made_bytes) if sixteen_bit else 0
        if left >= 0 and made_rows >= (min(rows, source_views) if sixteen_bit else 0):
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
