// What every Sinkhorn kernel does with one row of scores.
#pragma once

#include <math.h>

#include "simd.h"

namespace bam::cpu::BAM_ISA {

// A row sum outside these bounds was taken with a poor exponent: exponents are rounded at their size, and terms below
// 2^-127 are lost.
constexpr float kLeastSum = 0x1p-20f, kMostSum = 0x1p20f;

// A largest exponent below this comes from masked scores alone.
constexpr float kEmpty = -1e20f;

// The exponent that brings the largest term of the row to about 1, 0 for a row with no key left; `exponent` null: 0
// for every column.
template <class Score>
static __attribute__((noinline)) float exponent_of_max(const Score* s, int64_t n, float scale, const float* exponent) {
  vfloat most = splat(-INFINITY);
  for_columns(n, [&](int64_t j, auto part) {
    const vfloat e = exponent ? load(exponent + j, part) : splat(0.0f);
    most = max(most, fma(load_scores(s + j, part), splat(scale), e));
  });
  const float largest = max(most);
  return largest < kEmpty ? 0.0f : -ceilf(largest);
}

// scale*s_j + col_exponent + exponent of a single column, rounded as the vector loops round it.
template <class Score>
BAM_INLINE float exact_exponent(const Score* s, int64_t j, float scale, float col_exponent, float exponent) {
  return fma(load_scores(s + j, Tail{1}), splat(scale), splat(col_exponent + exponent))[0];
}

BAM_INLINE bool is_good_sum(double total) {
  return total > kLeastSum && total < kMostSum;
}

// e_j = 2^(scale*s_j + col.exponent_j + exponent); returns sum_j e_j * col.mantissa_j.
template <class Score>
BAM_INLINE double exponentials(const Score* __restrict__ s, int64_t n, float scale, float exponent,
                               const Potential& col, float* __restrict__ e) {
  const float* __restrict__ col_exponent = col.exponent;
  const float* __restrict__ col_mantissa = col.mantissa;
  const vfloat scales = splat(scale), exponents = splat(exponent);
  double row_total = 0.0;
  for (int64_t first = 0; first < n; first += kPanel) {
    vfloat total = splat(0.0f);
    for_columns(first, panel_end(first, n), [&](int64_t j, auto part) {
      const vfloat x = fma(load_scores(s + j, part), scales, load(col_exponent + j, part) + exponents);
      const vfloat ej = exp2(x);
      store(e + j, ej, part);
      total = fma(ej, load(col_mantissa + j, part), total);
    });
    row_total += sum(total);
  }
  return row_total;
}

// The same, with a better exponent where the given one was poor. A row with no key left sums to 0.
template <class Score>
BAM_INLINE double row_exponentials(const Score* s, int64_t n, float scale, float& exponent, const Potential& col,
                                   float* e) {
  double total = exponentials(s, n, scale, exponent, col, e);
  if (!is_good_sum(total)) {
    exponent = exponent_of_max(s, n, scale, col.exponent);
    total = exponentials(s, n, scale, exponent, col, e);
  }
  return total;
}

// 2^exponent / total as a potential with mantissa in (1, 2]; infinite where total is 0.
BAM_INLINE void set_reciprocal(Potential p, int64_t i, float exponent, double total) {
  if (total == 0.0) {
    p.exponent[i] = 0.0f;
    p.mantissa[i] = INFINITY;
    return;
  }
  int power;
  const double mantissa = frexp(total, &power);
  p.exponent[i] = exponent - (float)power;
  p.mantissa[i] = (float)(1.0 / mantissa);
}

// out_j = sum over chunks, in order, of partial[chunk][j], added to out where `accumulate`, times `factor` if given.
static inline void add_chunks(const float* partial, int64_t stride, int64_t count, int64_t n, const float* factor,
                              bool accumulate, float* out, int threads) {
  constexpr int64_t kColumns = 512;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < n; first += kColumns) {
    const int64_t width = n - first < kColumns ? n - first : kColumns;
    for_columns(width, [&](int64_t k, auto part) {
      const int64_t j = first + k;
      vfloat total = splat(0.0f);
      for (int64_t chunk = 0; chunk < count; ++chunk) total += load(partial + chunk * stride + j, part);
      if (factor) total = total * load(factor + j, part);
      if (accumulate) total += load(out + j, part);
      store(out + j, total, part);
    });
  }
}

}  // namespace bam::cpu::BAM_ISA
