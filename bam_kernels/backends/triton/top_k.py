"""Functions that find the k largest entries of a row of non-negative numbers; of ties, the lower public columns.

Non-negative floats are ordered as their bits are, so the k-th largest is found by bisection on the bits; where it
ties, a second bisection over the public columns says which of the ties are kept.
"""

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def public_column(column, W, T, B):
    """Convert columns from gathered order (rank, view, image) to public order (view, rank, image)."""
    return ((column // B % T) * W + column // (T * B)) * B + column % B


@triton.jit
def kept(bits, public, low, cut):
    """Mask of kept entries: bits above `low`, or equal to `low` with a public column below `cut`."""
    return (bits > low) | ((bits == low) & (public < cut))


@triton.jit
def threshold(bits, public, k, n):
    """(low, cut) such that `kept` holds for exactly k entries of a row on chip. 0 < k < n.

    bits, public: int32; bits are -1 beyond the row.
    """
    low, high = tl.zeros([], tl.int32), tl.full([], INFINITY_BITS, tl.int32)
    count = tl.full([], 0, tl.int32) + n
    while (high - low > 1) & (count != k):
        middle = low + (high - low) // 2
        count = tl.sum((bits >= middle).to(tl.int32), axis=0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
    missing = k - tl.sum((bits > low).to(tl.int32), axis=0)
    before, cut = tl.zeros([], tl.int32), tl.full([], 0, tl.int32) + n
    if tl.sum((bits == low).to(tl.int32), axis=0) != missing:
        while cut - before > 1:
            middle = before + (cut - before) // 2
            enough = tl.sum(((bits == low) & (public < middle)).to(tl.int32), axis=0) >= missing
            cut = tl.where(enough, middle, cut)
            before = tl.where(enough, before, middle)
    return low, cut


@triton.jit
def _count(row, n, least, most, before, W, T, B, BLOCK: tl.constexpr):
    """Number of entries of a row in memory with bits in [least, most] and a public column below `before`."""
    offs = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        column = first + offs
        bits = tl.load(row + column, mask=column < n, other=-1.0).to(tl.int32, bitcast=True)
        found = (bits >= least) & (bits <= most) & (public_column(column, W, T, B) < before)
        counts += found.to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def threshold_in_memory(row, k, n, W, T, B, BLOCK: tl.constexpr):
    """`threshold` for a row (n,) float32 in memory."""
    low, high = tl.zeros([], tl.int32), tl.full([], INFINITY_BITS, tl.int32)
    largest = high
    count = tl.full([], 0, tl.int32) + n
    while (high - low > 1) & (count != k):
        middle = low + (high - low) // 2
        count = _count(row, n, middle, largest, n, W, T, B, BLOCK)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
    missing = k - _count(row, n, low + 1, largest, n, W, T, B, BLOCK)
    before, cut = tl.zeros([], tl.int32), tl.full([], 0, tl.int32) + n
    if _count(row, n, low, low, n, W, T, B, BLOCK) != missing:
        while cut - before > 1:
            middle = before + (cut - before) // 2
            enough = _count(row, n, low, low, middle, W, T, B, BLOCK) >= missing
            cut = tl.where(enough, middle, cut)
            before = tl.where(enough, before, middle)
    return low, cut
