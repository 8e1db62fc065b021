// Octets of columns: 16-byte loads and stores where rows are aligned, one entry at a time where they are not or end.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda.h"
#include "intrinsics.cuh"
#include "row.cuh"

namespace bam::cuda {

template <class T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
__device__ __forceinline__ float as_float(float x) {
  return x;
}
__device__ __forceinline__ float as_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float as_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

__device__ __forceinline__ float number(const Scalar& s) {
  return s.pointer ? s.factor * *s.pointer : s.factor;
}

// Whether all rows begin where 16 bytes do.
template <class T>
inline bool is_aligned(const T* data, int64_t view_stride, int64_t row_stride) {
  constexpr int64_t per_16_bytes = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && view_stride % per_16_bytes == 0 &&
         row_stride % per_16_bytes == 0;
}

template <class T>
struct Chunk {
  static constexpr int kCount = 16 / sizeof(T), kPerOctet = kOctet / kCount;
};

// x = the 8 entries at `from`, those from `left` on `missing`.
template <class T>
__device__ __forceinline__ void load_octet(T (&x)[kOctet], const T* from, int64_t left, bool aligned, T missing) {
  if (aligned && left >= kOctet) {
#pragma unroll
    for (int c = 0; c < Chunk<T>::kPerOctet; ++c) {
      const int4 bits = reinterpret_cast<const int4*>(from)[c];
      memcpy(x + c * Chunk<T>::kCount, &bits, sizeof bits);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kOctet; ++k) x[k] = k < left ? from[k] : missing;
}

// 16 bytes of entries.
template <class T>
__device__ __forceinline__ int4 packed(const T* x) {
  int4 bits;
  memcpy(&bits, x, sizeof bits);
  return bits;
}
__device__ __forceinline__ int packed(int16_t low, int16_t high) {
  return static_cast<int>(static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16 | static_cast<uint16_t>(low));
}
__device__ __forceinline__ int4 packed(const int16_t* x) {
  return {packed(x[0], x[1]), packed(x[2], x[3]), packed(x[4], x[5]), packed(x[6], x[7])};
}

template <class T>
__device__ __forceinline__ void store_octet(T* to, const T (&x)[kOctet], int64_t left, bool aligned) {
  if (aligned && left >= kOctet) {
#pragma unroll
    for (int c = 0; c < Chunk<T>::kPerOctet; ++c)
      store_16_bytes(to + c * Chunk<T>::kCount, packed(x + c * Chunk<T>::kCount));
    return;
  }
#pragma unroll
  for (int k = 0; k < kOctet; ++k)
    if (k < left) to[k] = x[k];
}

// Scores as floats, those from `left` on masked.
template <class Score>
__device__ __forceinline__ void load_scores(float (&x)[kOctet], const Score* from, int64_t left, bool aligned) {
  Score raw[kOctet];
  load_octet(raw, from, left, aligned, masked_score<Score>());
#pragma unroll
  for (int k = 0; k < kOctet; ++k) x[k] = value_of(raw[k]);
}

// The same from an octet in shared memory.
__device__ __forceinline__ void load_scores(float (&x)[kOctet], const float* shared) {
  load_octet(x, shared, kOctet, true, kMaskedScore);
}
__device__ __forceinline__ void load_scores(float (&x)[kOctet], const int16_t* shared) {
  int32_t words[kOctet / 2];
  memcpy(words, __builtin_assume_aligned(shared, 16), sizeof words);
#pragma unroll
  for (int w = 0; w < kOctet / 2; ++w) {
    const int32_t flipped = words[w] ^ static_cast<int32_t>(0x80008000);
    x[2 * w] = value_of_bits(with_low_half(kTwo23Bits, flipped));
    x[2 * w + 1] = value_of_bits(with_high_half(kTwo23Bits, flipped));
  }
}

// Octets in shared memory whose scores are read as they are, in half the instructions that a look at each takes: few
// are masked. What was read since `begin` may have had a masked score where `any` says so.
template <class Score>
class Unmasked;

// Masked scores of this type are finite and exponentiate to 0, as all others do that are as low.
template <>
class Unmasked<float> {
 public:
  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void load(float (&x)[kOctet], const float* shared) { load_scores(x, shared); }
  __device__ __forceinline__ bool any() const { return false; }
};

template <>
class Unmasked<int16_t> {
 public:
  __device__ __forceinline__ void begin() { noted_ = 0; }

  __device__ __forceinline__ void load(float (&x)[kOctet], const int16_t* shared) {
    uint32_t words[kOctet / 2];
    memcpy(words, __builtin_assume_aligned(shared, 16), sizeof words);
#pragma unroll
    for (int w = 0; w < kOctet / 2; ++w) {
      const uint32_t flipped = words[w] ^ 0x80008000u;
      note(words[w], flipped);
      x[2 * w] = plain_value_of_bits(with_low_half(kTwo23Bits, static_cast<int32_t>(flipped)));
      x[2 * w + 1] = plain_value_of_bits(with_high_half(kTwo23Bits, static_cast<int32_t>(flipped)));
    }
  }

  __device__ __forceinline__ bool any() const {
    const uint32_t flipped = noted_ ^ 0x80008000u;
    return has_packed_minimum() ? has_zero_half(flipped) != 0 : noted_ != 0;
  }

 private:
  static_assert(kMaskedFixed == -32768, "flipped, it is 0");

  // A bit where a half may be 0: where the lower one is, the higher one may look so.
  static __device__ __forceinline__ uint32_t has_zero_half(uint32_t x) { return (x - 0x00010001u) & ~x & 0x80008000u; }

  __device__ __forceinline__ void note(uint32_t word, uint32_t flipped) {
    if (has_packed_minimum()) noted_ = least_halves(noted_, word);
    else noted_ |= has_zero_half(flipped);
  }

  uint32_t noted_;  // the lowest score in either half; on devices that are slow at that, what has_zero_half found
};

// Terms of masked scores become 0.
__device__ __forceinline__ void clear_masked(float*, const float*) {}
__device__ __forceinline__ void clear_masked(float* e, const int16_t* shared) {
  uint32_t words[kOctet / 2];
  memcpy(words, __builtin_assume_aligned(shared, 16), sizeof words);
#pragma unroll
  for (int w = 0; w < kOctet / 2; ++w) {
    if (words[w] << 16 == 0x80000000u) e[2 * w] = 0.0f;
    if ((words[w] & 0xffff0000u) == 0x80000000u) e[2 * w + 1] = 0.0f;
  }
}

// Floats of any type.
template <class T>
__device__ __forceinline__ void store_floats(T* to, const float (&x)[kOctet], int64_t left, bool aligned) {
  T out[kOctet];
#pragma unroll
  for (int k = 0; k < kOctet; ++k) out[k] = from_float<T>(x[k]);
  store_octet(to, out, left, aligned);
}

}  // namespace bam::cuda
