// One Sinkhorn iteration in one read of the scores: row i is exponentiated once into the cache, its sum gives the row
// potential, and its entries over that sum, which are P_ij, are added to the column sums.
//
// Every term is at most 1, so the column sums need no shift at any eps.
// Source: Sinkhorn-Knopp in log space, rows then the sums of the next column step.
#include "kernels.h"
#include "row.h"

namespace bam::cpu::BAM_ISA {
namespace {

constexpr int kRows = 4;  // rows added to the column sums at once: a quarter of the traffic on the sums

template <int rows>
BAM_INLINE void add_rows(const float* __restrict__ e, int64_t stride, const float* weight, int64_t n,
                         float* __restrict__ c) {
  for_columns(n, [&](int64_t j, auto part) {
    vfloat c_j = load(c + j, part);
    for (int q = 0; q < rows; ++q) c_j = fma(load(e + q * stride + j, part), splat(weight[q]), c_j);
    store(c + j, c_j, part);
  });
}

// The rows from i on: their potentials, and their entries added to the column sums.
template <int rows, class Score>
void group_pass(const SinkhornPass& p, int64_t i, int64_t stride, float* e, float* c) {
  RowTerms<Score> row[rows];
  for (int q = 0; q < rows; ++q) row[q] = {row_of(p.scores, Score{}, 0, i + q), p.row.exponent[i + q], e + q * stride};
  double total[rows];
  row_exponentials(row, p.n, p.scale, p.col, kRows * p.scores.row_stride, total);
  float weight[rows];
  for (int q = 0; q < rows; ++q) {
    set_reciprocal(p.row, i + q, row[q].exponent, total[q]);
    weight[q] = total[q] > 0.0 ? (float)(1.0 / total[q]) : 0.0f;
  }
  add_rows<rows>(e, stride, weight, p.n, c);
}

template <class Score>
void chunk_pass(const SinkhornPass& p, int64_t first, int64_t last, int64_t stride, float* e, float* c) {
  memset(c, 0, p.n * sizeof(float));
  int64_t i = first;
  for (; i + kRows <= last; i += kRows) group_pass<kRows, Score>(p, i, stride, e, c);
  for (; i < last; ++i) group_pass<1, Score>(p, i, stride, e, c);
}

template <class Score>
void run(const SinkhornPass& p) {
  const Chunks chunks(p.m);
  const int64_t stride = padded(p.n);
  Buffer partial(chunks.count * stride);
#pragma omp parallel num_threads(p.threads)
  {
    const FlushSubnormals flush;
    Buffer e(kRows * stride);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t first = chunk * chunks.rows;
      const int64_t last = first + chunks.rows < p.m ? first + chunks.rows : p.m;
      chunk_pass<Score>(p, first, last, stride, e.data, partial.data + chunk * stride);
    }
  }
  add_chunks(partial.data, stride, chunks.count, p.n, p.col.mantissa, p.accumulate, p.c, p.threads);
}

}  // namespace

void sinkhorn_pass(const SinkhornPass& p) {
  p.scores.type == ScoreType::kInt16 ? run<int16_t>(p) : run<float>(p);
}

}  // namespace bam::cpu::BAM_ISA
