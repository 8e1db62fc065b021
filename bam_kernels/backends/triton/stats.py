"""Kernels for the loss and its statistics, at the end of a step; sums are float64, in a fixed order."""

import triton
import triton.language as tl

from .match import terms_of
from .row import LN_2


@triton.jit
def _sum(x, n, BLOCK: tl.constexpr):
    """Σ_i x_i of x (n,), in float64."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        total += tl.load(x + first + offs, mask=first + offs < n, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _sum_and_extremes(x, n, BLOCK: tl.constexpr):
    """(Σ_i x_i, min_i x_i, max_i x_i) of x (n,) float32, in float64; a NaN shows in the sum."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, n, BLOCK):
        mask = first + offs < n
        part = tl.load(x + first + offs, mask=mask, other=0.0)
        total += part.to(tl.float64)
        least = tl.minimum(least, tl.where(mask, part, float("inf")))
        most = tl.maximum(most, tl.where(mask, part, float("-inf")))
    return tl.sum(total, axis=0), tl.min(least, axis=0).to(tl.float64), tl.max(most, axis=0).to(tl.float64)


@triton.jit
def _zero_or_nan(x, n, BLOCK: tl.constexpr):
    """0 if all of x (n,) float64 are finite, else NaN."""
    offs = tl.arange(0, BLOCK)
    spoilt = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        spoilt += 0.0 * tl.load(x + first + offs, mask=first + offs < n, other=0.0)
    return tl.sum(spoilt, axis=0)


@triton.jit(do_not_specialize=["count", "n", "m", "B", "L", "V"])
def loss_and_stats_kernel(
    images,
    column_sums,
    norm,
    loss,
    stats,
    uniform_loss,
    uniform_loss_rest,
    count,
    n,
    m,
    B,
    L,
    V,
    BLOCK: tl.constexpr,
):
    """`loss_and_stats` of engine/sums.py, rounded to float32 at the end; one program.

    uniform_loss + uniform_loss_rest: the uniform loss in float64.
    Shapes: images (3, count) float32 or float64, column_sums (n,) float32, norm (m,) float64 or None -> loss (1,),
    stats (6,) float32.
    """
    spoilt = tl.zeros([], tl.float64)
    if norm is not None:
        spoilt += _zero_or_nan(norm, m, BLOCK)
    images_B = B.to(tl.float64)
    mean_loss = (_sum(images, count, BLOCK) + spoilt) / images_B
    target_entropy = (_sum(images + count, count, BLOCK) + spoilt) / (images_B * L)
    source_entropy = (_sum(images + 2 * count, count, BLOCK) + spoilt) / (images_B * V)
    total, least, most = _sum_and_extremes(column_sums, n, BLOCK)
    mean = total / n
    uniform = tl.full([], uniform_loss, tl.float32).to(tl.float64)
    uniform += tl.full([], uniform_loss_rest, tl.float32).to(tl.float64)
    tl.store(loss, mean_loss.to(tl.float32))
    tl.store(stats, target_entropy.to(tl.float32))
    tl.store(stats + 1, source_entropy.to(tl.float32))
    tl.store(stats + 2, (mean_loss - target_entropy).to(tl.float32))
    tl.store(stats + 3, tl.maximum(most / mean - 1.0, 1.0 - least / mean).to(tl.float32))
    tl.store(stats + 4, uniform.to(tl.float32))
    tl.store(stats + 5, (uniform - mean_loss).to(tl.float32))


@triton.jit(do_not_specialize=["chunks", "B", "L", "V"])
def flash_sums_kernel(
    sums,
    source_exponent,
    source_mantissa,
    images,
    pair_weight,
    score_over_tau,
    chunks,
    B,
    L,
    V,
    BLOCK: tl.constexpr,
):
    """Per block of source rows: terms of the loss, of the target entropy and of the source entropy, in nats.

    score_over_tau: 1/tau for products of rows and keys as `flash_match_kernel` multiplies them.
    Shapes: sums (chunks, 3, V*B) float32 of `flash_match_kernel`, source potential (V*B,) -> images (3, programs)
    float64.
    """
    M = V * B
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    mask = rows < M
    matched = tl.zeros([BLOCK], tl.float64)
    attended = tl.zeros([BLOCK], tl.float64)
    informed = tl.zeros([BLOCK], tl.float64)
    for chunk in range(chunks):
        at = sums + chunk * 3 * M + rows
        matched += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        attended += tl.load(at + M, mask=mask, other=0.0).to(tl.float64)
        informed += tl.load(at + 2 * M, mask=mask, other=0.0).to(tl.float64)
    exponent = tl.load(source_exponent + rows, mask=mask, other=0.0).to(tl.float64)
    mantissa = tl.load(source_mantissa + rows, mask=mask, other=1.0).to(tl.float64)
    lse = -(exponent + tl.log2(mantissa)) * LN_2
    over_tau = tl.full([], score_over_tau, tl.float32).to(tl.float64)
    weight = terms_of(rows // B, L, V) * tl.full([], pair_weight, tl.float32)
    programs = tl.num_programs(0)
    tl.store(images + block, tl.sum(weight.to(tl.float64) * lse - matched * over_tau, axis=0))
    tl.store(images + programs + block, tl.sum(informed, axis=0) * -LN_2)
    tl.store(images + 2 * programs + block, tl.sum(lse - attended * over_tau, axis=0))
