"""Kernels for products with the plan E_ij = 2^(scale*s_ij) row_i col_j, and for G + Gᵀ.

m rows, n columns of scores; row and col are potentials (m,), (n,).
"""

import triton
import triton.language as tl

from .row import fma, load_scores, scale_of


@triton.jit
def row_products_kernel(
    s,
    row_exponent,
    row_mantissa,
    col_exponent,
    col_mantissa,
    v,
    y,
    scale,
    scale_pointer,
    n,
    stride,
    BLOCK_N: tl.constexpr,
):
    """y_i = Σ_j E_ij v_j; one program per row. Shapes: s (m, n) float32 or int16, v (n,) -> y (m,)."""
    i = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    scale = scale_of(scale, scale_pointer)
    exponent = tl.load(row_exponent + i)
    products = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, n, BLOCK_N):
        mask = first + offs < n
        col_e = tl.load(col_exponent + first + offs, mask=mask, other=0.0)
        weight = tl.load(col_mantissa + first + offs, mask=mask, other=0.0)
        weight = weight * tl.load(v + first + offs, mask=mask, other=0.0)
        products += tl.exp2(fma(load_scores(s + i * stride + first + offs, mask), scale, col_e + exponent)) * weight
    tl.store(y + i, tl.sum(products, axis=0) * tl.load(row_mantissa + i))


@triton.jit(do_not_specialize=["m", "rows"])
def column_products_kernel(
    s,
    row_exponent,
    row_mantissa,
    col_exponent,
    u,
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
    """Per chunk Σ_i E_ij u_i without the factor col.mantissa_j, which the sum over chunks puts in.

    Shapes: s (m, n) float32 or int16, u (m,) or None: 1 -> partial (chunks, n), a chunk of `rows` rows. A row with an
    infinite potential has no key left and adds nothing.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1)
    mask_n = offs_n < n
    scale = scale_of(scale, scale_pointer)
    col_e = tl.load(col_exponent + offs_n, mask=mask_n, other=0.0)[None, :]
    w = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, rows, BLOCK_M):
        offs_m = chunk * rows + first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        x = load_scores(s + offs_m.to(tl.int64)[:, None] * stride + offs_n[None, :], mask_m[:, None] & mask_n[None, :])
        exponent = tl.load(row_exponent + offs_m, mask=mask_m, other=0.0)[:, None]
        weight = tl.load(row_mantissa + offs_m, mask=mask_m, other=0.0)
        weight = tl.where(weight == float("inf"), 0.0, weight)
        if u is not None:
            weight = weight * tl.load(u + offs_m, mask=mask_m, other=0.0)
        w += tl.sum(tl.exp2(fma(x, scale, col_e + exponent)) * weight[:, None], axis=0)
    tl.store(partial + chunk.to(tl.int64) * n + offs_n, w, mask=mask_n)


@triton.jit
def plan_subtract_kernel(
    x,
    s,
    row_exponent,
    row_mantissa,
    col_exponent,
    col_mantissa,
    u,
    v,
    scale,
    scale_pointer,
    n,
    stride,
    stride_x,
    BLOCK_N: tl.constexpr,
):
    """x_ij <- x_ij - E_ij (u_i + v_j). Shapes: x (m, n) float32, s (m, n), u (m,) or None: 0, v (n,) or None: 0."""
    i = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < n
    factor = tl.zeros([BLOCK_N], tl.float32)
    if u is not None:
        factor += tl.load(u + i)
    if v is not None:
        factor += tl.load(v + offs, mask=mask, other=0.0)
    exponent = tl.load(col_exponent + offs, mask=mask, other=0.0) + tl.load(row_exponent + i)
    weight = tl.load(col_mantissa + offs, mask=mask, other=0.0) * tl.load(row_mantissa + i)
    e = tl.exp2(fma(load_scores(s + i * stride + offs, mask), scale_of(scale, scale_pointer), exponent)) * weight
    at = x + i * stride_x + offs
    tl.store(at, tl.load(at, mask=mask, other=0.0) - e * factor, mask=mask)


@triton.jit
def symmetrize_kernel(G, partial, m, stride, TILE: tl.constexpr):
    """G <- G + Gᵀ, two tiles (I, J) and (J, I) a program, and partial[J, i] = Σ_{j in tile J} G_ji, before.

    Shapes: G (m, m) float32 or fp16, partial (ceil(m / TILE), m); the grid is all pairs of tiles.
    """
    I, J = tl.program_id(0), tl.program_id(1)
    if I <= J:
        offs_i, offs_j = I * TILE + tl.arange(0, TILE), J * TILE + tl.arange(0, TILE)
        upper = G + offs_i.to(tl.int64)[:, None] * stride + offs_j[None, :]
        lower = G + offs_j.to(tl.int64)[:, None] * stride + offs_i[None, :]
        mask_upper = (offs_i < m)[:, None] & (offs_j < m)[None, :]
        mask_lower = (offs_j < m)[:, None] & (offs_i < m)[None, :]
        a = tl.load(upper, mask=mask_upper, other=0.0).to(tl.float32)
        b = tl.load(lower, mask=mask_lower, other=0.0).to(tl.float32)
        total = a + tl.trans(b)
        # The diagonal tile is read in both orders before it is written.
        tl.debug_barrier()
        tl.store(upper, total, mask=mask_upper)
        tl.store(lower, tl.trans(total), mask=mask_lower)
        tl.store(partial + J.to(tl.int64) * m + offs_i, tl.sum(b, axis=0), mask=offs_i < m)
        tl.store(partial + I.to(tl.int64) * m + offs_j, tl.sum(a, axis=0), mask=offs_j < m)
