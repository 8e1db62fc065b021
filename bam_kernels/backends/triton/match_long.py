"""Kernel for the match of rows too long for the chip: one read per sum, then one read that writes P and G."""

import triton
import triton.language as tl

from .match import target_rows, terms_of
from .row import LN_2, MASKED, entropy, exponent_of, fma, inverse_or_zero, is_poor, load_scores, reciprocal, scale_of
from .top_k import kept, public_column, threshold_in_memory


@triton.jit
def _columns(col_exponent, col_mantissa, offs, n):
    """Load the column potential of the columns `offs` (1 beyond the row), and the mask of columns within the row."""
    mask = offs < n
    return tl.load(col_exponent + offs, mask=mask, other=0.0), tl.load(col_mantissa + offs, mask=mask, other=1.0), mask


@triton.jit
def _chosen(mean, offs, mask, low, cut, W, T, B, TOP_K: tl.constexpr):
    """Mask of the columns `offs` that are kept: all, or the top k by the means of targets in memory."""
    if TOP_K:
        bits = tl.load(mean + offs, mask=mask, other=-1.0).to(tl.int32, bitcast=True)
        return mask & kept(bits, public_column(offs, W, T, B), low, cut)
    else:
        return mask


@triton.jit
def _target_sums(
    rows, mask_l, col_exponent, col_mantissa, scale, exponent, mean, low, cut, n, W, T, B,
    TOP_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Σ_j p_tj and Σ_j p_tj log2(p_tj) over the kept columns; (BLOCK_L,)."""
    total, dot = tl.zeros([BLOCK_L], tl.float32), tl.zeros([BLOCK_L], tl.float32)
    for first in range(0, n, BLOCK_N):
        offs = first + tl.arange(0, BLOCK_N)
        col_e, col_m, mask = _columns(col_exponent, col_mantissa, offs, n)
        mask = mask_l[:, None] & _chosen(mean, offs, mask, low, cut, W, T, B, TOP_K)[None, :]
        _, part, part_dot = target_rows(rows + offs[None, :], mask, scale, col_e, col_m, exponent)
        total += part
        dot += part_dot
    return total, dot


@triton.jit
def _target_exponent(
    rows, mask_l, col_exponent, col_mantissa, scale, mean, low, cut, n, W, T, B,
    TOP_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The exponents that bring the largest kept term of each target row to about 1."""
    most = tl.full([BLOCK_L], MASKED * 1.0, tl.float32)
    for first in range(0, n, BLOCK_N):
        offs = first + tl.arange(0, BLOCK_N)
        col_e, _, mask = _columns(col_exponent, col_mantissa, offs, n)
        mask = mask_l[:, None] & _chosen(mean, offs, mask, low, cut, W, T, B, TOP_K)[None, :]
        most = tl.maximum(most, tl.max(fma(load_scores(rows + offs[None, :], mask), scale, col_e[None, :]), axis=1))
    return exponent_of(most)


@triton.jit
def _source_sums(row, scale, exponent, n, BLOCK_N: tl.constexpr):
    """Σ_j e_j and Σ_j e_j log2(e_j) with e_j = 2^(scale*s_j + exponent)."""
    totals, dots = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, n, BLOCK_N):
        offs = first + tl.arange(0, BLOCK_N)
        x = fma(load_scores(row + offs, offs < n), scale, exponent)
        e = tl.exp2(x)
        totals += e
        dots += e * x
    return tl.sum(totals, axis=0), tl.sum(dots, axis=0)


@triton.jit
def _source_exponent(row, scale, n, BLOCK_N: tl.constexpr):
    """The exponent that brings the largest e_j = 2^(scale*s_j + exponent) to about 1."""
    most = tl.full([BLOCK_N], MASKED * 1.0, tl.float32)
    for first in range(0, n, BLOCK_N):
        offs = first + tl.arange(0, BLOCK_N)
        most = tl.maximum(most, load_scores(row + offs, offs < n) * scale)
    return exponent_of(tl.max(most, axis=0))


@triton.jit(do_not_specialize=["L", "V", "b", "W", "T", "B", "top_k"])
def match_long_kernel(
    target,
    source,
    row_exponent,
    col_exponent,
    col_mantissa,
    sums,
    targets,
    row_out_exponent,
    row_out_mantissa,
    gradient,
    target_scale,
    source_scale,
    score_over_tau,
    gradient_scale,
    step,
    pair_weight,
    source_rows,
    means,
    L,
    V,
    b,
    n,
    W,
    T,
    B,
    top_k,
    target_view_stride,
    target_row_stride,
    source_view_stride,
    source_row_stride,
    row_view_stride,
    targets_view_stride,
    gradient_view_stride,
    gradient_row_stride,
    TOP_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`match_kernel` for n of any size, with two workspaces; one program per image.

    source_rows (b, V, 2) float32: exponent and a_v/total of the source rows. means (b, n) float32, with TOP_K only: the
    means of the target rows, written once so that all comparisons read equally rounded values.
    """
    i = tl.program_id(0).to(tl.int64)
    offs_l = tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    scale = scale_of(target_scale, step)
    rows = target + offs_l.to(tl.int64)[:, None] * target_view_stride + i * target_row_stride
    mean = means
    low, cut = tl.zeros([], tl.int32), tl.zeros([], tl.int32)

    exponent = tl.load(row_exponent + offs_l * row_view_stride + i, mask=mask_l, other=0.0)
    total, dot = _target_sums(
        rows, mask_l, col_exponent, col_mantissa, scale, exponent, mean, low, cut, n, W, T, B, False, BLOCK_L, BLOCK_N
    )
    if tl.max((mask_l & is_poor(total)).to(tl.int32), axis=0) > 0:
        exponent = _target_exponent(
            rows, mask_l, col_exponent, col_mantissa, scale, mean, low, cut, n, W, T, B, False, BLOCK_L, BLOCK_N
        )
        total, dot = _target_sums(
            rows,
            mask_l,
            col_exponent,
            col_mantissa,
            scale,
            exponent,
            mean,
            low,
            cut,
            n,
            W,
            T,
            B,
            False,
            BLOCK_L,
            BLOCK_N,
        )
    if row_out_exponent is not None:
        out_exponent, mantissa = reciprocal(exponent, total)
        tl.store(row_out_exponent + i + offs_l, out_exponent, mask=offs_l == 0)
        tl.store(row_out_mantissa + i + offs_l, mantissa, mask=offs_l == 0)
    if TOP_K:
        mean = means + i * n
        inverse = inverse_or_zero(total)[:, None]
        for first in range(0, n, BLOCK_N):
            offs = first + tl.arange(0, BLOCK_N)
            col_e, col_m, mask = _columns(col_exponent, col_mantissa, offs, n)
            both = mask_l[:, None] & mask[None, :]
            p, _, _ = target_rows(rows + offs[None, :], both, scale, col_e, col_m, exponent)
            tl.store(mean + offs, tl.sum(p * inverse, axis=0), mask=mask)
        tl.debug_barrier()
        low, cut = threshold_in_memory(mean, top_k, n, W, T, B, BLOCK_N)
        exponent = _target_exponent(
            rows, mask_l, col_exponent, col_mantissa, scale, mean, low, cut, n, W, T, B, True, BLOCK_L, BLOCK_N
        )
        total, dot = _target_sums(
            rows,
            mask_l,
            col_exponent,
            col_mantissa,
            scale,
            exponent,
            mean,
            low,
            cut,
            n,
            W,
            T,
            B,
            True,
            BLOCK_L,
            BLOCK_N,
        )
    tl.store(sums + b + i, tl.sum(entropy(total, dot), axis=0))

    source_scale = scale_of(source_scale, step)
    score_over_tau = scale_of(score_over_tau, step)
    if source is not None:
        exponent_v = tl.zeros([], tl.float32)
        lse = tl.zeros([], tl.float32)
        source_entropy = tl.zeros([], tl.float32)
        row = source + i * source_row_stride
        for v in range(V):
            total_v, dot_v = _source_sums(row, source_scale, exponent_v, n, BLOCK_N)
            if is_poor(total_v):
                exponent_v = _source_exponent(row, source_scale, n, BLOCK_N)
                total_v, dot_v = _source_sums(row, source_scale, exponent_v, n, BLOCK_N)
            a = terms_of(v, L, V) * pair_weight
            lse += a * LN_2 * (tl.log2(total_v) - exponent_v)
            source_entropy += entropy(total_v, dot_v)
            tl.store(source_rows + (i * V + v) * 2, exponent_v)
            tl.store(source_rows + (i * V + v) * 2 + 1, a / total_v)
            row += source_view_stride
        tl.store(sums + 2 * b + i, source_entropy)
        tl.debug_barrier()

    matched = tl.zeros([BLOCK_N], tl.float32)
    inverse = inverse_or_zero(total)[:, None]
    for first in range(0, n, BLOCK_N):
        offs = first + tl.arange(0, BLOCK_N)
        col_e, col_m, mask = _columns(col_exponent, col_mantissa, offs, n)
        both = mask_l[:, None] & _chosen(mean, offs, mask, low, cut, W, T, B, TOP_K)[None, :]
        p, _, _ = target_rows(rows + offs[None, :], both, scale, col_e, col_m, exponent)
        p *= inverse
        # The block's target scores have been read, so outputs may overwrite them.
        tl.debug_barrier()
        if targets is not None:
            at = targets + offs_l.to(tl.int64)[:, None] * targets_view_stride + i * n + offs[None, :]
            tl.store(at, p, mask=mask_l[:, None] & mask[None, :])
        if source is not None:
            row = source + i * source_row_stride
            out = gradient + i * gradient_row_stride if gradient is not None else None
            for v in range(V):
                pbar = tl.sum(tl.where(((offs_l != v) | (V == 1))[:, None], p, 0.0), axis=0) * pair_weight
                s = load_scores(row + offs, mask)
                matched += pbar * s
                if gradient is not None:
                    exponent_v = tl.load(source_rows + (i * V + v) * 2)
                    source_weight = tl.load(source_rows + (i * V + v) * 2 + 1)
                    g = (tl.exp2(fma(s, source_scale, exponent_v)) * source_weight - pbar) * gradient_scale
                    tl.store(out + offs, g, mask=mask)
                    out += gradient_view_stride
                row += source_view_stride
    if source is not None:
        tl.store(sums + i, tl.sum(matched, axis=0) * -score_over_tau + lse)
    else:
        tl.store(sums + i, 0.0)
        tl.store(sums + 2 * b + i, 0.0)
