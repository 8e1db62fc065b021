// What only a GPU has: approximate exponentials, copies in the background, warps and clusters. Without nvcc the
// same names are those of an emulator on the CPU, so that tests run whole kernels there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#ifdef __CUDACC__

#include "waits.cuh"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#endif

namespace bam::cuda {

constexpr int kWarp = 32;

using Arrival = uint64_t;

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

// 1 / sqrt(x) to one unit in the last place.
__device__ __forceinline__ double inverse_sqrt(double x) {
  return rsqrt(x);
}

// The block's shared memory, aligned to 16 bytes.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ int4 bam_shared[];
  return bam_shared;
}

// The first thing that a kernel does with memory that others use: see launch.cuh. What was written before, by whatever
// ran earlier in the stream, is seen after it; only then may the next kernel's blocks come on chip.
__device__ __forceinline__ void follow_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// 16 bytes to shared memory, both addresses aligned to 16; they are there for this thread after `wait_for_copies`.
__device__ __forceinline__ void copy_later(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but the last `kLeft` groups of this thread's copies are there.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Whether code for sm_90 or newer runs: bulk copies and arrivals below.
__device__ __forceinline__ constexpr bool has_arrivals() {
#if __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

// A barrier in shared memory of one phase after another: a phase ends when one thread has arrived, and when the bytes
// that were said to come in it have come. One thread begins it; others may use it after a barrier of theirs.
__device__ __forceinline__ void begin_arrival(Arrival* a) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(a)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void expect_bytes(Arrival* a, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(a)), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void arrive(Arrival* a) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(a)) : "memory");
#endif
}
// Bulk copies that a barrier of the block puts after this thread's stores to shared memory come after them.
__device__ __forceinline__ void order_before_bulk_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Waits for the end of a phase; phases are even and odd in turn, the first is even. What came in it is seen: by bulk
// copies of this block or, kCluster, from other blocks.
template <bool kCluster>
__device__ __forceinline__ void wait_for_arrival(Arrival* a, unsigned odd) {
#if __CUDA_ARCH__ >= 900
  const Deadline deadline;
  unsigned here = 0;
  while (!here) {
    if (kCluster)
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; "
          "}"
          : "=r"(here)
          : "r"(shared_address(a)), "r"(odd)
          : "memory");
    else
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
          : "=r"(here)
          : "r"(shared_address(a)), "r"(odd)
          : "memory");
    if (!here)
      deadline.check(kCluster ? "what blocks of the cluster send" : "a bulk copy",
                     shared_address(a) - shared_address(shared_memory()), odd);
  }
#endif
}
// Bytes from global memory to this block's shared memory; addresses and bytes are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, unsigned bytes, Arrival* a) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(a))
               : "memory");
#endif
}
// 16 bytes to where `to` is in block `rank` of the cluster, and to the phase of the arrival that is there where `a` is.
__device__ __forceinline__ void send_16_bytes(const float (&x)[4], float* to, Arrival* a, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, arrival;\n"
      "mapa.shared::cluster.u32 there, %4, %6;\n"
      "mapa.shared::cluster.u32 arrival, %5, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%0, %1, %2, %3}, [arrival];\n"
      "}" ::"f"(x[0]),
      "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(shared_address(to)), "r"(shared_address(a)), "r"(rank)
      : "memory");
#endif
}

// 16 bytes to global memory in one store, which the compiler splits in some of its own.
__device__ __forceinline__ void store_16_bytes(void* to, const int4& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// The upper half of `upper` over the lower, or the upper, half of `word`: one instruction.
__device__ __forceinline__ int32_t with_low_half(int32_t upper, int32_t word) {
  return static_cast<int32_t>(__byte_perm(static_cast<unsigned>(word), static_cast<unsigned>(upper), 0x7610));
}
__device__ __forceinline__ int32_t with_high_half(int32_t upper, int32_t word) {
  return static_cast<int32_t>(__byte_perm(static_cast<unsigned>(word), static_cast<unsigned>(upper), 0x7632));
}
// The lower half of `low` and, above it, that of `high`: one instruction.
__device__ __forceinline__ int32_t low_halves(int32_t low, int32_t high) {
  return static_cast<int32_t>(__byte_perm(static_cast<unsigned>(low), static_cast<unsigned>(high), 0x5410));
}
// The compiler does not put off what x is made of.
__device__ __forceinline__ void find_now(float& x) {
  asm volatile("" : "+f"(x));
}
// a * b, rounded before anything is added to it.
__device__ __forceinline__ float rounded_product(float a, float b) {
  return __fmul_rn(a, b);
}
// max(a, |b|), NaN where either is.
__device__ __forceinline__ float largest_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(fabsf(b)));
  return y;
}
// The least integer at or above x where |x| < 2^22, else a float at or near it. A rounding instruction would take the
// pipe of the exponentials.
__device__ __forceinline__ float ceil_fast(float x) {
  return __fadd_ru(x, 0x1.8p23f) - 0x1.8p23f;
}
// Two numbers rounded to a 16-bit type in one instruction, the first in the lower half.
__device__ __forceinline__ int32_t packed_halves(float low, float high) {
  int32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ int32_t packed_bfloats(float low, float high) {
  int32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ int count_bits(unsigned x) {
  return __popc(x);
}
// Whether one instruction finds the lower of two int16 in either half.
__device__ __forceinline__ constexpr bool has_packed_minimum() {
  return has_arrivals();
}
// The lower of two int16, in either half.
__device__ __forceinline__ uint32_t least_halves(uint32_t x, uint32_t y) {
  return __vmins2(x, y);
}
__device__ __forceinline__ float exchange(float x, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}
__device__ __forceinline__ double exchange(double x, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}
__device__ __forceinline__ float from_lane(float x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
__device__ __forceinline__ bool any_lane(bool x) {
  return __any_sync(0xffffffffu, x) != 0;
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

#else

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_fast(float x) {
  return log2f(x);
}
inline double inverse_sqrt(double x) {
  return 1.0 / sqrt(x);
}
inline void* shared_memory() {
  return emulator::shared_memory();
}
inline void follow_earlier_kernels() {
  emulator::follow_earlier_kernels();
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
inline bool has_arrivals() {
  return emulator::has_arrivals();
}
inline void order_before_bulk_copies() {}
inline void begin_arrival(Arrival* a) {
  emulator::begin_arrival(a);
}
inline void expect_bytes(Arrival* a, unsigned bytes) {
  emulator::expect_bytes(a, bytes);
}
inline void arrive(Arrival* a) {
  emulator::arrive(a);
}
template <bool kCluster>
void wait_for_arrival(Arrival* a, unsigned odd) {
  emulator::wait_for_arrival(a, odd != 0);
}
inline void copy_bulk(void* to, const void* from, unsigned bytes, Arrival* a) {
  emulator::copy_bulk(to, from, bytes, a);
}
inline void send_16_bytes(const float (&x)[4], float* to, Arrival* a, unsigned rank) {
  emulator::send_16_bytes(x, to, a, rank);
}
inline void store_16_bytes(void* to, const int4& x) {
  *static_cast<int4*>(to) = x;
}
inline int32_t with_low_half(int32_t upper, int32_t word) {
  return static_cast<int32_t>((static_cast<uint32_t>(upper) & 0xffff0000u) | (static_cast<uint32_t>(word) & 0xffffu));
}
inline int32_t with_high_half(int32_t upper, int32_t word) {
  return static_cast<int32_t>((static_cast<uint32_t>(upper) & 0xffff0000u) | static_cast<uint32_t>(word) >> 16);
}
inline int32_t low_halves(int32_t low, int32_t high) {
  return with_low_half(static_cast<int32_t>(static_cast<uint32_t>(high) << 16), low);
}
inline void find_now(float&) {}
inline float rounded_product(float a, float b) {
  const volatile float product = a * b;
  return product;
}
inline float largest_or_nan(float a, float b) {
  return a != a || b != b ? NAN : fmaxf(a, fabsf(b));
}
inline float ceil_fast(float x) {
  return ceilf(x);
}
inline int32_t packed_halves(float low, float high) {
  const __half both[2] = {__float2half_rn(low), __float2half_rn(high)};
  int32_t word;
  memcpy(&word, both, sizeof word);
  return word;
}
inline int32_t packed_bfloats(float low, float high) {
  const __nv_bfloat16 both[2] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
  int32_t word;
  memcpy(&word, both, sizeof word);
  return word;
}
inline int count_bits(unsigned x) {
  return __builtin_popcount(x);
}
inline bool has_packed_minimum() {
  return has_arrivals();
}
inline uint32_t least_halves(uint32_t x, uint32_t y) {
  const auto lower = [](uint32_t a, uint32_t b) {
    return static_cast<uint16_t>(static_cast<int16_t>(a) < static_cast<int16_t>(b) ? a : b);
  };
  return static_cast<uint32_t>(lower(x >> 16, y >> 16)) << 16 | lower(x, y);
}
inline float from_lane(float x, int lane) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = emulator::from_lane(bits, lane);
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline float exchange(float x, int lane_mask) {
  return from_lane(x, static_cast<int>(threadIdx.x % kWarp) ^ lane_mask);
}
inline bool any_lane(bool x) {
  float found = x ? 1.0f : 0.0f;
  for (int mask = 1; mask < kWarp; mask *= 2) found += exchange(found, mask);
  return found != 0.0f;
}
inline double exchange(double x, int lane_mask) {
  float halves[2];
  memcpy(halves, &x, sizeof x);
  for (float& half : halves) half = exchange(half, lane_mask);
  memcpy(&x, halves, sizeof x);
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

#endif

}  // namespace bam::cuda
