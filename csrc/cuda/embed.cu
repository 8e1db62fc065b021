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

// Row i of x.
template <class T>
struct Row {
  __device__ Row(const Rows& x, int64_t i)
      : data(static_cast<const T*>(x.data) + i / x.per_view * x.view_stride + i % x.per_view * x.row_stride),
        stride(x.feature_stride) {}
  __device__ double operator[](int64_t k) const { return as_float(data[k * stride]); }
  const T* data;
  int64_t stride;
};

template <class T>
__global__ void __launch_bounds__(kThreads) normalize_kernel(const Normalize p) {
  follow_earlier_kernels();
  const Row<T> x(p.x, blockIdx.x);
  double squares = 0.0;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) squares += x[k] * x[k];
  const double norm = sqrt(block_sum(squares)), inverse = inverse_norm(norm);
  if (threadIdx.x == 0) p.norm[blockIdx.x] = norm;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) {
    const double unit = x[k] * inverse - (p.centre ? p.centre[k] : 0.0f);
    const int64_t at = blockIdx.x * p.d + k;
    if (p.read_type == FloatType::kFloat32) static_cast<float*>(p.read)[at] = static_cast<float>(unit);
    else static_cast<__half*>(p.read)[at] = __float2half_rn(static_cast<float>(unit * kUnitScale));
  }
}

// Mantissa in [1, 2].
template <class T>
__global__ void __launch_bounds__(kThreads) centre_potential_kernel(const CentrePotential p) {
  follow_earlier_kernels();
  const Row<T> read(p.read, blockIdx.x);
  double dot = 0.0;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) dot += read[k] * p.centre[k];
  dot = block_sum(dot);
  if (threadIdx.x != 0) return;
  const double power = dot * p.scale, whole = floor(power);
  p.row.exponent[blockIdx.x] = static_cast<float>(whole);
  p.row.mantissa[blockIdx.x] = exp2f(static_cast<float>(power - whole));
}

template <class T>
__global__ void __launch_bounds__(kThreads) project_kernel(const Project p) {
  follow_earlier_kernels();
  const Row<T> x(p.x, blockIdx.x);
  float* d = p.d + blockIdx.x * p.d_features;
  const double norm = p.norm[blockIdx.x], inverse = norm < kNormFloor ? 0.0 : 1.0 / norm;
  double dot = 0.0;
  for (int64_t k = threadIdx.x; k < p.d_features; k += kThreads) dot += d[k] * (x[k] * inverse);
  const double along = block_sum(dot);
  for (int64_t k = threadIdx.x; k < p.d_features; k += kThreads)
    d[k] = static_cast<float>((d[k] - along * (x[k] * inverse)) * (inverse * p.factor));
}

// One block for each of m rows of a type.
template <class Params>
void launch_rows(const char* name, void (*float32)(Params), void (*float16)(Params), void (*bfloat16)(Params),
                 FloatType type, int64_t m, const Where& where, const Params& params) {
  const Shape shape = {dim3(static_cast<unsigned>(m)), kThreads, kThreads * static_cast<int64_t>(sizeof(double))};
  launch(name,
         type == FloatType::kFloat32   ? float32
         : type == FloatType::kFloat16 ? float16
                                       : bfloat16,
         shape, where, params);
}

}  // namespace

void normalize(const Normalize& p, const Where& where) {
  launch_rows("normalize_kernel", normalize_kernel<float>, normalize_kernel<__half>, normalize_kernel<__nv_bfloat16>,
              p.x.type, p.m, where, p);
}

void centre_potential(const CentrePotential& p, const Where& where) {
  launch_rows("centre_potential_kernel", centre_potential_kernel<float>, centre_potential_kernel<__half>,
              centre_potential_kernel<__nv_bfloat16>, p.read.type, p.m, where, p);
}

void project(const Project& p, const Where& where) {
  launch_rows("project_kernel", project_kernel<float>, project_kernel<__half>, project_kernel<__nv_bfloat16>, p.x.type,
              p.m, where, p);
}

}  // namespace bam::cuda
