// Embedding rows: the L2 normalisation, its gradient, and the row potential of scores against centred keys. One block a
// row; sums in double: rows of any finite magnitude. The second read of a row comes from the cache.
#include "launch.cuh"
#include "tile.cuh"

namespace bam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr double kNormFloor = 1e-12;

// The sum over the block, in a fixed order, the same in every thread.
__device__ double block_sum(double x) {
  double* parts = static_cast<double*>(shared_memory());
  parts[threadIdx.x] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    sync_block();
    if (threadIdx.x < static_cast<unsigned>(half)) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  sync_block();
  return parts[0];
}

// 1 / max(norm, floor); NaN where the norm is NaN.
__device__ __forceinline__ double inverse_norm(double norm) {
  return norm > kNormFloor || norm != norm ? 1.0 / norm : 1.0 / kNormFloor;
}

template <class T>
__global__ void __launch_bounds__(kThreads) normalize_kernel(const Normalize p) {
  const T* x = static_cast<const T*>(p.x.data) + blockIdx.x * p.x.row_stride;
  double squares = 0.0;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) {
    const double value = as_float(x[k]);
    squares += value * value;
  }
  const double norm = sqrt(block_sum(squares)), inverse = inverse_norm(norm);
  if (threadIdx.x == 0) p.norm[blockIdx.x] = norm;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) {
    const double unit = as_float(x[k]) * inverse;
    const int64_t at = blockIdx.x * p.d + k;
    if (p.unit) p.unit[at] = static_cast<float>(unit);
    if (p.unit_16) {
      const double centred = p.centre ? unit - p.centre[k] : unit;
      static_cast<__half*>(p.unit_16)[at] = __float2half_rn(static_cast<float>(centred * kUnitScale));
    }
  }
}

// 2^(scale * <unit_i, centre>), mantissa in [1, 2].
template <class T>
__global__ void __launch_bounds__(kThreads) centre_potential_kernel(const CentrePotential p) {
  const T* x = static_cast<const T*>(p.x.data) + blockIdx.x * p.x.row_stride;
  double dot = 0.0;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) dot += static_cast<double>(as_float(x[k])) * p.centre[k];
  dot = block_sum(dot);
  if (threadIdx.x != 0) return;
  const double power = dot * (p.norm ? inverse_norm(p.norm[blockIdx.x]) : 1.0) * p.scale, whole = floor(power);
  p.row.exponent[blockIdx.x] = static_cast<float>(whole);
  p.row.mantissa[blockIdx.x] = exp2f(static_cast<float>(power - whole));
}

template <class T>
__global__ void __launch_bounds__(kThreads) project_kernel(const Project p) {
  const T* x = static_cast<const T*>(p.x.data) + blockIdx.x * p.x.row_stride;
  float* d = p.d + blockIdx.x * p.d_features;
  const double norm = p.norm[blockIdx.x];
  const double inverse = norm < kNormFloor ? 0.0 : 1.0 / norm, of_unit = p.is_unit ? 1.0 : inverse;
  double dot = 0.0;
  for (int64_t k = threadIdx.x; k < p.d_features; k += kThreads)
    dot += static_cast<double>(d[k]) * (as_float(x[k]) * of_unit);
  const double along = block_sum(dot);
  for (int64_t k = threadIdx.x; k < p.d_features; k += kThreads)
    d[k] = static_cast<float>((d[k] - along * (as_float(x[k]) * of_unit)) * inverse);
}

Shape shape_of(int64_t m) {
  return {dim3(static_cast<unsigned>(m)), kThreads, kThreads * static_cast<int64_t>(sizeof(double))};
}

}  // namespace

void normalize(const Normalize& p, const Where& where) {
  switch (p.x.type) {
    case FloatType::kFloat32:
      launch("normalize_kernel<float32>", normalize_kernel<float>, shape_of(p.m), where, p);
      break;
    case FloatType::kFloat16:
      launch("normalize_kernel<float16>", normalize_kernel<__half>, shape_of(p.m), where, p);
      break;
    case FloatType::kBFloat16:
      launch("normalize_kernel<bfloat16>", normalize_kernel<__nv_bfloat16>, shape_of(p.m), where, p);
      break;
  }
}

void centre_potential(const CentrePotential& p, const Where& where) {
  switch (p.x.type) {
    case FloatType::kFloat32:
      launch("centre_potential_kernel<float32>", centre_potential_kernel<float>, shape_of(p.m), where, p);
      break;
    case FloatType::kFloat16:
      launch("centre_potential_kernel<float16>", centre_potential_kernel<__half>, shape_of(p.m), where, p);
      break;
    case FloatType::kBFloat16:
      launch("centre_potential_kernel<bfloat16>", centre_potential_kernel<__nv_bfloat16>, shape_of(p.m), where, p);
      break;
  }
}

void project(const Project& p, const Where& where) {
  switch (p.x.type) {
    case FloatType::kFloat32: launch("project_kernel<float32>", project_kernel<float>, shape_of(p.m), where, p); break;
    case FloatType::kFloat16: launch("project_kernel<float16>", project_kernel<__half>, shape_of(p.m), where, p); break;
    case FloatType::kBFloat16:
      launch("project_kernel<bfloat16>", project_kernel<__nv_bfloat16>, shape_of(p.m), where, p);
      break;
  }
}

}  // namespace bam::cuda
