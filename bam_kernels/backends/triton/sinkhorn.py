"""Kernels for Sinkhorn-Knopp in log space: the first column step, and one iteration in one read if rows fit on chip.

m rows, n columns of scores with contiguous columns. Sums over rows are taken chunk by chunk into partials
(chunks, n), which a second kernel adds up in order: results are equal from run to run.
"""

import triton
import triton.language as tl

from .row import (
    MASKED,
    NO_SHIFT,
    exponent_of,
    fma,
    inverse_or_zero,
    is_poor,
    load_scores,
    reciprocal,
    scale_of,
    split,
)
from .scores import key_image, to_fixed


@triton.jit(do_not_specialize=["m", "rows", "first_image", "period", "B", "T", "own_columns"])
def column_lse_kernel(
    s,
    row_exponent,
    row_mantissa,
    shift,
    sums,
    scale,
    scale_pointer,
    bias,
    fixed,
    step,
    step_pointer,
    m,
    n,
    stride,
    stride_fixed,
    rows,
    first_image,
    period,
    B,
    T,
    own_columns,
    MASK_POSITIVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Per chunk and column Σ_i 2^(scale*s_ij) row_i = sums_j * 2^shift_j, in one read of the scores.

    Shapes: s (m, n) float32 or int16, row potential (m,) -> shift, sums (chunks, n); a chunk is `rows` rows.
    Numerics: shift is an integer at or above the largest term's logarithm (base 2); an empty column has sum 0.
    As epilogue of a product: s is float32, `bias` (n,) is added unless None, positives are masked by index (see
    scores.py), and rint(s/step) is written to `fixed` (m, n) int16 unless None. The sum is then over the values of
    `fixed`, and `scale` applies to these values.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1)
    mask_n = offs_n < n
    scale = scale_of(scale, scale_pointer)
    if bias is not None:
        bias_n = tl.load(bias + offs_n, mask=mask_n, other=0.0)
    most = tl.full([BLOCK_N], NO_SHIFT, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, rows, BLOCK_M):
        offs_m = chunk * rows + first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        mask = mask_m[:, None] & mask_n[None, :]
        x = load_scores(s + offs_m.to(tl.int64)[:, None] * stride + offs_n[None, :], mask)
        if bias is not None:
            x += bias_n[None, :]
        if MASK_POSITIVES:
            image = (first_image + offs_m % period) % B
            x = tl.where(key_image(offs_n, B, T, own_columns)[None, :] == image[:, None], MASKED, x)
        if fixed is not None:
            q = to_fixed(x, 1.0 / scale_of(step, step_pointer))
            tl.store(fixed + offs_m.to(tl.int64)[:, None] * stride_fixed + offs_n[None, :], q.to(tl.int16), mask=mask)
            x = tl.where(x <= MASKED, MASKED, q)
        exponent = tl.load(row_exponent + offs_m, mask=mask_m, other=0.0)[:, None]
        mantissa = tl.load(row_mantissa + offs_m, mask=mask_m, other=0.0)[:, None]
        fresh = tl.maximum(most, tl.ceil(tl.max(fma(x, scale, exponent), axis=0)))
        e = tl.exp2(fma(x, scale, exponent - fresh[None, :])) * mantissa
        total = total * tl.exp2(most - fresh) + tl.sum(e, axis=0)
        most = fresh
    at = chunk.to(tl.int64) * n + offs_n
    tl.store(shift + at, most, mask=mask_n)
    tl.store(sums + at, total, mask=mask_n)


@triton.jit(do_not_specialize=["chunks"])
def merge_lse_kernel(
    partial_shift,
    partial_sums,
    shift,
    sums,
    exponent,
    mantissa,
    chunks,
    n,
    ACCUMULATE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up (shift, sums) of all chunks into `shift`, `sums` (n,); with ACCUMULATE, add the old values too.

    If `exponent`, `mantissa` (n,) are given, the potential 1 / (sums_j * 2^shift_j) is written there and nothing else.
    Shapes: partials (chunks, n), chunks <= CHUNKS.
    """
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_c = tl.arange(0, CHUNKS)
    mask_n = offs_n < n
    mask = (offs_c < chunks)[:, None] & mask_n[None, :]
    at = offs_c.to(tl.int64)[:, None] * n + offs_n[None, :]
    each = tl.load(partial_shift + at, mask=mask, other=NO_SHIFT)
    most = tl.max(each, axis=0)
    if ACCUMULATE:
        before = tl.load(shift + offs_n, mask=mask_n, other=NO_SHIFT)
        most = tl.maximum(most, before)
    total = tl.sum(tl.load(partial_sums + at, mask=mask, other=0.0) * tl.exp2(each - most[None, :]), axis=0)
    if ACCUMULATE:
        total += tl.load(sums + offs_n, mask=mask_n, other=0.0) * tl.exp2(before - most)
    if exponent is not None:
        _store_reciprocal(exponent, mantissa, offs_n, most, total, mask_n)
    else:
        tl.store(shift + offs_n, most, mask=mask_n)
        tl.store(sums + offs_n, total, mask=mask_n)


@triton.jit(do_not_specialize=["chunks"])
def add_chunks_kernel(
    partial,
    factor,
    out,
    exponent,
    mantissa,
    chunks,
    n,
    ACCUMULATE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_j = factor_j * Σ_chunk partial[chunk, j], in a fixed order; with ACCUMULATE, added to the old out_j.

    If `exponent`, `mantissa` (n,) are given, this potential is then divided by out_j; `factor` may be its mantissa.
    Shapes: partial (chunks, n), factor (n,) or None: 1, out (n,); CHUNKS chunks are read at once.
    """
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < n
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, CHUNKS):
        offs_c = first + tl.arange(0, CHUNKS)
        mask = (offs_c < chunks)[:, None] & mask_n[None, :]
        at = offs_c.to(tl.int64)[:, None] * n + offs_n[None, :]
        total += tl.sum(tl.load(partial + at, mask=mask, other=0.0), axis=0)
    if factor is not None:
        total = total * tl.load(factor + offs_n, mask=mask_n, other=0.0)
    if ACCUMULATE:
        total += tl.load(out + offs_n, mask=mask_n, other=0.0)
    tl.store(out + offs_n, total, mask=mask_n)
    if exponent is not None:
        # Every thread has read its factor before another thread overwrites the mantissa.
        tl.debug_barrier()
        _divide(exponent, mantissa, offs_n, total, mask_n)


@triton.jit
def _divide(exponent, mantissa, offs, divisor, mask):
    """potential_j <- potential_j / divisor_j; kept where divisor_j is 0, NaN where it is NaN."""
    power, new_mantissa = split(tl.load(mantissa + offs, mask=mask, other=1.0) / tl.where(divisor > 0.0, divisor, 1.0))
    new_mantissa = tl.where(divisor > 0.0, new_mantissa, divisor)  # NaN
    tl.store(mantissa + offs, new_mantissa, mask=mask & (divisor != 0.0))
    tl.store(exponent + offs, tl.load(exponent + offs, mask=mask, other=0.0) + power, mask=mask & (divisor > 0.0))


@triton.jit
def _store_reciprocal(exponent, mantissa, offs, shift, total, mask):
    """Store 1 / (total * 2^shift); 1 for a column with no unmasked entry."""
    power, inverse = reciprocal(-shift, total)
    tl.store(exponent + offs, power, mask=mask)
    tl.store(mantissa + offs, tl.where(total == 0.0, 1.0, inverse), mask=mask)


@triton.jit
def reciprocal_potential_kernel(shift, sums, exponent, mantissa, n, BLOCK: tl.constexpr):
    """exponent_j, mantissa_j of 1 / (sums_j * 2^shift_j), all (n,); 1 for a column with no unmasked entry."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    total = tl.load(sums + offs, mask=mask, other=1.0)
    _store_reciprocal(exponent, mantissa, offs, tl.load(shift + offs, mask=mask, other=0.0), total, mask)


@triton.jit
def column_totals_kernel(shift, sums, common, total, n, BLOCK: tl.constexpr):
    """total_j = sums_j * 2^(shift_j - common), all (n,), total float64; powers below float64's are its least."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    power = tl.load(shift + offs, mask=mask, other=0.0) - common
    bits = tl.minimum(tl.maximum(power, -1022.0), 1023.0).to(tl.int64) + 1023
    part = tl.load(sums + offs, mask=mask, other=0.0).to(tl.float64)
    tl.store(total + offs, part * (bits << 52).to(tl.float64, bitcast=True), mask=mask)


@triton.jit
def total_potential_kernel(total, common, exponent, mantissa, n, BLOCK: tl.constexpr):
    """exponent_j, mantissa_j of 1 / (total_j * 2^common), all (n,), total float64; 1 for a column of total 0."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(total + offs, mask=mask, other=1.0)
    bits = x.to(tl.int64, bitcast=True)
    power = ((bits >> 52) & 2047) - 1022
    part = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)  # in [1/2, 1)
    part = tl.where(x > 0.0, part, x).to(tl.float32)
    _store_reciprocal(exponent, mantissa, offs, power.to(tl.float32) + common, part, mask)


@triton.jit
def divide_potential_kernel(exponent, mantissa, c, n, BLOCK: tl.constexpr):
    """potential_j <- potential_j / c_j, all (n,); a potential is kept if c_j = 0 and becomes NaN if c_j is NaN."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    _divide(exponent, mantissa, offs, tl.load(c + offs, mask=mask, other=1.0), mask)


@triton.jit(do_not_specialize=["m", "rows"])
def sinkhorn_pass_kernel(
    s,
    row_exponent,
    row_mantissa,
    col_exponent,
    col_mantissa,
    partial,
    scale,
    scale_pointer,
    m,
    n,
    stride,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """row_i = 1 / Σ_j 2^(scale*s_ij) col_j, and per chunk Σ_i 2^(scale*s_ij) row_i * col.exponent_j, in one read.

    Shapes: s (m, n) float32 or int16, n <= BLOCK_N; row potential (m,) in and out, its exponent on entry a guess of the
    result: a bad guess costs time, never accuracy; col potential (n,) -> partial (chunks, n), a chunk of `rows` rows,
    a multiple of BLOCK_M. The column sums lack the factor col.mantissa_j, which the sum over chunks puts in.
    Numerics: every term is at most 1, so column sums need no shift at any eps; a row with no key left gets an
    infinite potential and adds nothing.
    Cost: m*n score reads and exponentials.
    """
    chunk = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    scale = scale_of(scale, scale_pointer)
    col_e = tl.load(col_exponent + offs_n, mask=mask_n, other=0.0)
    col_m = tl.load(col_mantissa + offs_n, mask=mask_n, other=0.0)
    c = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, rows, BLOCK_M):
        offs_m = chunk * rows + first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        mask = mask_m[:, None] & mask_n[None, :]
        pointers = s + offs_m.to(tl.int64)[:, None] * stride + offs_n[None, :]
        exponent = tl.load(row_exponent + offs_m, mask=mask_m, other=0.0)
        e = tl.exp2(fma(load_scores(pointers, mask), scale, col_e[None, :] + exponent[:, None]))
        total = tl.sum(e * col_m[None, :], axis=1)
        if tl.max((mask_m & is_poor(total)).to(tl.int32), axis=0) > 0:
            exponent = exponent_of(tl.max(fma(load_scores(pointers, mask), scale, col_e[None, :]), axis=1))
            e = tl.exp2(fma(load_scores(pointers, mask), scale, col_e[None, :] + exponent[:, None]))
            total = tl.sum(e * col_m[None, :], axis=1)
        c += tl.sum(e * inverse_or_zero(total)[:, None], axis=0)
        exponent, mantissa = reciprocal(exponent, total)
        tl.store(row_exponent + offs_m, exponent, mask=mask_m)
        tl.store(row_mantissa + offs_m, mantissa, mask=mask_m)
    tl.store(partial + chunk.to(tl.int64) * n + offs_n, c, mask=mask_n)


@triton.jit
def row_step_kernel(
    s,
    row_exponent,
    row_mantissa,
    col_exponent,
    col_mantissa,
    scale,
    scale_pointer,
    n,
    stride,
    BLOCK_N: tl.constexpr,
):
    """row_i = 1 / Σ_j 2^(scale*s_ij) col_j of rows too long for the chip: one program per row.

    Shapes: s (m, n) float32 or int16, row potential (m,) in and out, its exponent on entry a guess; col potential (n,).
    Special cases as in sinkhorn_pass_kernel.
    """
    i = tl.program_id(0).to(tl.int64)
    scale = scale_of(scale, scale_pointer)
    exponent = tl.load(row_exponent + i)
    total = _row_total(s + i * stride, col_exponent, col_mantissa, scale, exponent, n, BLOCK_N)
    if is_poor(total):
        offs = tl.arange(0, BLOCK_N)
        most = tl.full([BLOCK_N], MASKED * 1.0, tl.float32)
        for first in range(0, n, BLOCK_N):
            mask = first + offs < n
            col_e = tl.load(col_exponent + first + offs, mask=mask, other=0.0)
            most = tl.maximum(most, fma(load_scores(s + i * stride + first + offs, mask), scale, col_e))
        exponent = exponent_of(tl.max(most, axis=0))
        total = _row_total(s + i * stride, col_exponent, col_mantissa, scale, exponent, n, BLOCK_N)
    exponent, mantissa = reciprocal(exponent, total)
    tl.store(row_exponent + i, exponent)
    tl.store(row_mantissa + i, mantissa)


@triton.jit
def _row_total(row, col_exponent, col_mantissa, scale, exponent, n, BLOCK_N: tl.constexpr):
    """Σ_j 2^(scale*s_j + exponent) col_j of one row."""
    offs = tl.arange(0, BLOCK_N)
    totals = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, n, BLOCK_N):
        mask = first + offs < n
        col_e = tl.load(col_exponent + first + offs, mask=mask, other=0.0)
        col_m = tl.load(col_mantissa + first + offs, mask=mask, other=0.0)
        totals += tl.exp2(fma(load_scores(row + first + offs, mask), scale, col_e + exponent)) * col_m
    return tl.sum(totals, axis=0)
