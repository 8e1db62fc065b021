"""Kernels that turn products into scores: the mask of positives and the fixed-point form.

Row i of a slab shows image (first + i % period) % B of this rank: `period` rows of each of several views.
"""

import triton
import triton.language as tl

from .row import MASKED, MASKED_FIXED, scale_of


@triton.jit
def key_image(offs, B, T, own_columns):
    """The image of this rank that each key shows, keys in gathered order; -1 for keys of other ranks."""
    own = (offs >= own_columns) & (offs < own_columns + T * B)
    return tl.where(own, (offs - own_columns) % B, -1)


@triton.jit(do_not_specialize=["m", "first", "period", "B", "T", "own_columns"])
def mask_positives_kernel(scores, m, stride, first, period, B, T, own_columns, BLOCK: tl.constexpr):
    """Mask scores_ij where row i and column j show one image: T columns of every row.

    Shapes: scores (m, N) float32, columns in gathered order; own_columns: the first of this rank's T*B columns.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = offs // T
    column = own_columns + (offs % T) * B + (first + row % period) % B
    tl.store(scores + row * stride + column, MASKED, mask=row < m)


@triton.jit
def to_fixed(s, steps_per_unit):
    """rint(s * steps_per_unit) clamped to +-32767 as float32; MASKED_FIXED for masked scores."""
    x = s * steps_per_unit
    x = tl.minimum(tl.maximum(x, -32767.0), 32767.0)
    # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
    x = (x + 12582912.0) - 12582912.0
    return tl.where(s <= MASKED, MASKED_FIXED * 1.0, x)


@triton.jit(do_not_specialize=["first", "period", "B", "T", "own_columns"])
def quantize_kernel(
    scores,
    bias,
    out,
    step,
    step_pointer,
    n,
    stride,
    stride_out,
    first,
    period,
    B,
    T,
    own_columns,
    MASK_POSITIVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_ij = rint((scores_ij + bias_j) / step) clamped to +-32767; masked scores, and positives, as -32768.

    Shapes: scores (m, n) float32, bias (n,) or None: 0 -> out (m, n) int16. `step` is an argument, times a device
    scalar where there is one.
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    s = tl.load(scores + i * stride + offs, mask=mask, other=0.0)
    if bias is not None:
        s += tl.load(bias + offs, mask=mask, other=0.0)
    if MASK_POSITIVES:
        s = tl.where(key_image(offs, B, T, own_columns) == (first + i % period) % B, MASKED, s)
    tl.store(out + i * stride_out + offs, to_fixed(s, 1.0 / scale_of(step, step_pointer)).to(tl.int16), mask=mask)
