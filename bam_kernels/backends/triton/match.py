"""Kernel for the match of each image: targets P of its L rows; loss, entropies and gradient of its V source rows.

G_v = (a_v A_v - Pbar_v) / (B tau) with Pbar_v = Σ_{t != v} P_t / (L (V-1)) and a_v the row sum of Pbar_v; for V = 1,
Pbar_0 = P_0. An image's target rows and one source row are on chip, so that every score is read and exponentiated once;
match_long.py is for longer rows. Masked scores are finite and exponentiate to 0: they add nothing anywhere.
"""

import triton
import triton.language as tl

from .row import (
    LEAST_NORMAL,
    LN_2,
    entropy,
    exponent_of,
    fma,
    inverse_or_zero,
    is_poor,
    load_scores,
    reciprocal,
    scale_of,
)
from .top_k import kept, public_column, threshold


@triton.jit
def target_rows(pointers, mask, scale, col_e, col_m, exponent):
    """p_tj = 2^(scale*s_tj + col_e_j + exponent_t) * col_m_j, Σ_j p_tj and Σ_j p_tj log2(p_tj); (rows, columns)."""
    x = fma(load_scores(pointers, mask), scale, col_e[None, :] + exponent[:, None])
    p = tl.exp2(x) * col_m[None, :]
    return p, tl.sum(p, axis=1), tl.sum(p * tl.log2(tl.maximum(p, LEAST_NORMAL)), axis=1)


@triton.jit
def terms_of(v, L, V):
    """How many targets source view v is matched to; V = 1 implies L = 1."""
    return tl.where((v < L) & (V > 1), L - 1, L) * 1.0


@triton.jit(do_not_specialize=["L", "V", "b", "W", "T", "B", "top_k"])
def match_kernel(
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
    """One program per image i < b; n <= BLOCK_N, L <= BLOCK_L.

    Shapes: target (L, b, n) and source (V, b, n) or None float32 or int16, columns in gathered order;
    row_exponent (L, b): guesses of the targets' row potentials, which cost time where bad, never accuracy;
    col potential (n,) -> sums (3, b) float32: Σ_v a_v lse_v - <Pbar_v, s_v>/tau, Σ_t H(P_t), Σ_v H(A_v), natural
    logarithms, the first and the last 0 without a source; targets (L, b, n) float32 or None; row_out (b,), the
    potential of target view 0, or None; gradient (V, b, n) of any float type or None, which may be `source` (then
    `target` too), times gradient_scale * B * tau.
    Scales: log2(e)/eps, log2(e)/tau and 1/tau, each times `step`, a device scalar, where it is given; pair_weight is
    1/(L (V-1)), 1 where V = 1.
    TOP_K: the k columns of the largest mean over the targets, ties to the lower public column; P is renormalised from
    the scores, because the kept mass of a view may have underflowed.
    """
    i = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_l = tl.arange(0, BLOCK_L)
    mask_n, mask_l = offs_n < n, offs_l < L
    mask = mask_l[:, None] & mask_n[None, :]
    scale = scale_of(target_scale, step)
    col_e = tl.load(col_exponent + offs_n, mask=mask_n, other=0.0)
    col_m = tl.load(col_mantissa + offs_n, mask=mask_n, other=1.0)
    rows = target + offs_l.to(tl.int64)[:, None] * target_view_stride + i * target_row_stride + offs_n[None, :]

    exponent = tl.load(row_exponent + offs_l * row_view_stride + i, mask=mask_l, other=0.0)
    p, total, dot = target_rows(rows, mask, scale, col_e, col_m, exponent)
    if tl.max((mask_l & is_poor(total)).to(tl.int32), axis=0) > 0:
        exponent = exponent_of(tl.max(fma(load_scores(rows, mask), scale, col_e[None, :]), axis=1))
        p, total, dot = target_rows(rows, mask, scale, col_e, col_m, exponent)
    if row_out_exponent is not None:
        exponent, mantissa = reciprocal(exponent, total)
        tl.store(row_out_exponent + i + offs_l, exponent, mask=offs_l == 0)
        tl.store(row_out_mantissa + i + offs_l, mantissa, mask=offs_l == 0)
    p *= inverse_or_zero(total)[:, None]
    if TOP_K:
        bits = tl.where(mask_n, tl.sum(p, axis=0).to(tl.int32, bitcast=True), -1)
        public = public_column(offs_n, W, T, B)
        low, cut = threshold(bits, public, top_k, n)
        chosen = mask & kept(bits, public, low, cut)[None, :]
        exponent = exponent_of(tl.max(fma(load_scores(rows, chosen), scale, col_e[None, :]), axis=1))
        p, total, dot = target_rows(rows, chosen, scale, col_e, col_m, exponent)
        p *= inverse_or_zero(total)[:, None]
    tl.store(sums + b + i, tl.sum(entropy(total, dot), axis=0))
    # All target rows have been read, so outputs may overwrite them from here on.
    tl.debug_barrier()
    if targets is not None:
        at = targets + offs_l.to(tl.int64)[:, None] * targets_view_stride + i * n + offs_n[None, :]
        tl.store(at, p, mask=mask)
    if source is not None:
        source_scale = scale_of(source_scale, step)
        score_over_tau = scale_of(score_over_tau, step)
        exponent_v = tl.zeros([], tl.float32)
        lse = tl.zeros([], tl.float32)
        source_entropy = tl.zeros([], tl.float32)
        matched = tl.zeros([BLOCK_N], tl.float32)
        row = source + i * source_row_stride
        out = gradient + i * gradient_row_stride if gradient is not None else None
        for v in range(V):
            s = load_scores(row + offs_n, mask_n)
            e = tl.exp2(fma(s, source_scale, exponent_v))
            total_v = tl.sum(e, axis=0)
            if is_poor(total_v):
                exponent_v = exponent_of(tl.max(s * source_scale, axis=0))
                e = tl.exp2(fma(s, source_scale, exponent_v))
                total_v = tl.sum(e, axis=0)
            pbar = tl.sum(tl.where(((offs_l != v) | (V == 1))[:, None], p, 0.0), axis=0) * pair_weight
            a = terms_of(v, L, V) * pair_weight
            lse += a * LN_2 * (tl.log2(total_v) - exponent_v)
            source_entropy += entropy(total_v, tl.sum(e * s, axis=0) * source_scale + total_v * exponent_v)
            matched += pbar * s
            if gradient is not None:
                tl.store(out + offs_n, (e * (a / total_v) - pbar) * gradient_scale, mask=mask_n)
                out += gradient_view_stride
            row += source_view_stride
        tl.store(sums + i, lse - tl.sum(matched, axis=0) * score_over_tau)
        tl.store(sums + 2 * b + i, source_entropy)
    else:
        tl.store(sums + i, 0.0)
        tl.store(sums + 2 * b + i, 0.0)
