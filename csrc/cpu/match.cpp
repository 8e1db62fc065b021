// Per image: the targets P of its L rows, and the loss, entropies and gradient of its V source rows against them.
//
// G_v = (a_v * A_v - Pbar_v) / (B*tau) with Pbar_v = sum_{t != v} P_t / (L*(V-1)), a_v its row sum; for V = 1 both are
// those of P_0. A row is exponentiated once; the exponentials stay in the cache until they are scaled into G.
// Masked scores are finite and exponentiate to 0, so they add nothing anywhere.
#include "../layout.h"
#include "kernels.h"
#include "row.h"

namespace bam::cpu::BAM_ISA {
namespace {

constexpr double kLn2 = 0.693147180559945309;

// The workspace of one thread: L target rows, Pbar, one source row; with top-k, the chosen columns.
struct Workspace {
  Workspace(int64_t L, int64_t n, int64_t k, const float* col_log2, bool is_finite)
      : stride(padded(n)),
        col_log2(col_log2),
        is_finite(is_finite),
        rows((L + 2) * stride),
        weights(L),
        kept(k),
        kept_values(k) {}
  float* target(int64_t t) { return rows.data + t * stride; }
  float* mean(int64_t L) { return rows.data + L * stride; }
  float* source(int64_t L) { return rows.data + (L + 1) * stride; }
  int64_t stride;
  const float* col_log2;  // (n) log2 of col.mantissa, shared by the threads
  bool is_finite;         // every col.mantissa; their log2 does not tell
  Buffer rows;
  Buffer weights;  // P_t = weights[t] * target(t)
  Buffer kept;     // int32 columns
  Buffer kept_values;
};

struct TargetSums {
  double total;  // sum_j p_j
  double dot;    // sum_j p_j * log2(p_j)
};

// p_j = 2^(scale*s_j + col.exponent_j + exponent + col_log2_j), where the last is log2(col.mantissa_j), and its sums.
template <class Score>
BAM_INLINE TargetSums target_exponentials(const Score* __restrict__ s, const Match& m, float exponent,
                                          const float* __restrict__ col_log2, float* __restrict__ p) {
  const float* __restrict__ col_exponent = m.col.exponent;
  const vfloat scales = splat(m.target_scale), exponents = splat(exponent);
  TargetSums sums = {0.0, 0.0};
  for (int64_t first = 0; first < m.n; first += kPanel) {
    vfloat total = splat(0.0f), dot = splat(0.0f);
    for_columns(first, panel_end(first, m.n), [&](int64_t j, auto part) {
      prefetch(s + j + m.target.row_stride);
      const vfloat exponent_j = load(col_exponent + j, part) + exponents;
      const vfloat x = fma(load_scores(s + j, part), scales, exponent_j) + load(col_log2 + j, part);
      const vfloat pj = exp2(x);
      store(p + j, pj, part);
      total += pj;
      dot = fma(pj, x, dot);
    });
    sums.total += sum(total);
    sums.dot += sum(dot);
  }
  return sums;
}

struct SourceSums {
  double total;    // sum_j e_j
  double dot;      // sum_j e_j * log2(e_j)
  double matched;  // sum_j pbar_j * s_j
};

// e_j = 2^(scale*s_j + exponent) and its sums. The gradient will be written to `out`.
template <class Score>
BAM_INLINE SourceSums source_exponentials(const Score* __restrict__ s, const Match& m, float exponent,
                                          const float* __restrict__ pbar, float* __restrict__ e, const float* out) {
  const vfloat scales = splat(m.source_scale), exponents = splat(exponent);
  SourceSums sums = {0.0, 0.0, 0.0};
  for (int64_t first = 0; first < m.n; first += kPanel) {
    vfloat total = splat(0.0f), dot = splat(0.0f), matched = splat(0.0f);
    for_columns(first, panel_end(first, m.n), [&](int64_t j, auto part) {
      prefetch(s + j + m.source.row_stride);
      if (sizeof(Score) == 2) prefetch(out + j);  // float32 scores are usually replaced by their gradient
      const vfloat sj = load_scores(s + j, part);
      const vfloat x = fma(sj, scales, exponents);
      const vfloat ej = exp2(x);
      store(e + j, ej, part);
      total += ej;
      dot = fma(ej, x, dot);
      matched = fma(load(pbar + j, part), sj, matched);
    });
    sums.total += sum(total);
    sums.dot += sum(dot);
    sums.matched += sum(matched);
  }
  return sums;
}

BAM_INLINE bool all_finite(const float* x, int64_t n) {
  vfloat zero = splat(0.0f);  // or NaN
  for_columns(n, [&](int64_t j, auto part) {
    const vfloat x_j = load(x + j, part);
    zero += x_j - x_j;
  });
  return sum(zero) == 0.0f;
}

BAM_INLINE int64_t count_at_least(const float* x, int64_t n, int32_t threshold) {
  vint count = vint{};
  const vint least = threshold - vint{};
  for_columns(n, [&](int64_t j, auto part) { count -= (vint)(bits(load(x + j, part)) >= least); });
  int64_t total = 0;
  for (int64_t l = 0; l < kLanes; ++l) total += count[l];
  return total;
}

// The k largest of x >= 0, ties to the lower public column, into `kept`. Non-negative floats are ordered as their
// bits are, so the k-th largest is found by bisection on the bits. A tail's filler is 0, so the threshold is kept
// above 0 and the zeros are taken by index.
static int64_t largest_columns(const float* x, const Match& m, int32_t* kept) {
  const int64_t k = m.top_k;
  int32_t low = 0, high = 0x7f800000;  // count(low) >= k or low = 0; count(high) < k
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t count = count_at_least(x, m.n, middle);
    if (count >= k) low = middle;
    else high = middle;
    if (count == k) break;
  }
  int64_t count = 0;
  const bool exact = low > 0 && count_at_least(x, m.n, low) == k;
  const int32_t above = exact ? low : low + 1;
  for (int64_t j = 0; j < m.n; ++j) {
    int32_t bits_j;
    memcpy(&bits_j, x + j, sizeof bits_j);
    if (bits_j >= above) kept[count++] = (int32_t)j;
  }
  for (int64_t t = 0; t < m.T && count < k; ++t)
    for (int64_t r = 0; r < m.W && count < k; ++r)
      for (int64_t i = 0; i < m.B && count < k; ++i) {
        const int64_t j = gathered_column(t, r, i, m.T, m.B);
        int32_t bits_j;
        memcpy(&bits_j, x + j, sizeof bits_j);
        if (bits_j == low) kept[count++] = (int32_t)j;
      }
  return count;
}

// P over the kept columns alone, from the scores again: the kept mass of a view may have underflowed. Returns H(P).
template <class Score>
double renormalize(const Score* s, const Match& m, int64_t count, Workspace& work, float* p) {
  const int32_t* kept = (const int32_t*)work.kept.data;
  float* values = work.kept_values.data;
  float largest = -INFINITY;
  for (int64_t q = 0; q < count; ++q) {
    const int64_t j = kept[q];
    const float x = exact_exponent(s, j, m.target_scale, m.col.exponent[j], 0.0f);
    if (x > largest) largest = x;
  }
  const float exponent = largest < kEmpty ? 0.0f : -ceilf(largest);
  double total = 0.0, dot = 0.0;
  for (int64_t q = 0; q < count; ++q) {
    const int64_t j = kept[q];
    const float x = exact_exponent(s, j, m.target_scale, m.col.exponent[j], exponent);
    values[q] = exp2(splat(x))[0] * m.col.mantissa[j];
    total += values[q];
    dot += values[q] > 0.0f ? values[q] * (x + work.col_log2[j]) : 0.0f;
  }
  memset(p, 0, m.n * sizeof(float));
  if (total == 0.0) return 0.0;
  for (int64_t q = 0; q < count; ++q) p[kept[q]] = (float)(values[q] / total);
  return kLn2 * (::log2(total) - dot / total);
}

// Fills target(t) and weights[t] for t < L; returns the sum of the entropies.
template <class Score>
double targets_of_image(const Match& m, int64_t i, Workspace& work) {
  double entropy = 0.0;
  for (int64_t t = 0; t < m.L; ++t) {
    const Score* s = row_of(m.target, Score{}, t, i);
    float exponent = m.row_exponent[t * m.row_view_stride + i];
    TargetSums sums = target_exponentials(s, m, exponent, work.col_log2, work.target(t));
    if (!is_good_sum(sums.total)) {
      exponent = exponent_of_max(s, m.n, m.target_scale, m.col.exponent);
      sums = target_exponentials(s, m, exponent, work.col_log2, work.target(t));
    }
    work.weights.data[t] = sums.total > 0.0 ? (float)(1.0 / sums.total) : 0.0f;
    if (m.row_out.exponent && t == 0) set_reciprocal(m.row_out, i, exponent, sums.total);
    if (sums.total > 0.0) entropy += kLn2 * (::log2(sums.total) - sums.dot / sums.total);
    if (!work.is_finite) work.weights.data[t] = NAN;
  }
  if (!work.is_finite) return NAN;
  if (m.top_k <= 0 || m.top_k >= m.n) return entropy;

  float* mean = work.mean(m.L);
  for_columns(m.n, [&](int64_t j, auto part) {
    vfloat total = splat(0.0f);
    for (int64_t t = 0; t < m.L; ++t) total = fma(load(work.target(t) + j, part), splat(work.weights.data[t]), total);
    store(mean + j, total, part);
  });
  const int64_t count = largest_columns(mean, m, (int32_t*)work.kept.data);
  entropy = 0.0;
  for (int64_t t = 0; t < m.L; ++t) {
    const Score* s = row_of(m.target, Score{}, t, i);
    entropy += renormalize(s, m, count, work, work.target(t));
    work.weights.data[t] = 1.0f;
  }
  return entropy;
}

// Pbar_v = weight * row, for view v. `row` is one target row, or the sum of several, kept from view to view where all
// of them count.
struct MeanTarget {
  const float* row;
  float weight;
};
static MeanTarget mean_target(const Match& m, int64_t v, Workspace& work, bool& has_sum_of_all) {
  const float pair_weight = m.V == 1 ? 1.0f : 1.0f / (float)(m.L * (m.V - 1));
  if (m.V == 1) return {work.target(0), work.weights.data[0]};
  const int64_t skipped = v < m.L ? v : m.L;
  const int64_t terms = m.L - (v < m.L);
  if (terms == 0) return {nullptr, 0.0f};
  if (terms == 1) {
    const int64_t t = skipped == 0 ? 1 % m.L : 0;
    return {work.target(t), pair_weight * work.weights.data[t]};
  }
  float* mean = work.mean(m.L);
  if (skipped == m.L && has_sum_of_all) return {mean, pair_weight};
  for_columns(m.n, [&](int64_t j, auto part) {
    vfloat total = splat(0.0f);
    for (int64_t t = 0; t < m.L; ++t)
      if (t != skipped) total = fma(load(work.target(t) + j, part), splat(work.weights.data[t]), total);
    store(mean + j, total, part);
  });
  has_sum_of_all = skipped == m.L;
  return {mean, pair_weight};
}

// out_j = a*e_j - w*pbar_j
BAM_INLINE void write_gradient(const float* __restrict__ e, const float* __restrict__ pbar, int64_t n, float a, float w,
                               float* __restrict__ out) {
  for_columns(n, [&](int64_t j, auto part) {
    store(out + j, fma(load(e + j, part), splat(a), load(pbar + j, part) * splat(-w)), part);
  });
}

template <class Score>
void match_image(const Match& m, int64_t i, Workspace& work) {
  double loss = 0.0, entropy = 0.0;
  bool has_sum_of_all = false;
  for (int64_t v = 0; v < m.V; ++v) {
    const Score* s = row_of(m.source, Score{}, v, i);
    float* out = m.gradient ? m.gradient + v * m.gradient_view_stride + i * m.gradient_row_stride : nullptr;
    MeanTarget pbar = mean_target(m, v, work, has_sum_of_all);
    const bool matched = pbar.row != nullptr;
    if (!matched) pbar.row = work.target(0);  // weight 0
    float* e = work.source(m.L);
    float exponent = 0.0f;
    SourceSums sums = source_exponentials(s, m, exponent, pbar.row, e, out);
    if (!is_good_sum(sums.total)) {
      exponent = exponent_of_max(s, m.n, m.source_scale, nullptr);
      sums = source_exponentials(s, m, exponent, pbar.row, e, out);
    }
    const double log2_total = ::log2(sums.total);
    entropy += kLn2 * (log2_total - sums.dot / sums.total);
    const float a = m.V == 1 ? 1.0f : (float)(m.L - (v < m.L)) / (float)(m.L * (m.V - 1));
    if (matched) {
      loss += a * kLn2 * (log2_total - exponent) - pbar.weight * sums.matched * m.source_step_over_tau;
    }
    if (out) {
      const float of_source = (float)(a * m.gradient_scale / sums.total);
      write_gradient(e, pbar.row, m.n, of_source, pbar.weight * m.gradient_scale, out);
    }
  }
  m.loss[i] = loss;
  m.source_entropy[i] = entropy;
}

template <class Score>
void run(const Match& m) {
  const bool chooses = m.top_k > 0 && m.top_k < m.n;
  Buffer col_log2(m.n);
  const bool is_finite = all_finite(m.col.mantissa, m.n);
#pragma omp parallel num_threads(m.threads)
  {
    const FlushSubnormals flush;
    Workspace work(m.L, m.n, chooses ? m.top_k : 0, col_log2.data, is_finite);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < m.n; first += kPanel) {
      for_columns(first, panel_end(first, m.n),
                  [&](int64_t j, auto part) { store(col_log2.data + j, log2(load(m.col.mantissa + j, part)), part); });
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m.b; ++i) {
      m.target_entropy[i] = targets_of_image<Score>(m, i, work);
      if (m.targets) {
        for (int64_t t = 0; t < m.L; ++t) {
          float* out = m.targets + t * m.targets_view_stride + i * m.n;
          const float* p = work.target(t);
          const vfloat weight = splat(work.weights.data[t]);
          for_columns(m.n, [&](int64_t j, auto part) { store(out + j, load(p + j, part) * weight, part); });
        }
      }
      if (m.source.data) match_image<Score>(m, i, work);
      else m.loss[i] = m.source_entropy[i] = 0.0;
    }
  }
}

}  // namespace

void match(const Match& m) {
  m.target.type == ScoreType::kInt16 ? run<int16_t>(m) : run<float>(m);
}

}  // namespace bam::cpu::BAM_ISA
