"""Tiles of scores in registers, shared by all flash kernels.

Rows x (m, D) and keys k (N, D) are contiguous in D: float32, or 16-bit unit rows minus a centre, times a power of two.
The score in a tile is the product of loaded rows plus the bias of the key; scales contain the remaining factor.
Positives are masked by index before the tile is used. D is known at compile time. If D <= BLOCK_D, the rows that a
program owns are loaded once; else all their features are loaded again for every tile.
"""

import triton
import triton.language as tl

from .row import INTERPRETED, MASKED


@triton.jit
def features(x, offs, mask, first, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """x[offs, first : first + BLOCK], 0 outside `mask` and beyond D; (rows, BLOCK)."""
    offs_d = first + tl.arange(0, BLOCK)
    pointers = x + offs.to(tl.int64)[:, None] * stride + offs_d[None, :]
    return tl.load(pointers, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32."""
    if INTERPRETED:  # the interpreter multiplies bfloat16 wrongly
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
    """Products a bᵀ of two tiles of rows, MASKED where images are equal; a_first, b_first: first BLOCK_D features."""
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
def key_bias(bias, offs, mask):
    """Bias to be added to products with the keys `offs`: from bias (N,), or None: 0."""
    if bias is None:
        return tl.zeros(offs.shape, tl.float32)
    else:
        return tl.load(bias + offs, mask=mask, other=0.0)


@triton.jit
def load_potential(exponent, mantissa, offs, mask):
    """Load a potential as (exponent, mantissa), such that exponentials are 0 outside `mask`; None: potential 1."""
    if exponent is None:
        return tl.where(mask, 0.0, MASKED), tl.full(offs.shape, 1.0, tl.float32)
    else:
        return tl.load(exponent + offs, mask=mask, other=MASKED), tl.load(mantissa + offs, mask=mask, other=1.0)
