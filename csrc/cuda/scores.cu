// What makes scores of products where no sum is taken in the same read, and the steps of column potentials.
#include "launch.cuh"
#include "tile.cuh"

namespace bam::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__global__ void __launch_bounds__(kThreads) quantize_kernel(const Quantize p) {
  const int64_t i = blockIdx.y, j = thread_index();
  if (j < p.n) p.out[i * p.out_stride + j] = to_fixed(p.scores[i * p.row_stride + j], 1.0f / number(p.step));
}

// Thread (i, t) masks key view t of row i's image.
template <class Score>
__global__ void __launch_bounds__(kThreads) mask_positives_kernel(const MaskPositives p) {
  const Positives& of = p.positives;
  const int64_t i = thread_index() / of.T, t = thread_index() % of.T;
  if (i >= p.m) return;
  const int64_t image = (of.first + i % of.period) % of.B;
  Score* row = static_cast<Score*>(const_cast<void*>(p.scores.data)) + i * p.scores.row_stride;
  row[of.own_columns + t * of.B + image] = masked_score<Score>();
}

// 1 / (sum * 2^shift); 1 for an empty column, which has no entry to scale.
__global__ void __launch_bounds__(kThreads) reciprocal_potential_kernel(const ReciprocalPotential p) {
  const int64_t j = thread_index();
  if (j >= p.n) return;
  const Power found = column_potential(p.shift[j], p.sum[j]);
  p.col.exponent[j] = found.exponent;
  p.col.mantissa[j] = found.mantissa;
}

__global__ void __launch_bounds__(kThreads) divide_potential_kernel(const DividePotential p) {
  const int64_t j = thread_index();
  if (j >= p.n) return;
  const Power found = divided({p.col.exponent[j], p.col.mantissa[j]}, p.c[j]);
  p.col.exponent[j] = found.exponent;
  p.col.mantissa[j] = found.mantissa;
}

}  // namespace

void quantize(const Quantize& p, const Where& where) {
  // Rows are blocks along y, of which there are at most 65535.
  constexpr int64_t kMostRows = 65535;
  for (int64_t first = 0; first < p.m; first += kMostRows) {
    Quantize part = p;
    part.scores += first * p.row_stride;
    part.out += first * p.out_stride;
    part.m = p.m - first < kMostRows ? p.m - first : kMostRows;
    launch("quantize_kernel", quantize_kernel,
           {dim3(blocks_for(p.n, kThreads), static_cast<unsigned>(part.m)), kThreads}, where, part);
  }
}

void mask_positives(const MaskPositives& p, const Where& where) {
  const Shape shape = {dim3(blocks_for(p.m * p.positives.T, kThreads)), kThreads};
  if (p.scores.type == ScoreType::kInt16)
    launch("mask_positives_kernel<int16>", mask_positives_kernel<int16_t>, shape, where, p);
  else launch("mask_positives_kernel<float32>", mask_positives_kernel<float>, shape, where, p);
}

void reciprocal_potential(const ReciprocalPotential& p, const Where& where) {
  launch("reciprocal_potential_kernel", reciprocal_potential_kernel, {dim3(blocks_for(p.n, kThreads)), kThreads}, where,
         p);
}

void divide_potential(const DividePotential& p, const Where& where) {
  launch("divide_potential_kernel", divide_potential_kernel, {dim3(blocks_for(p.n, kThreads)), kThreads}, where, p);
}

}  // namespace bam::cuda
