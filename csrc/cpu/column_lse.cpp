// The first column step: per column sum_i 2^(scale*s_ij) * row_i as sum * 2^shift, in one read of the scores.
//
// The shift of a column is an integer above the largest exponent of a sample of rows, and all chunks of rows begin with
// it. It is raised only where a sum grows out of range, so that no maximum is taken of the other rows; rescaling is
// exact. What a sum loses is below 2^-126, where the rows that set the shift give 2^-9 or more.
// Source: the first half step of Sinkhorn-Knopp in log space.
#include "kernels.h"
#include "row.h"

namespace bam::cpu::BAM_ISA {
namespace {

constexpr int kRows = 4;           // rows added to the column sums at once: a quarter of the traffic on the sums
constexpr int64_t kColumns = 512;  // columns that a thread starts or merges at once
constexpr int64_t kSample = 16;    // rows that the first shifts come from
constexpr float kHeadroom = 8.0f;
constexpr float kNoShift = -16777216.0f;  // 2^-kNoShift underflows to 0 against any real shift
// Exponents are rounded at their size, so that sums are kept small.
constexpr float kMostColumnSumLog2 = 12.0f, kMostColumnSum = 0x1p12f;

template <class Score>
struct Block {
  const Score* row[kRows];
  int64_t ahead;  // elements from a row to that of the next block
  float exponent[kRows];
  float mantissa[kRows];
};

// Write the shifts that rows spread over the slab give, and empty sums.
template <class Score>
void start(const ColumnLse& p, int64_t first, int64_t last) {
  const int64_t sample = p.m < kSample ? p.m : kSample;
  for_columns(first, last, [&](int64_t j, auto part) {
    vfloat most = splat(kNoShift);
    for (int64_t q = 0; q < sample; ++q) {
      const int64_t i = q * p.m / sample;
      const vfloat s = load_scores(row_of(p.scores, Score{}, 0, i) + j, part);
      most = max(fma(s, splat(p.scale), splat(p.row.exponent[i])), most);
    }
    store(p.shift + j, round(most) + kHeadroom, part);
    store(p.sum + j, splat(0.0f), part);
  });
}

// sum plus the terms of the rows, times 2^-shift.
template <int rows, class Score, class Part>
BAM_INLINE vfloat with_terms(vfloat sum, const Block<Score>& block, int64_t j, Part part, float scale, vfloat shift) {
  vfloat e[rows];
  for (int q = 0; q < rows; ++q)
    e[q] = fma(load_scores(block.row[q] + j, part), splat(scale), splat(block.exponent[q]) - shift);
  exp2(e);
  for (int q = 0; q < rows; ++q) sum = fma(e[q], splat(block.mantissa[q]), sum);
  return sum;
}

// A shift with room for the terms of the rows, and for a sum that outgrew the given shift.
template <int rows, class Score, class Part>
BAM_INLINE vfloat raised(vfloat shift, const Block<Score>& block, int64_t j, Part part, float scale) {
  vfloat most = shift + kMostColumnSumLog2;
  for (int q = 0; q < rows; ++q)
    most = max(fma(load_scores(block.row[q] + j, part), splat(scale), splat(block.exponent[q])), most);
  return round(most) + kHeadroom;
}

template <int rows, class Score>
BAM_INLINE void add_rows(const Block<Score>& block, int64_t n, float scale, float* __restrict__ shift,
                         float* __restrict__ sum) {
  for_columns(n, [&](int64_t j, auto part) {
    const vfloat shift_j = load(shift + j, part), sum_j = load(sum + j, part);
    for (int q = 0; q < rows; ++q) prefetch(block.row[q] + j + block.ahead);
    vfloat total = with_terms<rows>(sum_j, block, j, part, scale, shift_j);
    if (__builtin_expect(any_not_below(total, splat(kMostColumnSum)), false)) {
      const vfloat fresh = total < splat(kMostColumnSum) ? shift_j : raised<rows>(shift_j, block, j, part, scale);
      total = with_terms<rows>(sum_j * exp2(shift_j - fresh), block, j, part, scale, fresh);
      store(shift + j, fresh, part);
    }
    store(sum + j, total, part);
  });
}

template <int rows, class Score>
void add_block(const ColumnLse& p, int64_t i, float* shift, float* sum) {
  Block<Score> block;
  block.ahead = kRows * p.scores.row_stride;
  for (int q = 0; q < rows; ++q) {
    block.row[q] = row_of(p.scores, Score{}, 0, i + q);
    block.exponent[q] = p.row.exponent[i + q];
    block.mantissa[q] = p.row.mantissa[i + q];
  }
  add_rows<rows>(block, p.n, p.scale, shift, sum);
}

template <class Score>
void chunk_lse(const ColumnLse& p, int64_t first, int64_t last, float* shift, float* sum) {
  memcpy(shift, p.shift, p.n * sizeof(float));
  memset(sum, 0, p.n * sizeof(float));
  int64_t i = first;
  for (; i + kRows <= last; i += kRows) add_block<kRows, Score>(p, i, shift, sum);
  for (; i < last; ++i) add_block<1, Score>(p, i, shift, sum);
}

// Add (shift, sum) of all chunks, in order, to the output.
void merge(const ColumnLse& p, const float* shifts, const float* sums, int64_t stride, int64_t chunks, int64_t first,
           int64_t last) {
  for_columns(first, last, [&](int64_t j, auto part) {
    vfloat shift = load(p.shift + j, part), sum = load(p.sum + j, part);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const vfloat other = load(shifts + chunk * stride + j, part);
      const vfloat more = load(sums + chunk * stride + j, part);
      if (any_not_below(max(shift - other, other - shift), splat(0.25f))) {  // beyond 2^22 shifts may be halves
        const vfloat most = max(shift, other);
        sum = fma(more, exp2(other - most), sum * exp2(shift - most));
        shift = most;
      } else {
        sum += more;
      }
    }
    store(p.shift + j, shift, part);
    store(p.sum + j, sum, part);
  });
}

template <class Score>
void run(const ColumnLse& p) {
  const Chunks chunks(p.m);
  const int64_t stride = padded(p.n);
  Buffer partial(2 * chunks.count * stride);
  float* shifts = partial.data;
  float* sums = shifts + chunks.count * stride;
#pragma omp parallel num_threads(p.threads)
  {
    const FlushSubnormals flush;
    if (!p.accumulate) {
#pragma omp for schedule(static)
      for (int64_t first = 0; first < p.n; first += kColumns)
        start<Score>(p, first, first + kColumns < p.n ? first + kColumns : p.n);
    }
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t first = chunk * chunks.rows;
      const int64_t last = first + chunks.rows < p.m ? first + chunks.rows : p.m;
      chunk_lse<Score>(p, first, last, shifts + chunk * stride, sums + chunk * stride);
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < p.n; first += kColumns) {
      const int64_t last = first + kColumns < p.n ? first + kColumns : p.n;
      merge(p, shifts, sums, stride, chunks.count, first, last);
    }
  }
}

}  // namespace

void column_lse(const ColumnLse& p) {
  p.scores.type == ScoreType::kInt16 ? run<int16_t>(p) : run<float>(p);
}

}  // namespace bam::cpu::BAM_ISA
