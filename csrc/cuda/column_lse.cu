// The first column step, and what makes scores of a product in the same read.
//
// A thread owns 8 columns and walks down its chunk of rows, so that nothing waits; chunks are merged in order by a
// second kernel: results do not differ from run to run. The rows of a product have unit length before it, as 16 bits
// need; the sums of the source's softmax are left to the match, which has whole rows on chip and reads no score twice
// for them.
#include "launch.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace bam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 4;            // rows on their way at once
constexpr int kMergeThreads = 512;  // 16 to a column: each reads its share of 128 partials at once

struct Chunks {
  ColumnLse p;
  bool aligned, fixed_aligned;
};

__device__ __forceinline__ void add_rows(Column (&column)[kOctet], const float (&x)[kRows][kOctet], float scale,
                                         const float (&exponent)[kRows], const float (&mantissa)[kRows]) {
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    float largest = fmaf(x[0][k], scale, exponent[0]);
#pragma unroll
    for (int r = 1; r < kRows; ++r) largest = fmaxf(largest, fmaf(x[r][k], scale, exponent[r]));
    const float most = fmaxf(column[k].most, ceilf(largest));
    float total = column[k].total * exp2_fast(column[k].most - most);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      total = fmaf(exp2_fast(fmaf(x[r][k], scale, exponent[r] - most)), mantissa[r], total);
    column[k] = {most, total};
  }
}

// Add the bias, mask the positives of row i, and write its scores as fixed point, whose values are then x.
__device__ __forceinline__ void finish_row(float (&x)[kOctet], const Chunks& a, const float (&bias)[kOctet],
                                           const int (&image)[kOctet], int64_t i, int64_t j, float steps_per_unit) {
  const ColumnLse& p = a.p;
  const auto row = static_cast<uint32_t>(i), first = static_cast<uint32_t>(p.positives.first);
  const auto period = static_cast<uint32_t>(p.positives.period), B = static_cast<uint32_t>(p.positives.B);
  const int own = p.positives.masked ? static_cast<int>((first + row % period) % B) : -2;
  int16_t fixed[kOctet];
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    fixed[k] = image[k] == own ? kMaskedFixed : to_fixed(x[k] + bias[k], steps_per_unit);
    x[k] = value_of(fixed[k]);
  }
  store_octet(p.fixed + i * p.fixed_stride + j, fixed, p.n - j, a.fixed_aligned);
}

template <class Score, bool kEpilogue>
__global__ void __launch_bounds__(kThreads) column_lse_kernel(const Chunks a) {
  follow_earlier_kernels();
  const ColumnLse& p = a.p;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kOctet;
  if (j >= p.n) return;
  const int64_t first = blockIdx.y * p.rows, last = first + p.rows < p.m ? first + p.rows : p.m;
  const Score* s = static_cast<const Score*>(p.scores.data) + j;
  const float scale = number(p.scale);
  const float steps_per_unit = kEpilogue ? 1.0f / number(p.step) : 0.0f;
  int image[kOctet];
  float bias[kOctet];
  if (kEpilogue)
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      image[k] = own_image(j + k, p.positives.own_columns, p.positives.T, p.positives.B);
      bias[k] = p.bias && j + k < p.n ? p.bias[j + k] : 0.0f;
    }

  Column column[kOctet];
  for (int64_t i = first; i < last; i += kRows) {
    float x[kRows][kOctet], exponent[kRows], mantissa[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Rows past the last are masked.
      const int64_t left = i + r < last ? p.n - j : 0;
      load_scores(x[r], s + (i + r) * p.scores.row_stride, left, a.aligned);
      exponent[r] = p.shift && left ? p.row.exponent[i + r] : 0.0f;
      mantissa[r] = p.shift && left ? p.row.mantissa[i + r] : 0.0f;
    }
    if (kEpilogue)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (i + r < last) finish_row(x[r], a, bias, image, i + r, j, steps_per_unit);
    if (p.shift) add_rows(column, x, scale, exponent, mantissa);
  }
  if (!p.shift) return;
  float* most = p.partial + blockIdx.y * p.n + j;
  float* total = most + gridDim.y * p.n;
#pragma unroll
  for (int k = 0; k < kOctet; ++k)
    if (j + k < p.n) {
      most[k] = column[k].most;
      total[k] = column[k].total;
    }
}

struct Merge {
  const float* partial;  // (2, chunks, n)
  int64_t chunks, n;
  float* shift;
  float* sum;
  bool accumulate;
};

__device__ __forceinline__ int64_t merged_column() {
  return static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
}

__global__ void __launch_bounds__(kMergeThreads) merge_lse_kernel(const Merge p) {
  follow_earlier_kernels();
  const int64_t j = merged_column();
  const Column fresh = merge_partials(p.partial, p.partial + p.chunks * p.n, p.chunks, p.n, j, kWarp,
                                      static_cast<Column*>(shared_memory()));
  if (threadIdx.x >= kWarp || j >= p.n) return;
  Column before;
  if (p.accumulate) before = {p.shift[j], p.sum[j]};
  const float most = fmaxf(before.most, fresh.most);
  p.shift[j] = most;
  p.sum[j] = before.total * exp2_fast(before.most - most) + fresh.total * exp2_fast(fresh.most - most);
}

__global__ void __launch_bounds__(kMergeThreads) add_chunks_kernel(const AddChunks p) {
  follow_earlier_kernels();
  const int64_t j = merged_column();
  float total = add_partials(p.partial, p.chunks, p.n, j, kWarp, static_cast<float*>(shared_memory()));
  if (threadIdx.x >= kWarp || j >= p.n) return;
  if (p.factor) total *= p.factor[j];
  if (p.accumulate) total += p.out[j];
  p.out[j] = total;
  if (p.col.exponent) divide_column(p.col, j, total);
}

Shape merge_shape(int64_t n, size_t of_thread) {
  return {dim3(blocks_for(n, kWarp)), kMergeThreads, static_cast<int64_t>(kMergeThreads * of_thread)};
}

}  // namespace

void add_chunks(const AddChunks& p, const Where& where) {
  launch("add_chunks_kernel", add_chunks_kernel, merge_shape(p.n, sizeof(float)), where, p);
}

void column_lse(const ColumnLse& p, const Where& where) {
  const unsigned chunks = blocks_for(p.m, p.rows);
  const Shape shape = {dim3(blocks_for(p.n, kThreads * kOctet), chunks), kThreads};
  const bool fixed_aligned = is_aligned(p.fixed, 0, p.fixed_stride);
  if (p.scores.type == ScoreType::kInt16) {
    const auto* data = static_cast<const int16_t*>(p.scores.data);
    launch("column_lse_kernel<int16>", column_lse_kernel<int16_t, false>, shape, where,
           Chunks{p, is_aligned(data, 0, p.scores.row_stride), fixed_aligned});
  } else {
    const auto* data = static_cast<const float*>(p.scores.data);
    const Chunks a = {p, is_aligned(data, 0, p.scores.row_stride), fixed_aligned};
    if (p.fixed) launch("column_lse_kernel<float32, epilogue>", column_lse_kernel<float, true>, shape, where, a);
    else launch("column_lse_kernel<float32>", column_lse_kernel<float, false>, shape, where, a);
  }
  if (!p.shift) return;
  launch("merge_lse_kernel", merge_lse_kernel, merge_shape(p.n, sizeof(Column)), where,
         Merge{p.partial, chunks, p.n, p.shift, p.sum, p.accumulate});
}

}  // namespace bam::cuda
