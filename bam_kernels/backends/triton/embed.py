"""Embedding rows: the L2 normalisation, its gradient, and the row potential of scores against centred keys.

One program per row of D features, in blocks of BLOCK columns; the second read of a row comes from the cache. Rows x are
(m, D) of any float type and strides, or (V, B, D), of which row v*B + i is x[v, i].
"""

import triton
import triton.language as tl

NORM_FLOOR = tl.constexpr(1e-12)


@triton.jit
def _row(x, i, B, stride_view, stride_row):
    return x + (i // B) * stride_view + (i % B) * stride_row


@triton.jit(do_not_specialize=["B"])
def unit_rows_kernel(
    x, centre, read, norm, B, D, stride_view, stride_row, stride_feature, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """read_i = UNIT * (x_i / max(|x_i|, 1e-12) - centre), norm_i = |x_i|, sums in float64: rows of any magnitude.

    Shapes: x rows of D, centre (D,) float32 or None: 0 -> read (m, D) float32 or fp16 contiguous, norm (m,) float64.
    A zero row has unit 0 and norm 0; a row that is not finite has a norm that is not finite.
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    row = _row(x, i, B, stride_view, stride_row)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, D, BLOCK):
        part = tl.load(row + (first + offs) * stride_feature, mask=first + offs < D, other=0.0).to(tl.float64)
        squares += part * part
    length = tl.sqrt(tl.sum(squares, axis=0))
    tl.store(norm + i, length)
    inverse = 1.0 / tl.where(length > NORM_FLOOR, length, NORM_FLOOR)
    inverse = tl.where(length == length, inverse, length)
    for first in range(0, D, BLOCK):
        mask = first + offs < D
        unit = tl.load(row + (first + offs) * stride_feature, mask=mask, other=0.0).to(tl.float64) * inverse
        if centre is not None:
            unit -= tl.load(centre + first + offs, mask=mask, other=0.0)
        tl.store(read + i * D + first + offs, (unit * UNIT).to(read.dtype.element_ty), mask=mask)


@triton.jit
def centre_potential_kernel(read, centre, exponent, mantissa, D, stride_read, scale, BLOCK: tl.constexpr):
    """exponent_i, mantissa_i of 2^(scale * <read_i, centre>), the product in float64; scale = log2(e)/eps / UNIT.

    Shapes: read (m, D) float32 or fp16, centre (D,) float32 -> exponent (m,), mantissa (m,) in [1, 2].
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    dots = tl.zeros([BLOCK], tl.float64)
    for first in range(0, D, BLOCK):
        mask = first + offs < D
        a = tl.load(read + i * stride_read + first + offs, mask=mask, other=0.0).to(tl.float64)
        dots += a * tl.load(centre + first + offs, mask=mask, other=0.0).to(tl.float64)
    x = tl.sum(dots, axis=0) * tl.full([], scale, tl.float32).to(tl.float64)
    whole = tl.floor(x)
    tl.store(exponent + i, whole.to(tl.float32))
    tl.store(mantissa + i, tl.exp2((x - whole).to(tl.float32)))


@triton.jit(do_not_specialize=["B"])
def project_kernel(d, x, norm, factor, B, D, stride_view, stride_row, stride_feature, BLOCK: tl.constexpr):
    """d_i <- factor * (d_i - u_i <u_i, d_i>) / norm_i with u_i = x_i / norm_i, and 0 where norm_i < 1e-12.

    Shapes: d (m, D) float32 contiguous, x rows of D, norm (m,) float64.
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    row = _row(x, i, B, stride_view, stride_row)
    length = tl.load(norm + i)
    inverse = tl.where(length < NORM_FLOOR, 0.0, 1.0 / tl.where(length < NORM_FLOOR, 1.0, length))
    dots = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        mask = first + offs < D
        unit = tl.load(row + (first + offs) * stride_feature, mask=mask, other=0.0).to(tl.float64) * inverse
        dots += tl.load(d + i * D + first + offs, mask=mask, other=0.0) * unit.to(tl.float32)
    along = tl.sum(dots, axis=0)
    inverse_factor = (inverse * factor).to(tl.float32)
    for first in range(0, D, BLOCK):
        mask = first + offs < D
        unit = tl.load(row + (first + offs) * stride_feature, mask=mask, other=0.0).to(tl.float64) * inverse
        part = tl.load(d + i * D + first + offs, mask=mask, other=0.0) - along * unit.to(tl.float32)
        tl.store(d + i * D + first + offs, part * inverse_factor, mask=mask)
