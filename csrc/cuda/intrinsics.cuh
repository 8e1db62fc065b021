// What only a GPU has: approximate exponentials, copies in the background, warps, clusters and grids. Without nvcc the
// same names are those of an emulator on the CPU, so that tests run whole kernels there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#ifdef __CUDACC__
#include <cooperative_groups.h>
#else
#include <cmath>
#endif

namespace bam::cuda {

constexpr int kWarp = 32;

#ifdef __CUDACC__

// 2^x to two units in the last place; what would be below 2^-126 is 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) of a normal x.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The block's shared memory, aligned to 16 bytes.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ int4 bam_shared[];
  return bam_shared;
}

// 16 bytes to shared memory, both addresses aligned to 16; they are there for this thread after `wait_for_copies`.
__device__ __forceinline__ void copy_later(void* to, const void* from) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but the last `kLeft` groups of this thread's copies are there.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// 16 bytes to global memory in one store, which the compiler splits in some of its own.
__device__ __forceinline__ void store_16_bytes(void* to, const int4& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ int count_bits(unsigned x) {
  return __popc(x);
}
__device__ __forceinline__ float exchange(float x, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}
__device__ __forceinline__ void sync_block() {
  __syncthreads();
}

// Clusters: on devices before sm_90 a block is its own cluster.
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return __clusterRelativeBlockRank();
#else
  return 0;
#endif
}
__device__ __forceinline__ unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  return __clusterSizeInBlocks();
#else
  return 1;
#endif
}
// Writes before it, to shared memory of the cluster and to global memory, are seen after it.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}
// The address in block `rank` of the cluster of what lies at `mine` in this one.
template <class T>
__device__ __forceinline__ T* in_block(T* mine, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(mine, rank));
#else
  return mine;
#endif
}

// All blocks of a cooperative launch.
__device__ __forceinline__ void sync_grid() {
  cooperative_groups::this_grid().sync();
}

#else

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_fast(float x) {
  return log2f(x);
}
inline void* shared_memory() {
  return emulator::shared_memory();
}
inline void copy_later(void* to, const void* from) {
  emulator::copy_16_bytes_later(to, from);
}
inline void commit_copies() {
  emulator::commit_copies();
}
template <int kLeft>
void wait_for_copies() {
  emulator::wait_for_copies(kLeft);
}
inline void store_16_bytes(void* to, const int4& x) {
  *static_cast<int4*>(to) = x;
}
inline int count_bits(unsigned x) {
  return __builtin_popcount(x);
}
inline float exchange(float x, int lane_mask) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = emulator::exchange(bits, lane_mask);
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline void sync_block() {
  emulator::sync_block();
}
inline unsigned cluster_rank() {
  return emulator::cluster_rank();
}
inline unsigned cluster_size() {
  return emulator::cluster_size();
}
inline void sync_cluster() {
  emulator::sync_cluster();
}
template <class T>
T* in_block(T* mine, unsigned rank) {
  return static_cast<T*>(emulator::in_block(mine, rank));
}
inline void sync_grid() {
  emulator::sync_grid();
}

#endif

}  // namespace bam::cuda
