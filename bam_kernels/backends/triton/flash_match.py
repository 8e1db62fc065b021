"""Kernels for targets, loss, entropies and dz = G k of source rows; G is computed tile by tile from scores made again.

G_v = (a_v A_v - Pbar_v) / (B tau) with Pbar_v = Σ_{t != v} P_t / (L (V-1)) and a_v the row sum of Pbar_v; for V = 1,
Pbar_0 = P_0. The difference is taken before rounding to the product's type, because near collapse A and Pbar are close.
Potentials of target rows, source rows and keys are inputs, so no maximum is searched for here.
"""

import triton
import triton.language as tl

from .flash_tiles import dot, features, key_bias, load_potential, scores
from .match import terms_of
from .row import fma
from .scores import key_image

# Factor of a A - Pbar, which is within [-1, 1]: keeps small entries within the normal numbers of fp16.
GRADIENT_FACTOR = tl.constexpr(16384.0)


@triton.jit
def plan(s, scale, exponent_a, mantissa_a, exponent_b, mantissa_b):
    """(p, log2 p), p_ab = 2^(scale*s_ab) potential_a potential_b; p is 0 where s is masked.

    The logarithm is rounded to float32, and once more for the mantissas.
    """
    x = fma(s, scale, exponent_a[:, None] + exponent_b[None, :])
    x += tl.log2(mantissa_a)[:, None] + tl.log2(mantissa_b)[None, :]
    return tl.exp2(x), x


@triton.jit(do_not_specialize=["L", "V", "n", "chunk_keys", "B", "T", "own_columns"])
def flash_match_kernel(
    z,
    y,
    k,
    bias,
    target_exponent,
    target_mantissa,
    source_exponent,
    source_mantissa,
    col_exponent,
    col_mantissa,
    sums,
    dz,
    target_scale,
    source_scale,
    gradient_scale,
    pair_weight,
    L,
    V,
    n,
    chunk_keys,
    B,
    T,
    own_columns,
    stride_z,
    stride_y,
    stride_k,
    MASK_POSITIVES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per BLOCK_M images of one source view, chunk of keys and BLOCK_OUT features of dz.

    Shapes: z (V*B, D), y (>= L*B, D): the targets' rows, which may be z; k (n, D), bias of its scores (n,) or None: 0;
    target potential (>= L*B,) and source potential (V*B,), both after the last row step; col potential (n,) -> sums
    (chunks, 3, V*B) float32: <Pbar_i, s_i> and <A_i, s_i> of every source row, and Σ_j P_tj log2(P_tj) of the target
    rows whose first match is this source view; dz (chunks, V*B, D) float32 or None, times gradient_scale * B tau.
    Cost: a score product for the row and each of its targets (again for every BLOCK_OUT features), one product with k;
    an exponential for each score.
    """
    v, chunk = tl.program_id(1), tl.program_id(2)
    SLICES: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    first_d = tl.program_id(0) % SLICES * BLOCK_OUT
    offs_i = tl.program_id(0) // SLICES * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_i = offs_i < B
    rows = v * B + offs_i
    target_scale, source_scale = tl.full([], target_scale, tl.float32), tl.full([], source_scale, tl.float32)
    terms = tl.where((v < L) & (V > 1), L - 1, L)
    source_e, source_m = load_potential(source_exponent, source_mantissa, rows, mask_i)
    source_weight = source_m * (terms_of(v, L, V) * pair_weight)
    z_first = features(z, rows, mask_i, 0, stride_z, D, BLOCK_D)
    matched = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M], tl.float32)
    informed = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    for first in range(chunk * chunk_keys, tl.minimum((chunk + 1) * chunk_keys, n), BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        image_n = key_image(offs_n, B, T, own_columns)
        k_first = features(k, offs_n, mask_n, 0, stride_k, D, BLOCK_D)
        col_e, col_m = load_potential(col_exponent, col_mantissa, offs_n, mask_n)
        pbar = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for term in range(terms):
            t = term + tl.where((term >= v) & (V > 1), 1, 0)
            target = t * B + offs_i
            y_first = features(y, target, mask_i, 0, stride_y, D, BLOCK_D)
            s = scores(
                y_first,
                y,
                target,
                mask_i,
                offs_i,
                stride_y,
                k_first,
                k,
                offs_n,
                mask_n,
                image_n,
                stride_k,
                D,
                MASK_POSITIVES,
                BLOCK_D,
                PRECISION,
            )
            s += key_bias(bias, offs_n, mask_n)[None, :]
            row_e, row_m = load_potential(target_exponent, target_mantissa, target, mask_i)
            p, log2_p = plan(s, target_scale, row_e, row_m, col_e, col_m)
            pbar += p
            if v == (t + 1) % V:
                informed += tl.sum(p * log2_p, axis=1)
        s = scores(
            z_first,
            z,
            rows,
            mask_i,
            offs_i,
            stride_z,
            k_first,
            k,
            offs_n,
            mask_n,
            image_n,
            stride_k,
            D,
            MASK_POSITIVES,
            BLOCK_D,
            PRECISION,
        )
        s += key_bias(bias, offs_n, mask_n)[None, :]
        key_e, _one = load_potential(None, None, offs_n, mask_n)
        e = tl.exp2(fma(s, source_scale, source_e[:, None] + key_e[None, :]))
        matched += tl.sum(pbar * s, axis=1)
        attended += tl.sum(e * s, axis=1)
        if dz is not None:
            g = ((e * source_weight[:, None] - pbar * pair_weight) * GRADIENT_FACTOR).to(k_first.dtype)
            if D <= BLOCK_D:
                acc = dot(g, k_first, acc, PRECISION)
            else:
                acc = dot(g, features(k, offs_n, mask_n, first_d, stride_k, D, BLOCK_OUT), acc, PRECISION)
    M = V * B
    at = sums + chunk * 3 * M + rows
    tl.store(at, matched * pair_weight, mask=mask_i)
    tl.store(at + M, attended * source_m, mask=mask_i)
    tl.store(at + 2 * M, informed, mask=mask_i)
    if dz is not None:
        offs_d = first_d + tl.arange(0, BLOCK_OUT)
        at = dz + (chunk.to(tl.int64) * M + rows)[:, None] * D + offs_d[None, :]
        tl.store(at, acc * (gradient_scale / GRADIENT_FACTOR), mask=mask_i[:, None] & (offs_d < D)[None, :])


@triton.jit(do_not_specialize=["m", "n", "B", "T", "own_columns"])
def flash_targets_kernel(
    y,
    k,
    bias,
    target_exponent,
    target_mantissa,
    col_exponent,
    col_mantissa,
    targets,
    scale,
    m,
    n,
    B,
    T,
    own_columns,
    stride_y,
    stride_k,
    MASK_POSITIVES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P_ij = 2^(scale * (y_i·k_j + bias_j)) row_i col_j, 0 for positives; one program per tile.

    Shapes: y (m, D), row potential (m,), k (n, D), bias (n,) or None: 0, col potential (n,) -> targets (m, n) float32
    contiguous.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < m, offs_n < n
    y_first = features(y, offs_m, mask_m, 0, stride_y, D, BLOCK_D)
    k_first = features(k, offs_n, mask_n, 0, stride_k, D, BLOCK_D)
    image_n = key_image(offs_n, B, T, own_columns)
    s = scores(
        y_first,
        y,
        offs_m,
        mask_m,
        offs_m % B,
        stride_y,
        k_first,
        k,
        offs_n,
        mask_n,
        image_n,
        stride_k,
        D,
        MASK_POSITIVES,
        BLOCK_D,
        PRECISION,
    )
    s += key_bias(bias, offs_n, mask_n)[None, :]
    row_e, row_m = load_potential(target_exponent, target_mantissa, offs_m, mask_m)
    col_e, col_m = load_potential(col_exponent, col_mantissa, offs_n, mask_n)
    p, _log2_p = plan(s, tl.full([], scale, tl.float32), row_e, row_m, col_e, col_m)
    at = targets + offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
    tl.store(at, p, mask=mask_m[:, None] & mask_n[None, :])
