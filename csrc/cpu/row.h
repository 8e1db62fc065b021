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
    most = max(fma(load_scores(s + j, part), splat(scale), e), most);
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

// Row q of several: its scores, its exponent, and where its exponentials go.
template <class Score>
struct RowTerms {
  const Score* scores;
  float exponent;
  float* e;
};

// e_j = 2^(scale*s_j + col.exponent_j + exponent) of every row, and total = sum_j e_j * col.mantissa_j. The rows go
// side by side: they share the loads of the column potential, and their chains of instructions overlap. Scores at
// `ahead` elements from a row will be read next.
template <int rows, class Score>
BAM_INLINE void exponentials(const RowTerms<Score> (&row)[rows], int64_t n, float scale, const Potential& col,
                             int64_t ahead, double (&total)[rows]) {
  const float* __restrict__ col_exponent = col.exponent;
  const float* __restrict__ col_mantissa = col.mantissa;
  for (int q = 0; q < rows; ++q) total[q] = 0.0;
  for (int64_t first = 0; first < n; first += kPanel) {
    vfloat part_total[rows] = {};
    for_columns(first, panel_end(first, n), [&](int64_t j, auto part) {
      const vfloat exponent_j = load(col_exponent + j, part), mantissa_j = load(col_mantissa + j, part);
      vfloat e[rows];
      for (int q = 0; q < rows; ++q) {
        prefetch(row[q].scores + j + ahead);
        e[q] = fma(load_scores(row[q].scores + j, part), splat(scale), exponent_j + splat(row[q].exponent));
      }
      exp2(e);
      for (int q = 0; q < rows; ++q) {
        store(row[q].e + j, e[q], part);
        part_total[q] = fma(e[q], mantissa_j, part_total[q]);
      }
    });
    for (int q = 0; q < rows; ++q) total[q] += sum(part_total[q]);
  }
}

// The exponentials of rows, with a better exponent where the given one was poor. A row with no key left sums to 0.
template <int rows, class Score>
BAM_INLINE void row_exponentials(RowTerms<Score> (&row)[rows], int64_t n, float scale, const Potential& col,
                                 int64_t ahead, double (&total)[rows]) {
  exponentials(row, n, scale, col, ahead, total);
  for (int q = 0; q < rows; ++q) {
    if (is_good_sum(total[q])) continue;
    row[q].exponent = exponent_of_max(row[q].scores, n, scale, col.exponent);
    const RowTerms<Score> again[1] = {row[q]};
    double total_again[1];
    exponentials(again, n, scale, col, 0, total_again);
    total[q] = total_again[0];
  }
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
