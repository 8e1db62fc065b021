"""Tiles of scores that exist in registers alone: what all flash kernels share.

Rows x (m, D) and keys k (N, D) are float32, or 16-bit unit rows times a power of two, contiguous in D. The score in a
tile is the plain product of what was loaded; scales carry the factor that is left. Its positives are masked by index
before anything is taken from it. D is known at compile time: the first BLOCK_D features of the rows that stay are
loaded once; where those are not all, all are loaded again for every tile.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row import INTERPRETED, MASKED
from .tiles import clamp, power_of_two, up

# Programs of one launch at most made by splitting a sum: bounds the partials of dz and dk whatever the shape.
PROGRAMS = 256


@triton.jit
def features(x, offs, mask, first, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """x[offs, first : first + BLOCK], 0 outside `mask` and beyond D; (rows, BLOCK)."""
    offs_d = first + tl.arange(0, BLOCK)
    pointers = x + offs.to(tl.int64)[:, None] * stride + offs_d[None, :]
    return tl.load(pointers, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32."""
    if INTERPRETED:  # it multiplies bfloat16 wrongly
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def scores(
    a_first,
    a,
    offs_a,
    mask_a,
    image_a,
    stride_a,
    b_first,
    b,
    offs_b,
    mask_b,
    image_b,
    stride_b,
    D: tl.constexpr,
    MASK_POSITIVES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a bᵀ of two tiles of rows whose first features are a_first and b_first, MASKED where their images are equal."""
    s = tl.zeros([offs_a.shape[0], offs_b.shape[0]], tl.float32)
    if D <= BLOCK_D:
        s = dot(a_first, tl.trans(b_first), s, PRECISION)
    else:
        for first in range(0, D, BLOCK_D):
            a_part = features(a, offs_a, mask_a, first, stride_a, D, BLOCK_D)
            b_part = features(b, offs_b, mask_b, first, stride_b, D, BLOCK_D)
            s = dot(a_part, tl.trans(b_part), s, PRECISION)
    if MASK_POSITIVES:
        s = tl.where(image_a[:, None] == image_b[None, :], MASKED, s)
    return s


@triton.jit
def load_potential(exponent, mantissa, offs, mask):
    """(exponent, mantissa), which make the exponential 0 outside `mask`; of one where there is no potential."""
    if exponent is None:
        return tl.where(mask, 0.0, MASKED), tl.full(offs.shape, 1.0, tl.float32)
    else:
        return tl.load(exponent + offs, mask=mask, other=MASKED), tl.load(mantissa + offs, mask=mask, other=1.0)


class FlashTile(NamedTuple):
    """Rows that a program owns, rows of one step of its loop, features at once and warps."""

    block_m: int
    block_n: int
    block_d: int
    block_out: int
    num_warps: int


def flash_tile(m: int, n: int, D: int, *, wide: bool = False, sixteen_bit: bool = True) -> FlashTile:
    """A program owns up to 64 of m rows and reads n others, 64 at a time; 16 is the least that a product takes.

    wide: it also holds sums of up to 256 features for its rows, and fewer scores for that: what the registers of 128
    threads take on sm_90.
    """
    block_d = clamp(power_of_two(D), 16, 128 if sixteen_bit and D <= 128 else 64)
    block_out = clamp(power_of_two(D), 16, 256)
    block_m, block_n = clamp(power_of_two(m), 16, 64), clamp(power_of_two(n), 16, 32 if wide else 64)
    return FlashTile(block_m, block_n, block_d, block_out, 4)


def split(tiles: int, n: int, block_n: int, most: int = 64) -> tuple[int, int]:
    """(chunks, rows of a chunk): n rows in chunks of whole blocks, so that there are about PROGRAMS programs."""
    blocks = -(-n // block_n)
    chunks = clamp(PROGRAMS // max(tiles, 1), 1, min(most, blocks))
    rows = up(-(-n // chunks), block_n)
    return -(-n // rows), rows
