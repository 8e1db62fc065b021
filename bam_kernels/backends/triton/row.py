"""Functions for scores, exponentials and potentials, used by all Triton kernels.

Scores are float32 or int16; a masked score is MASKED or MASKED_FIXED. Exponentials are of base 2. A potential is
2^exponent * mantissa, the exponent an integer stored as float32: fma(score, scale, exponent) then rounds once, at the
size of its result. csrc/cpu/row.h has these functions in C++.
"""

import triton
import triton.language as tl

# The interpreter of Triton 3.6 computes tl.fma in two roundings.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

MASKED = tl.constexpr(-1e30)  # finite, so that 0 * score is 0; its exponential is exactly 0
MASKED_FIXED = tl.constexpr(-32768)
EMPTY = tl.constexpr(-1e20)  # if the largest exponent is below this, all scores are masked
NO_SHIFT = tl.constexpr(-16777216.0)  # the shift of an empty column
LEAST_NORMAL = tl.constexpr(2.0**-126)
LN_2 = tl.constexpr(0.6931471805599453)
# A row sum outside these bounds was computed with a poor exponent.
LEAST_SUM = tl.constexpr(2.0**-20)
MOST_SUM = tl.constexpr(2.0**20)


@triton.jit
def fma(a, b, c):
    """a*b + c, rounded once."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def scale_of(scale, scale_pointer):
    """A scale or step of scores: an argument, times a device scalar if there is one."""
    scale = tl.full([], scale, tl.float32)
    if scale_pointer is None:
        return scale
    else:
        return scale * tl.load(scale_pointer)


@triton.jit
def load_scores(pointers, mask):
    """Load scores as float32; masked scores, and scores outside `mask`, become MASKED."""
    if pointers.dtype.element_ty == tl.int16:
        # Not `other=MASKED_FIXED`: Triton (3.6 to 3.8) widens a negative constant of 16 bits to 32 with ones, so that
        # every other score outside `mask` would be -1 where rows are aligned.
        q = tl.load(pointers, mask=mask, other=0)
        return tl.where(mask & (q != MASKED_FIXED), q.to(tl.float32), MASKED)
    else:
        return tl.load(pointers, mask=mask, other=MASKED)


@triton.jit
def is_poor(total):
    """Whether a row sum is NaN or was computed with a poor exponent."""
    return ~((total > LEAST_SUM) & (total < MOST_SUM))


@triton.jit
def exponent_of(most):
    """The exponent that brings the largest term of a row, 2^most, to about 1; 0 for a row with no key left."""
    return tl.where(most < EMPTY, 0.0, -tl.ceil(most))


@triton.jit
def split(x):
    """Split a normal positive x into (power, mantissa): x = 2^power * mantissa, mantissa in [1/2, 1)."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    return (((bits >> 23) & 255) - 126).to(tl.float32), mantissa


@triton.jit
def reciprocal(exponent, total):
    """2^exponent / total as a potential with mantissa in (1, 2]; infinite where total is 0, NaN where it is NaN."""
    power, mantissa = split(total)
    exponent = tl.where(total > 0.0, exponent - power, 0.0)
    return exponent, tl.where(total > 0.0, 1.0 / mantissa, tl.where(total == 0.0, float("inf"), total))


@triton.jit
def inverse_or_zero(total):
    """1 / total, 0 where total is 0."""
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def entropy(total, dot):
    """Entropy in nats of p_j = e_j / total, from total = Σ e_j and dot = Σ e_j log2(e_j); 0 where total is 0."""
    safe = tl.where(total == 0.0, 1.0, total)
    return (tl.log2(safe) - dot / safe) * LN_2
