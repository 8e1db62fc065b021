// Values of all threads of a warp or a block combined in a fixed order, with one barrier at most. T() is neutral: what
// the place of a warp that is not there holds.
#pragma once

#include "intrinsics.cuh"

namespace bam::cuda {

struct Add {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};

// kValues values over groups of kLanes neighbouring lanes. Every lane of a group gets the same bits, since a step
// combines the same two values in both of its lanes.
template <int kLanes = kWarp, int kValues, class T, class Combine>
__device__ __forceinline__ void over_lanes(T (&x)[kValues], Combine combine) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int v = 0; v < kValues; ++v) x[v] = combine(x[v], exchange(x[v], offset));
}

// Over a block of up to kWarps warps, in every thread. `parts` has room for kWarps * kValues; it must not be in use.
template <int kWarps, int kValues, class T, class Combine>
__device__ __forceinline__ void over_block(T (&x)[kValues], T* parts, Combine combine) {
  over_lanes(x, combine);
  const unsigned lane = threadIdx.x % kWarp, place = lane % kWarps;
  if (lane == 0) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) parts[threadIdx.x / kWarp * kValues + v] = x[v];
  }
  sync_block();
#pragma unroll
  for (int v = 0; v < kValues; ++v) x[v] = place < blockDim.x / kWarp ? parts[place * kValues + v] : T();
  over_lanes<kWarps>(x, combine);
}

}  // namespace bam::cuda
