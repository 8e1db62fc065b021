// Embeddings to centred unit rows in fp16 and inverse norms: one block a row, the row read once where it fits in
// registers (d <= 4096), else twice.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.cuh"
#include "cuda.h"

namespace bam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 16;  // values a thread keeps in registers
constexpr float kNormFloor = 1e-12f;

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Maximum or sum over the block, the same value in every thread.
template <class Combine>
__device__ float block_reduce(float x, Combine combine) {
  __shared__ float per_warp[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = per_warp[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) x = combine(x, per_warp[warp]);
  return x;
}

template <class Input>
__global__ void __launch_bounds__(kThreads) unit_rows_kernel(const Input* x, int64_t d, int64_t row_stride,
                                                             const float* centre, __half* unit, float* inverse_norm) {
  const Input* row = x + blockIdx.x * row_stride;
  __half* out = unit + blockIdx.x * d;
  float held[kHeld];
  float largest = 0.0f;
#pragma unroll
  for (int q = 0; q < kHeld; ++q) {
    const int64_t k = threadIdx.x + static_cast<int64_t>(q) * kThreads;
    held[q] = k < d ? to_float(row[k]) : 0.0f;
    largest = fmaxf(largest, fabsf(held[q]));
  }
  for (int64_t k = threadIdx.x + static_cast<int64_t>(kHeld) * kThreads; k < d; k += kThreads)
    largest = fmaxf(largest, fabsf(to_float(row[k])));
  largest = block_reduce(largest, [](float a, float b) { return fmaxf(a, b); });

  // Scaled by a power of two near the largest entry, so that no square overflows or vanishes.
  const float scale = largest > 0.0f ? exp2f(-ilogbf(largest)) : 1.0f;
  float squares = 0.0f;
#pragma unroll
  for (int q = 0; q < kHeld; ++q) squares += (held[q] * scale) * (held[q] * scale);
  for (int64_t k = threadIdx.x + static_cast<int64_t>(kHeld) * kThreads; k < d; k += kThreads) {
    const float value = to_float(row[k]) * scale;
    squares += value * value;
  }
  squares = block_reduce(squares, [](float a, float b) { return a + b; });

  const float norm = sqrtf(squares) / scale;
  const bool has_direction = norm >= kNormFloor;
  const float factor = has_direction ? kUnitScale / sqrtf(squares) : kUnitScale / kNormFloor / scale;
  if (threadIdx.x == 0) inverse_norm[blockIdx.x] = has_direction ? 1.0f / norm : 0.0f;
#pragma unroll
  for (int q = 0; q < kHeld; ++q) {
    const int64_t k = threadIdx.x + static_cast<int64_t>(q) * kThreads;
    if (k < d) out[k] = __float2half_rn(held[q] * scale * factor - (centre ? kUnitScale * centre[k] : 0.0f));
  }
  for (int64_t k = threadIdx.x + static_cast<int64_t>(kHeld) * kThreads; k < d; k += kThreads)
    out[k] = __float2half_rn(to_float(row[k]) * scale * factor - (centre ? kUnitScale * centre[k] : 0.0f));
}

template <class Input>
void launch(const UnitRows& p, cudaStream_t stream) {
  unit_rows_kernel<Input><<<static_cast<unsigned>(p.m), kThreads, 0, stream>>>(
      static_cast<const Input*>(p.x), p.d, p.row_stride, p.centre, static_cast<__half*>(p.unit), p.inverse_norm);
}

}  // namespace

void unit_rows(const UnitRows& p, int device, void* stream) {
  if (p.m == 0) return;
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case InputType::kFloat32: launch<float>(p, on); break;
    case InputType::kFloat16: launch<__half>(p, on); break;
    case InputType::kBFloat16: launch<__nv_bfloat16>(p, on); break;
  }
  check(cudaGetLastError(), "unit_rows_kernel with " + std::to_string(p.m) + " blocks of " + std::to_string(kThreads) +
                                " threads, d=" + std::to_string(p.d));
}

}  // namespace bam::cuda
