"""Embedding rows: the L2 normalisation, its gradient, and the row potential of scores against centred keys.

One program per row of D features, in blocks of BLOCK columns; the second read of a row comes from the cache.
"""

import triton
import triton.language as tl

NORM_FLOOR = tl.constexpr(1e-12)


@triton.jit
def normalize_kernel(x, unit, norm, D, stride_x, stride_feature, BLOCK: tl.constexpr):
    """unit_i = x_i / max(|x_i|, 1e-12), norm_i = |x_i|, sums in float64: rows of any finite magnitude.

    Shapes: x (m, D) any float type, any strides -> unit (m, D) float32 contiguous, norm (m,) float64.
    A zero row has unit 0 and norm 0; a row that is not finite has a norm that is not finite.
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, D, BLOCK):
        part = tl.load(x + i * stride_x + (first + offs) * stride_feature, mask=first + offs < D, other=0.0).to(
            tl.float64
        )
        squares += part * part
    length = tl.sqrt(tl.sum(squares, axis=0))
    tl.store(norm + i, length)
    inverse = 1.0 / tl.where(length > NORM_FLOOR, length, NORM_FLOOR)
    inverse = tl.where(length == length, inverse, length)
    for first in range(0, D, BLOCK):
        mask = first + offs < D
        part = tl.load(x + i * stride_x + (first + offs) * stride_feature, mask=mask, other=0.0).to(tl.float64)
        tl.store(unit + i * D + first + offs, (part * inverse).to(tl.float32), mask=mask)


@triton.jit
def centre_potential_kernel(unit, centre, exponent, mantissa, D, stride_unit, scale, BLOCK: tl.constexpr):
    """exponent_i, mantissa_i of 2^(scale * <unit_i, centre>), the product in float64; scale = log2(e)/eps.

    Shapes: unit (m, D) float32, centre (D,) float32 -> exponent (m,), mantissa (m,) in [1, 2].
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    dots = tl.zeros([BLOCK], tl.float64)
    for first in range(0, D, BLOCK):
        mask = first + offs < D
        a = tl.load(unit + i * stride_unit + first + offs, mask=mask, other=0.0).to(tl.float64)
        dots += a * tl.load(centre + first + offs, mask=mask, other=0.0).to(tl.float64)
    x = tl.sum(dots, axis=0) * tl.full([], scale, tl.float32).to(tl.float64)
    whole = tl.floor(x)
    tl.store(exponent + i, whole.to(tl.float32))
    tl.store(mantissa + i, tl.exp2((x - whole).to(tl.float32)))


@triton.jit
def project_kernel(d, unit, norm, D, BLOCK: tl.constexpr):
    """d_i <- (d_i - unit_i <unit_i, d_i>) / norm_i, and 0 where norm_i < 1e-12.

    Shapes: d (m, D) float32, unit (m, D) float32, norm (m,) float64; contiguous.
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    length = tl.load(norm + i)
    inverse = tl.where(length < NORM_FLOOR, 0.0, 1.0 / tl.where(length < NORM_FLOOR, 1.0, length)).to(tl.float32)
    dots = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        mask = first + offs < D
        part = tl.load(d + i * D + first + offs, mask=mask, other=0.0)
        dots += part * tl.load(unit + i * D + first + offs, mask=mask, other=0.0)
    along = tl.sum(dots, axis=0)
    for first in range(0, D, BLOCK):
        mask = first + offs < D
        part = tl.load(d + i * D + first + offs, mask=mask, other=0.0)
        part -= along * tl.load(unit + i * D + first + offs, mask=mask, other=0.0)
        tl.store(d + i * D + first + offs, part * inverse, mask=mask)
