// The first column step: per column a (maximum, sum) of 2^(scale*s) * row, in one read of the scores.
//
// The maximum is kept as an integer exponent with headroom, so that rescaling is exact and rare.
// Source: the first half step of Sinkhorn-Knopp in log space.
#include "kernels.h"
#include "row.h"

namespace bam::cpu::BAM_ISA {
namespace {

constexpr int kRows = 4;
constexpr float kHeadroom = 8.0f;
constexpr float kNoShift = -16777216.0f;  // 2^-kNoShift underflows to 0 against any real shift

template <class Score>
struct Block {
  const Score* row[kRows];
  float exponent[kRows];
  float mantissa[kRows];
};

template <int rows, class Score>
BAM_INLINE void add_rows(const Block<Score>& block, int64_t n, float scale, float* __restrict__ shift,
                         float* __restrict__ sum) {
  for_columns(n, [&](int64_t j, auto part) {
    vfloat s[rows], most = splat(-INFINITY);
    for (int q = 0; q < rows; ++q) {
      s[q] = load_scores(block.row[q] + j, part);
      most = max(most, fma(s[q], splat(scale), splat(block.exponent[q])));
    }
    vfloat shift_j = load(shift + j, part), sum_j = load(sum + j, part);
    if (any_greater(most, shift_j)) {
      const vfloat fresh = most > shift_j ? round(most) + kHeadroom : shift_j;
      sum_j = sum_j * exp2(shift_j - fresh);
      store(shift + j, fresh, part);
      shift_j = fresh;
    }
    for (int q = 0; q < rows; ++q) {
      const vfloat e = exp2(fma(s[q], splat(scale), splat(block.exponent[q]) - shift_j));
      sum_j = fma(e, splat(block.mantissa[q]), sum_j);
    }
    store(sum + j, sum_j, part);
  });
}

template <class Score>
void chunk_lse(const ColumnLse& p, int64_t first, int64_t last, float* shift, float* sum) {
  for (int64_t j = 0; j < p.n; ++j) shift[j] = kNoShift, sum[j] = 0.0f;
  for (int64_t i = first; i < last; i += kRows) {
    Block<Score> block;
    const int rows = last - i < kRows ? (int)(last - i) : kRows;
    for (int q = 0; q < rows; ++q) {
      block.row[q] = row_of(p.scores, Score{}, 0, i + q);
      block.exponent[q] = p.row.exponent[i + q];
      block.mantissa[q] = p.row.mantissa[i + q];
    }
    switch (rows) {
      case 4: add_rows<4>(block, p.n, p.scale, shift, sum); break;
      case 3: add_rows<3>(block, p.n, p.scale, shift, sum); break;
      case 2: add_rows<2>(block, p.n, p.scale, shift, sum); break;
      default: add_rows<1>(block, p.n, p.scale, shift, sum);
    }
  }
}

// (shift, sum) of all chunks, in order, into the output.
void merge(const ColumnLse& p, const float* shifts, const float* sums, int64_t stride, int64_t chunks) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t first = 0; first < p.n; first += 512) {
    const int64_t width = p.n - first < 512 ? p.n - first : 512;
    for_columns(width, [&](int64_t k, auto part) {
      const int64_t j = first + k;
      vfloat shift = p.accumulate ? load(p.shift + j, part) : splat(kNoShift);
      vfloat sum = p.accumulate ? load(p.sum + j, part) : splat(0.0f);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const vfloat other = load(shifts + chunk * stride + j, part);
        const vfloat most = max(shift, other);
        sum = fma(load(sums + chunk * stride + j, part), exp2(other - most), sum * exp2(shift - most));
        shift = most;
      }
      store(p.shift + j, shift, part);
      store(p.sum + j, sum, part);
    });
  }
}

template <class Score>
void run(const ColumnLse& p) {
  const Chunks chunks(p.m);
  const int64_t stride = padded(p.n);
  Buffer partial(2 * chunks.count * stride);
  float* shifts = partial.data;
  float* sums = shifts + chunks.count * stride;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t first = chunk * chunks.rows;
    const int64_t last = first + chunks.rows < p.m ? first + chunks.rows : p.m;
    chunk_lse<Score>(p, first, last, shifts + chunk * stride, sums + chunk * stride);
  }
  merge(p, shifts, sums, stride, chunks.count);
}

}  // namespace

void column_lse(const ColumnLse& p) {
  p.scores.type == ScoreType::kInt16 ? run<int16_t>(p) : run<float>(p);
}

}  // namespace bam::cpu::BAM_ISA
