"""Kernels on embedding rows: L2 normalisation, its gradient, and the biases and potentials of centred keys.

One program per row of D features, in blocks of BLOCK columns; a row of one block is read once and held. Rows x are
(m, D) of any float type and strides, or (V, B, D), of which row v*B + i is x[v, i].
"""

import triton
import triton.language as tl

from ..interface import BIAS_COLUMNS

NORM_FLOOR = tl.constexpr(1e-12)
BIAS = tl.constexpr(BIAS_COLUMNS)
LEAST_SQUARE = tl.constexpr(1e-14)  # least squared length of a difference of unit rows, above float64's rounding of 1


@triton.jit
def _row(x, i, B, stride_view, stride_row):
    return x + (i // B) * stride_view + (i % B) * stride_row


@triton.jit
def _store_power(exponent, mantissa, i, x):
    """Store 2^x of a float64 x as an integer exponent and a mantissa in [1, 2]."""
    whole = tl.floor(x)
    tl.store(exponent + i, whole.to(tl.float32))
    tl.store(mantissa + i, tl.exp2((x - whole).to(tl.float32)))


@triton.jit
def _write_unit(unit, centre, read, sent, offs, D, sent_D, UNIT: tl.constexpr):
    """Write UNIT * (unit - centre) to the row `read` and the first sent_D features of `sent`, where they are given.

    Returns the terms of <unit, centre> and <unit - centre, centre>.
    """
    mask = offs < D
    along = tl.zeros_like(unit)
    beyond = tl.zeros_like(unit)
    if centre is not None:
        c = tl.load(centre + offs, mask=mask, other=0.0).to(tl.float64)
        along = unit * c
        unit -= c
        beyond = unit * c
    if read is not None:
        value = (unit * UNIT).to(read.dtype.element_ty)
        tl.store(read + offs, value, mask=mask)
        if sent is not None:
            tl.store(sent + offs, value, mask=offs < sent_D)
    return along, beyond


@triton.jit
def _store_end(sent, bias, D, sent_columns, is_sent):
    """Store what follows the features in a message's row: zeros, and the bias in the last BIAS columns."""
    end = sent_columns - BIAS
    for first in range(D, end, 32):
        offs = first + tl.arange(0, 32)
        tl.store(sent + offs, tl.zeros([32], tl.float16), mask=is_sent & (offs < end))
    tl.store((sent + end).to(tl.pointer_type(tl.float32)), bias, mask=is_sent)


@triton.jit(do_not_specialize=["sent_rows", "B"])
def unit_rows_kernel(
    x,
    centre,
    read,
    norm,
    bias,
    exponent,
    mantissa,
    message,
    sent_rows,
    sent_columns,
    scale,
    B,
    D,
    stride_view,
    stride_row,
    stride_feature,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """read_i = UNIT * (u_i - centre) with u_i = x_i / max(|x_i|, 1e-12), and norm_i = |x_i|, for rows of any magnitude.

    With a centre, also bias_i = UNIT^2 <u_i - centre, centre> and the potential 2^(scale * <u_i, centre>). Sums are in
    float64. HELD: a row is one block.
    The first sent_rows rows of `message` are those of `read`, then zeros, and bias_i in the last BIAS columns.

    Shapes: x rows of D, centre (D,) float32 or None: 0 -> read (m, D) float32 or fp16 contiguous, or None: not written,
    norm (m,) float64, bias (m,) float32, exponent (m,), mantissa (m,) in [1, 2], message (sent_rows, sent_columns) fp16
    or None.
    A zero row has unit 0 and norm 0; a row that is not finite has a norm that is not finite.
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    row = _row(x, i, B, stride_view, stride_row)
    first_part = tl.load(row + offs.to(tl.int64) * stride_feature, mask=offs < D, other=0.0).to(tl.float64)
    squares = first_part * first_part
    if not HELD:
        for first in range(BLOCK, D, BLOCK):
            at = row + (first + offs).to(tl.int64) * stride_feature
            part = tl.load(at, mask=first + offs < D, other=0.0).to(tl.float64)
            squares += part * part
    length = tl.sqrt(tl.sum(squares, axis=0))
    tl.store(norm + i, length)
    inverse = 1.0 / tl.where(length > NORM_FLOOR, length, NORM_FLOOR)
    inverse = tl.where(length == length, inverse, length)
    to = read + i * D if read is not None else None
    sent = message + i * sent_columns if message is not None else None
    sent_D = tl.where(i < sent_rows, D, 0)
    along, beyond = _write_unit(first_part * inverse, centre, to, sent, offs, D, sent_D, UNIT)
    if not HELD:
        for first in range(BLOCK, D, BLOCK):
            at = row + (first + offs).to(tl.int64) * stride_feature
            unit = tl.load(at, mask=first + offs < D, other=0.0).to(tl.float64) * inverse
            more_along, more_beyond = _write_unit(unit, centre, to, sent, first + offs, D, sent_D, UNIT)
            along += more_along
            beyond += more_beyond
    if centre is not None:
        bias_i = (tl.sum(beyond, axis=0) * (UNIT * UNIT)).to(tl.float32)
        tl.store(bias + i, bias_i)
        if message is not None:
            _store_end(sent, bias_i, D, sent_columns, i < sent_rows)
        _store_power(exponent, mantissa, i, tl.sum(along, axis=0) * tl.full([], scale, tl.float32).to(tl.float64))


@triton.jit(do_not_specialize=["m", "ranks", "B"])
def mean_row_kernel(
    x,
    norm,
    mean,
    m,
    ranks,
    B,
    D,
    stride_view,
    stride_row,
    stride_feature,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mean_k = the mean over i of x_ik / max(norm_i, 1e-12), over `ranks`, in float32; norm None: 1.

    A program has BLOCK_D features.

    Shapes: x rows of D, norm (m,) float64 or None -> mean (D,) float32.
    """
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, m, BLOCK_M):
        i = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        at = _row(x, i, B, stride_view, stride_row)[:, None] + offs_d.to(tl.int64)[None, :] * stride_feature
        part = tl.load(at, mask=(i < m)[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        if norm is not None:
            length = tl.load(norm + i, mask=i < m, other=1.0)
            inverse = 1.0 / tl.where(length < NORM_FLOOR, NORM_FLOOR, length)
            part *= inverse.to(tl.float32)[:, None]
        sums += part
    tl.store(mean + offs_d, tl.sum(sums, axis=0) / (m.to(tl.float32) * ranks), mask=mask_d)


@triton.jit
def _extremes(x, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, n, BLOCK):
        mask = first + offs < n
        least = tl.minimum(least, tl.load(x + first + offs, mask=mask, other=float("inf")))
        most = tl.maximum(most, tl.load(x + first + offs, mask=mask, other=float("-inf")))
    return tl.min(least, axis=0).to(tl.float64), tl.max(most, axis=0).to(tl.float64)


@triton.jit(do_not_specialize=["m", "n", "other"])
def product_step_kernel(
    centre,
    key_bias,
    row_bias,
    other_bias,
    step,
    D,
    n,
    m,
    other,
    UNIT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Size of one fixed-point step as a product of centred rows, such that STEPS steps hold every product plus bias.

    With a = max_j |k'_j| and b = max_i |z'_i| both |s| <= a and |s| <= a b + max_j |bias_j| hold; unit rows have
    |u_i - centre|^2 = 1 - |centre|^2 - 2 bias_i / UNIT^2.
    Shapes: centre (D,), key_bias (n,), row_bias (m,), other_bias (other,) or None, float32 -> step (1,)
    float32. One program.
    """
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, D, BLOCK):
        c = tl.load(centre + first + offs, mask=first + offs < D, other=0.0).to(tl.float64)
        squares += c * c
    left = 1.0 - tl.sum(squares, axis=0)
    least_of_keys, most_of_keys = _extremes(key_bias, n, BLOCK)
    least_of_rows, _most = _extremes(row_bias, m, BLOCK)
    if other_bias is not None:
        least_of_others, _most_of_others = _extremes(other_bias, other, BLOCK)
        least_of_rows = tl.minimum(least_of_rows, least_of_others)
    # If all keys equal the centre, every product is 0 and any step will do. A NaN centre gives a NaN step.
    a = tl.maximum(left - 2.0 / (UNIT * UNIT) * least_of_keys, LEAST_SQUARE)
    a = tl.sqrt(tl.where(left == left, a, left))
    b = tl.sqrt(tl.maximum(left - 2.0 / (UNIT * UNIT) * least_of_rows, LEAST_SQUARE))
    bias = tl.maximum(-least_of_keys, most_of_keys) / (UNIT * UNIT)
    tl.store(step, (tl.minimum(a * b + bias, a) * (UNIT * UNIT / STEPS)).to(tl.float32))


@triton.jit
def centre_potential_kernel(read, centre, exponent, mantissa, D, stride_read, scale, BLOCK: tl.constexpr):
    """exponent_i, mantissa_i of 2^(scale * <read_i, centre>), the product in float64; scale = log2(e)/eps.

    Shapes: read (m, D) float32, centre (D,) float32 -> exponent (m,), mantissa (m,) in [1, 2].
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    dots = tl.zeros([BLOCK], tl.float64)
    for first in range(0, D, BLOCK):
        mask = first + offs < D
        a = tl.load(read + i * stride_read + first + offs, mask=mask, other=0.0).to(tl.float64)
        dots += a * tl.load(centre + first + offs, mask=mask, other=0.0).to(tl.float64)
    _store_power(exponent, mantissa, i, tl.sum(dots, axis=0) * tl.full([], scale, tl.float32).to(tl.float64))


@triton.jit(do_not_specialize=["B"])
def project_kernel(
    d, x, norm, factor, B, D, stride_view, stride_row, stride_feature, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """d_i <- factor * (d_i - u_i <u_i, d_i>) / norm_i with u_i = x_i / norm_i, and 0 where norm_i < 1e-12.

    HELD: a row is one block.
    Shapes: d (m, D) float32 contiguous, x rows of D, norm (m,) float64.
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    row = _row(x, i, B, stride_view, stride_row)
    length = tl.load(norm + i)
    inverse = tl.where(length < NORM_FLOOR, 0.0, 1.0 / tl.where(length < NORM_FLOOR, 1.0, length))
    first_unit = (
        tl.load(row + offs.to(tl.int64) * stride_feature, mask=offs < D, other=0.0).to(tl.float64) * inverse
    ).to(tl.float32)
    first_part = tl.load(d + i * D + offs, mask=offs < D, other=0.0)
    dots = first_part * first_unit
    if not HELD:
        for first in range(BLOCK, D, BLOCK):
            mask = first + offs < D
            at = row + (first + offs).to(tl.int64) * stride_feature
            unit = (tl.load(at, mask=mask, other=0.0).to(tl.float64) * inverse).to(tl.float32)
            dots += tl.load(d + i * D + first + offs, mask=mask, other=0.0) * unit
    along = tl.sum(dots, axis=0)
    inverse_factor = (inverse * factor).to(tl.float32)
    tl.store(d + i * D + offs, (first_part - along * first_unit) * inverse_factor, mask=offs < D)
    if not HELD:
        for first in range(BLOCK, D, BLOCK):
            mask = first + offs < D
            at = row + (first + offs).to(tl.int64) * stride_feature
            unit = (tl.load(at, mask=mask, other=0.0).to(tl.float64) * inverse).to(tl.float32)
            part = tl.load(d + i * D + first + offs, mask=mask, other=0.0) - along * unit
            tl.store(d + i * D + first + offs, part * inverse_factor, mask=mask)
