"""Kernels for Sinkhorn steps that multiply, mask, exponentiate and sum scores x wᵀ in registers.

Each row of x (m, D) gets one sum over the rows of w (n, D): x are rows and w keys, or x keys and w rows. A program owns
some rows of x and reads one chunk of w, so no two programs write to the same address; a second kernel adds the partial
sums of chunks in order.
"""

import triton
import triton.language as tl

from .flash_tiles import features, key_bias, load_potential, scores
from .row import MASKED, NO_SHIFT, fma
from .scores import key_image


@triton.jit
def _images(offs_m, offs_n, B, T, own_columns, X_ARE_KEYS: tl.constexpr):
    if X_ARE_KEYS:
        return key_image(offs_m, B, T, own_columns), offs_n % B
    else:
        return offs_m % B, key_image(offs_n, B, T, own_columns)


@triton.jit(do_not_specialize=["m", "n", "chunk_rows", "B", "T", "own_columns"])
def flash_lse_kernel(
    x,
    w,
    bias,
    w_exponent,
    w_mantissa,
    shift,
    sums,
    scale,
    m,
    n,
    chunk_rows,
    B,
    T,
    own_columns,
    stride_x,
    stride_w,
    X_ARE_KEYS: tl.constexpr,
    MASK_POSITIVES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Per chunk Σ_j 2^(scale * s_ij) w_potential_j = sums_i * 2^shift_i, over all w_j that show another image than x_i.

    s_ij = x_i·w_j + bias of the key, which is x_i or w_j.
    Shapes: x (m, D), w (n, D), bias (keys,) or None: 0, potential of w (n,) or None: 1 -> shift, sums (chunks, m).
    If x are keys this is the column step; if x are rows, the row step; without potential, the logsumexp of the source.
    Numerics: shift is an integer at or above the largest term's logarithm; a row without terms has sum 0.
    Cost: 2*m*n*D flop, m*n exponentials.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1)
    mask_m = offs_m < m
    scale = tl.full([], scale, tl.float32)
    x_first = features(x, offs_m, mask_m, 0, stride_x, D, BLOCK_D)
    if X_ARE_KEYS:
        bias_m = key_bias(bias, offs_m, mask_m)
    most = tl.full([BLOCK_M], NO_SHIFT, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, n), BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        w_first = features(w, offs_n, mask_n, 0, stride_w, D, BLOCK_D)
        image_m, image_n = _images(offs_m, offs_n, B, T, own_columns, X_ARE_KEYS)
        s = scores(
            x_first,
            x,
            offs_m,
            mask_m,
            image_m,
            stride_x,
            w_first,
            w,
            offs_n,
            mask_n,
            image_n,
            stride_w,
            D,
            MASK_POSITIVES,
            BLOCK_D,
            PRECISION,
        )
        if X_ARE_KEYS:
            s += bias_m[:, None]
        else:
            s += key_bias(bias, offs_n, mask_n)[None, :]
        exponent, mantissa = load_potential(w_exponent, w_mantissa, offs_n, mask_n)
        fresh = tl.maximum(most, tl.ceil(tl.max(fma(s, scale, exponent[None, :]), axis=1)))
        e = tl.exp2(fma(s, scale, exponent[None, :] - fresh[:, None])) * mantissa[None, :]
        total = total * tl.exp2(most - fresh) + tl.sum(e, axis=1)
        most = fresh
    at = chunk.to(tl.int64) * m + offs_m
    tl.store(shift + at, most, mask=mask_m)
    tl.store(sums + at, total, mask=mask_m)


@triton.jit(do_not_specialize=["m", "n", "chunk_rows", "B", "T", "own_columns"])
def flash_column_sums_kernel(
    k,
    x,
    bias,
    col_exponent,
    row_exponent,
    row_mantissa,
    partial,
    scale,
    m,
    n,
    chunk_rows,
    B,
    T,
    own_columns,
    stride_k,
    stride_x,
    MASK_POSITIVES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Per chunk of rows and key Σ_i P_ij, P_ij = 2^(scale * s_ij) row_i col_j, without the factor col.mantissa_j.

    s_ij = x_i·k_j + bias_j.
    Shapes: k (m, D), bias (m,) or None: 0, col potential (m,), x (n, D), row potential (n,) -> partial (chunks, m); the
    sum over chunks puts the factor in. Rows of P sum to one, so every term is at most 1 and no shift is needed at any
    eps.
    Cost: 2*m*n*D flop, m*n exponentials.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1)
    mask_m = offs_m < m
    scale = tl.full([], scale, tl.float32)
    k_first = features(k, offs_m, mask_m, 0, stride_k, D, BLOCK_D)
    col_e = tl.load(col_exponent + offs_m, mask=mask_m, other=MASKED)
    bias_m = key_bias(bias, offs_m, mask_m)
    c = tl.zeros([BLOCK_M], tl.float32)
    for first in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, n), BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        x_first = features(x, offs_n, mask_n, 0, stride_x, D, BLOCK_D)
        image_m, image_n = _images(offs_m, offs_n, B, T, own_columns, True)
        s = scores(
            k_first,
            k,
            offs_m,
            mask_m,
            image_m,
            stride_k,
            x_first,
            x,
            offs_n,
            mask_n,
            image_n,
            stride_x,
            D,
            MASK_POSITIVES,
            BLOCK_D,
            PRECISION,
        )
        s += bias_m[:, None]
        exponent, mantissa = load_potential(row_exponent, row_mantissa, offs_n, mask_n)
        e = tl.exp2(fma(s, scale, exponent[None, :] + col_e[:, None])) * mantissa[None, :]
        c += tl.sum(e, axis=1)
    tl.store(partial + chunk.to(tl.int64) * m + offs_m, c, mask=mask_m)
