// Rows of embeddings, of any float type and strides.
#pragma once

#include "tile.cuh"

namespace bam::cuda {

constexpr double kNormFloor = 1e-12;  // shorter rows are divided by it

// Row i of x.
template <class T>
struct Row {
  __device__ Row(const Rows& x, int64_t i) : stride(x.feature_stride) {
    const int64_t view = i < x.per_view ? 0 : i / x.per_view;
    data = static_cast<const T*>(x.data) + view * x.view_stride + (i - view * x.per_view) * x.row_stride;
    aligned = stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  // The 8 features from `first` on, of d; 0 past the end.
  __device__ __forceinline__ void load(T (&raw)[kOctet], int64_t first, int64_t d) const {
    if (aligned && first + kOctet <= d) return load_octet(raw, data + first, kOctet, true, from_float<T>(0.0f));
    const T* at = data + first * stride;
#pragma unroll
    for (int k = 0; k < kOctet; ++k, at += stride) raw[k] = first + k < d ? *at : from_float<T>(0.0f);
  }
  const T* data;
  int64_t stride;
  bool aligned;
};

__device__ __forceinline__ bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Octets of contiguous float32; 0 past the end.
__device__ __forceinline__ void load_floats(float (&x)[kOctet], const float* from, int64_t first, int64_t d) {
  load_octet(x, from + first, d - first, is_aligned(from), 0.0f);
}

template <class Params>
using Kernel = void (*)(Params);

// The kernel for rows of a type.
template <class Params>
Kernel<Params> of_type(FloatType type, Kernel<Params> float32, Kernel<Params> float16, Kernel<Params> bfloat16) {
  return type == FloatType::kFloat32 ? float32 : type == FloatType::kFloat16 ? float16 : bfloat16;
}

}  // namespace bam::cuda
