"""What makes scores of products: the positives' mask and the fixed-point form."""

import triton
import triton.language as tl

from .row import MASKED, MASKED_FIXED


@triton.jit(do_not_specialize=["m", "first_row", "B", "T", "own_columns"])
def mask_positives_kernel(scores, m, stride, first_row, B, T, own_columns, BLOCK: tl.constexpr):
    """scores_ij <- masked where row first_row + i and column j are of the same image: T columns of every row.

    Shapes: scores (m, N) float32 or int16, columns in gathered order; own_columns: the first of this rank's T*B.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = offs // T
    column = own_columns + (offs % T) * B + (first_row + row) % B
    masked = MASKED_FIXED if scores.dtype.element_ty == tl.int16 else MASKED
    tl.store(scores + row * stride + column, masked, mask=row < m)


@triton.jit
def to_fixed(s, steps_per_unit):
    """rint(s * steps_per_unit) clamped to +-32767 as float32; MASKED_FIXED for masked scores."""
    x = s * steps_per_unit
    x = tl.minimum(tl.maximum(x, -32767.0), 32767.0)
    # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
    x = (x + 12582912.0) - 12582912.0
    return tl.where(s <= MASKED, MASKED_FIXED * 1.0, x)


@triton.jit
def quantize_kernel(scores, out, step, step_pointer, n, stride, stride_out, BLOCK: tl.constexpr):
    """out_ij = rint(scores_ij / step) clamped to +-32767; masked scores as -32768.

    Shapes: scores (m, n) float32 -> out (m, n) int16. `step` is an argument, or a device scalar.
    """
    i = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    if step_pointer is not None:
        step = tl.load(step_pointer)
    s = tl.load(scores + i * stride + offs, mask=mask, other=0.0)
    tl.store(out + i * stride_out + offs, to_fixed(s, 1.0 / step).to(tl.int16), mask=mask)
