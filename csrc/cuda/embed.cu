// Embedding rows: the L2 normalisation, its gradient, and what scores against centred keys lack. One block a row; sums
// in double: rows of any finite magnitude. The second read of a row comes from the cache.
#include "launch.cuh"
#include "tile.cuh"

namespace bam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStepThreads = 1024;  // of the one block between two products
constexpr double kNormFloor = 1e-12;
constexpr double kLeastSquare = 1e-14;  // of a difference of unit rows, above a double's rounding of 1

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Extremes {
  float least, most;
};
struct Widest {
  __device__ Extremes operator()(Extremes a, Extremes b) const {
    return {fminf(a.least, b.least), fmaxf(a.most, b.most)};
  }
};

// Over the block, in a fixed order, the same in every thread.
template <class T, class Combine>
__device__ T over_block(T x, Combine combine) {
  T* parts = static_cast<T*>(shared_memory());
  sync_block();  // what was there has been read
  parts[threadIdx.x] = x;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    sync_block();
    if (threadIdx.x < half) parts[threadIdx.x] = combine(parts[threadIdx.x], parts[threadIdx.x + half]);
  }
  sync_block();
  return parts[0];
}

__device__ double block_sum(double x) {
  return over_block(x, Add());
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

// 2^power of row i: mantissa in [1, 2].
__device__ __forceinline__ void store_power(const Potential& row, int64_t i, double power) {
  const double whole = floor(power);
  row.exponent[i] = static_cast<float>(whole);
  row.mantissa[i] = exp2f(static_cast<float>(power - whole));
}

template <class T>
__global__ void __launch_bounds__(kThreads) normalize_kernel(const Normalize p) {
  follow_earlier_kernels();
  const Row<T> x(p.x, blockIdx.x);
  double squares = 0.0;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) squares += x[k] * x[k];
  const double norm = sqrt(block_sum(squares)), inverse = inverse_norm(norm);
  if (threadIdx.x == 0) p.norm[blockIdx.x] = norm;
  const int64_t first = blockIdx.x * p.d;
  if (!p.centre) {
    for (int64_t k = threadIdx.x; k < p.d; k += kThreads)
      static_cast<float*>(p.read)[first + k] = static_cast<float>(x[k] * inverse);
    return;
  }
  double along = 0.0, beyond = 0.0;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) {
    const double unit = x[k] * inverse, centre = p.centre[k], centred = unit - centre;
    along += unit * centre;
    beyond += centred * centre;
    static_cast<__half*>(p.read)[first + k] = __float2half_rn(static_cast<float>(centred * kUnitScale));
  }
  along = block_sum(along);
  beyond = block_sum(beyond);
  if (threadIdx.x != 0) return;
  p.bias[blockIdx.x] = static_cast<float>(beyond * (kUnitScale * kUnitScale));
  store_power(p.row, blockIdx.x, along * p.scale);
}

__global__ void __launch_bounds__(kThreads) centre_potential_kernel(const CentrePotential p) {
  follow_earlier_kernels();
  const float* read = p.read + blockIdx.x * p.d;
  double dot = 0.0;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) dot += static_cast<double>(read[k]) * p.centre[k];
  dot = block_sum(dot);
  if (threadIdx.x == 0) store_power(p.row, blockIdx.x, dot * p.scale);
}

// The least and the largest of n floats over the block.
__device__ Extremes block_extremes(const float* x, int64_t n) {
  constexpr int kAtOnce = 8;  // reads on their way: one after another their time would be most of the kernel's
  Extremes found = {INFINITY, -INFINITY};
  for (int64_t first = threadIdx.x; first < n; first += kAtOnce * static_cast<int64_t>(blockDim.x)) {
    float read[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t k = first + r * static_cast<int64_t>(blockDim.x);
      read[r] = x[k < n ? k : first];
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) found = Widest()(found, {read[r], read[r]});
  }
  return over_block(found, Widest());
}

// One block. Where all keys are the centre every product is 0, of whatever steps. A centre that is not a number gives
// no step.
__global__ void __launch_bounds__(kStepThreads) product_step_kernel(const ProductStep p) {
  follow_earlier_kernels();
  constexpr double kSquare = static_cast<double>(kUnitScale) * kUnitScale;
  double squares = 0.0;
  for (int64_t k = threadIdx.x; k < p.d; k += kStepThreads) squares += static_cast<double>(p.centre[k]) * p.centre[k];
  const double left = 1.0 - block_sum(squares);
  const Extremes keys = block_extremes(p.key_bias, p.n), rows = block_extremes(p.row_bias, p.m);
  if (threadIdx.x != 0) return;
  const double a = left == left ? sqrt(fmax(left - 2.0 / kSquare * keys.least, kLeastSquare)) : left;
  const double b = sqrt(fmax(left - 2.0 / kSquare * rows.least, kLeastSquare));
  const double bias = fmax(-static_cast<double>(keys.least), static_cast<double>(keys.most)) / kSquare;
  *p.step = static_cast<float>(fmin(a * b + bias, a) * (kSquare / kFixedSteps));
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

Shape rows_shape(int64_t m) {
  return {dim3(static_cast<unsigned>(m)), kThreads, kThreads * static_cast<int64_t>(sizeof(double))};
}

// One block for each of m rows of a type.
template <class Params>
void launch_rows(const char* name, void (*float32)(Params), void (*float16)(Params), void (*bfloat16)(Params),
                 FloatType type, int64_t m, const Where& where, const Params& params) {
  launch(name,
         type == FloatType::kFloat32   ? float32
         : type == FloatType::kFloat16 ? float16
                                       : bfloat16,
         rows_shape(m), where, params);
}

}  // namespace

void normalize(const Normalize& p, const Where& where) {
  launch_rows("normalize_kernel", normalize_kernel<float>, normalize_kernel<__half>, normalize_kernel<__nv_bfloat16>,
              p.x.type, p.m, where, p);
}

void product_step(const ProductStep& p, const Where& where) {
  launch("product_step_kernel", product_step_kernel,
         {dim3(1), kStepThreads, kStepThreads * static_cast<int64_t>(sizeof(double))}, where, p);
}

void centre_potential(const CentrePotential& p, const Where& where) {
  launch("centre_potential_kernel", centre_potential_kernel, rows_shape(p.m), where, p);
}

void project(const Project& p, const Where& where) {
  launch_rows("project_kernel", project_kernel<float>, project_kernel<__half>, project_kernel<__nv_bfloat16>, p.x.type,
              p.m, where, p);
}

}  // namespace bam::cuda
