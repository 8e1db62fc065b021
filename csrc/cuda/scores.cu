// The positives' mask of float32 scores, and the steps of column potentials.
#include "launch.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace bam::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// Thread (i, t) masks key view t of row i's image.
__global__ void __launch_bounds__(kThreads) mask_positives_kernel(const MaskPositives p) {
  follow_earlier_kernels();
  const Positives& of = p.positives;
  const int64_t i = thread_index() / of.T, t = thread_index() % of.T;
  if (i >= p.m) return;
  const int64_t image = (of.first + i % of.period) % of.B;
  p.scores[i * p.row_stride + of.own_columns + t * of.B + image] = kMaskedScore;
}

// 1 / (sum * 2^shift); 1 for an empty column, which has no entry to scale.
__global__ void __launch_bounds__(kThreads) reciprocal_potential_kernel(const ReciprocalPotential p) {
  follow_earlier_kernels();
  const int64_t j = thread_index();
  if (j >= p.n) return;
  const Power found = column_potential(p.shift[j], p.sum[j]);
  p.col.exponent[j] = found.exponent;
  p.col.mantissa[j] = found.mantissa;
}

__global__ void __launch_bounds__(kThreads) column_totals_kernel(const ColumnTotals p) {
  follow_earlier_kernels();
  const int64_t j = thread_index();
  if (j >= p.n) return;
  p.total[j] = p.sum[j] * exp2(static_cast<double>(p.shift[j]) - p.common);
}

__global__ void __launch_bounds__(kThreads) total_potential_kernel(const TotalPotential p) {
  follow_earlier_kernels();
  const int64_t j = thread_index();
  if (j >= p.n) return;
  int power = 0;
  const auto mantissa = static_cast<float>(frexp(p.total[j], &power));
  const Power found = column_potential(p.common + static_cast<float>(power), mantissa);
  p.col.exponent[j] = found.exponent;
  p.col.mantissa[j] = found.mantissa;
}

__global__ void __launch_bounds__(kThreads) divide_potential_kernel(const DividePotential p) {
  follow_earlier_kernels();
  const int64_t j = thread_index();
  if (j >= p.n) return;
  divide_column(p.col, j, p.c[j]);
}

}  // namespace

void mask_positives(const MaskPositives& p, const Where& where) {
  launch("mask_positives_kernel", mask_positives_kernel, {dim3(blocks_for(p.m * p.positives.T, kThreads)), kThreads},
         where, p);
}

void reciprocal_potential(const ReciprocalPotential& p, const Where& where) {
  launch("reciprocal_potential_kernel", reciprocal_potential_kernel, {dim3(blocks_for(p.n, kThreads)), kThreads}, where,
         p);
}

void column_totals(const ColumnTotals& p, const Where& where) {
  launch("column_totals_kernel", column_totals_kernel, {dim3(blocks_for(p.n, kThreads)), kThreads}, where, p);
}

void total_potential(const TotalPotential& p, const Where& where) {
  launch("total_potential_kernel", total_potential_kernel, {dim3(blocks_for(p.n, kThreads)), kThreads}, where, p);
}

void divide_potential(const DividePotential& p, const Where& where) {
  launch("divide_potential_kernel", divide_potential_kernel, {dim3(blocks_for(p.n, kThreads)), kThreads}, where, p);
}

}  // namespace bam::cuda
