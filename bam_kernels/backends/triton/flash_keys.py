"""Kernel for dk = Gᵀ z if keys are source rows: key tiles loop over rows of G, computed from recomputed scores."""

import triton
import triton.language as tl

from .flash_match import GRADIENT_FACTOR, plan
from .flash_tiles import dot, features, key_bias, load_potential, scores
from .match import terms_of
from .row import fma
from .scores import key_image


@triton.jit(do_not_specialize=["L", "V", "n", "chunk_images", "B", "T", "own_columns"])
def flash_dk_kernel(
    z,
    w,
    k,
    bias,
    target_exponent,
    target_mantissa,
    source_exponent,
    source_mantissa,
    col_exponent,
    col_mantissa,
    dk,
    partial,
    target_scale,
    source_scale,
    gradient_scale,
    sum_scale,
    pair_weight,
    L,
    V,
    n,
    chunk_images,
    B,
    T,
    own_columns,
    stride_z,
    stride_w,
    stride_k,
    MASK_POSITIVES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Per chunk of images Σ_i G_ij w_i and Σ_i G_ij, for BLOCK_M keys j and BLOCK_OUT features.

    G as in flash_match_kernel. Shapes: z (V*B, D), whose first L*B rows are also the target rows; w (V*B, D): the rows
    to be summed, z or z minus a common vector (the caller adds Σ_i G_ij times the vector); k (n, D), bias and
    potentials as in flash_match_kernel -> dk (chunks, n, D) times gradient_scale * B tau, partial (chunks, n) times
    sum_scale * B tau.
    Numerics: Pbar_v is Σ_t P_t less P_v for v < L, exact to float32's rounding of the sum.
    Cost: L + V score products of an image's views (again for every BLOCK_OUT features), V products with w.
    """
    SLICES: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    first_d = tl.program_id(0) % SLICES * BLOCK_OUT
    offs_j = tl.program_id(0) // SLICES * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1)
    mask_j = offs_j < n
    image_j = key_image(offs_j, B, T, own_columns)
    target_scale, source_scale = tl.full([], target_scale, tl.float32), tl.full([], source_scale, tl.float32)
    k_first = features(k, offs_j, mask_j, 0, stride_k, D, BLOCK_D)
    col_e, col_m = load_potential(col_exponent, col_mantissa, offs_j, mask_j)
    key_e, _one = load_potential(None, None, offs_j, mask_j)
    bias_j = key_bias(bias, offs_j, mask_j)
    acc = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(chunk * chunk_images, tl.minimum((chunk + 1) * chunk_images, B), BLOCK_N):
        offs_i = first + tl.arange(0, BLOCK_N)
        mask_i = offs_i < B
        all_targets = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(L + V):
            # First the sum of all targets, then G for every view.
            v = tl.where(step < L, step, step - L)
            rows = v * B + offs_i
            z_first = features(z, rows, mask_i, 0, stride_z, D, BLOCK_D)
            s = scores(
                k_first,
                k,
                offs_j,
                mask_j,
                image_j,
                stride_k,
                z_first,
                z,
                rows,
                mask_i,
                offs_i,
                stride_z,
                D,
                MASK_POSITIVES,
                BLOCK_D,
                PRECISION,
            )
            s += bias_j[:, None]
            # Views that give no target have no target potential: their P is 0.
            is_target = mask_i & (rows < L * B)
            row_e, row_m = load_potential(target_exponent, target_mantissa, rows, is_target)
            p, _log2_p = plan(s, target_scale, col_e, col_m, row_e, row_m)
            if step < L:
                all_targets += p
            else:
                pbar = all_targets - p if V > 1 else all_targets
                source_e, source_m = load_potential(source_exponent, source_mantissa, rows, mask_i)
                e = tl.exp2(fma(s, source_scale, key_e[:, None] + source_e[None, :]))
                g = e * (source_m * (terms_of(v, L, V) * pair_weight))[None, :] - pbar * pair_weight
                total += tl.sum(g, axis=1)
                w_rows = features(w, rows, mask_i, first_d, stride_w, D, BLOCK_OUT)
                acc = dot((g * GRADIENT_FACTOR).to(w_rows.dtype), w_rows, acc, PRECISION)
    offs_d = first_d + tl.arange(0, BLOCK_OUT)
    at = dk + (chunk.to(tl.int64) * n + offs_j)[:, None] * D + offs_d[None, :]
    tl.store(at, acc * (gradient_scale / GRADIENT_FACTOR), mask=mask_j[:, None] & (offs_d < D)[None, :])
    tl.store(partial + chunk.to(tl.int64) * n + offs_j, total * sum_scale, mask=mask_j)
