// What `match` does with the rows of an image, on chip or read again for every sum.
//
// G_v = (a_v A_v - Pbar_v) / (B tau) with Pbar_v = sum_{t != v} P_t / (L (V-1)), a_v its row sum; for V = 1 both are
// those of P_0. Masked scores are finite and exponentiate to 0: they add nothing anywhere.
#pragma once

#include "reduce.cuh"
#include "tile.cuh"

namespace bam::cuda {

struct MatchArguments {
  Match p;
  bool target_aligned, source_aligned, targets_aligned, gradient_aligned;
  bool gradient_cut;  // octets of it are stored one entry at a time
};

inline bool scores_aligned(const Scores& s) {
  return s.type == ScoreType::kInt16 ? is_aligned(static_cast<const int16_t*>(s.data), s.view_stride, s.row_stride)
                                     : is_aligned(static_cast<const float*>(s.data), s.view_stride, s.row_stride);
}

inline bool gradient_aligned(const Match& p) {
  return p.gradient_type == FloatType::kFloat32
             ? is_aligned(static_cast<const float*>(p.gradient), p.gradient_view_stride, p.gradient_row_stride)
             : is_aligned(static_cast<const int16_t*>(p.gradient), p.gradient_view_stride, p.gradient_row_stride);
}

// log2(p) where p > 0, whose product with p = 0 is 0.
__device__ __forceinline__ float log2_of(float p) {
  return log2_fast(fmaxf(p, kLeastNormal));
}

// Pbar_v sums over these targets, all but v; V = 1 implies L = 1.
__device__ __forceinline__ bool is_matched(int64_t t, int64_t v, int64_t V) {
  return t != v || V == 1;
}

// a_v: how many targets source view v is matched to, times pair_weight.
__device__ __forceinline__ float row_sum_of_targets(int64_t v, const Match& p) {
  return (v < p.L && p.V > 1 ? p.L - 1 : p.L) * p.pair_weight;
}

// x in a 16-bit float type, as its bits.
__device__ __forceinline__ int16_t half_bits(float x, FloatType type) {
  int16_t bits;
  if (type == FloatType::kFloat16) {
    const __half rounded = __float2half_rn(x);
    memcpy(&bits, &rounded, sizeof bits);
  } else {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(x);
    memcpy(&bits, &rounded, sizeof bits);
  }
  return bits;
}

// Where the gradient of a row begins.
__device__ __forceinline__ int64_t gradient_row(const Match& p, int64_t v, int64_t i) {
  return v * p.gradient_view_stride + i * p.gradient_row_stride;
}

// The octet that begins at entry `at` of a gradient of this type, in stores of 16 bytes.
template <FloatType kType>
__device__ __forceinline__ void store_whole_gradient(const Match& p, int64_t at, const float (&g)[kOctet]) {
  if constexpr (kType == FloatType::kFloat32) store_octet(static_cast<float*>(p.gradient) + at, g, kOctet, true);
  else if constexpr (kType == FloatType::kFloat16)
    store_16_bytes(static_cast<int16_t*>(p.gradient) + at, {packed_halves(g[0], g[1]), packed_halves(g[2], g[3]),
                                                            packed_halves(g[4], g[5]), packed_halves(g[6], g[7])});
  else
    store_16_bytes(static_cast<int16_t*>(p.gradient) + at, {packed_bfloats(g[0], g[1]), packed_bfloats(g[2], g[3]),
                                                            packed_bfloats(g[4], g[5]), packed_bfloats(g[6], g[7])});
}
__device__ __forceinline__ void store_whole_gradient(const Match& p, int64_t at, const float (&g)[kOctet]) {
  if (p.gradient_type == FloatType::kFloat32) store_whole_gradient<FloatType::kFloat32>(p, at, g);
  else if (p.gradient_type == FloatType::kFloat16) store_whole_gradient<FloatType::kFloat16>(p, at, g);
  else store_whole_gradient<FloatType::kBFloat16>(p, at, g);
}

// The octet at column j of the gradient that begins at `row`.
__device__ __forceinline__ void store_gradient(const Match& p, int64_t row, int64_t j, const float (&g)[kOctet],
                                               bool aligned) {
  const int64_t at = row + j, left = p.n - j;
  if (aligned && left >= kOctet) {
    store_whole_gradient(p, at, g);
    return;
  }
  if (p.gradient_type == FloatType::kFloat32) {
    store_octet(static_cast<float*>(p.gradient) + at, g, left, false);
    return;
  }
  int16_t* to = static_cast<int16_t*>(p.gradient) + at;
#pragma unroll
  for (int k = 0; k < kOctet; ++k)
    if (k < left) to[k] = half_bits(g[k], p.gradient_type);
}

// The sums over an image's source rows.
struct SourceSums {
  float lse = 0.0f, entropy = 0.0f;

  // Of the row with e_j = 2^(its logarithm + exponent), sum_j e_j = total and sum_j e_j log2(e_j) = dot.
  __device__ __forceinline__ void add(float a, float exponent, float total, float dot) {
    lse += a * kLn2 * (log2f(total) - exponent);
    entropy += entropy_of(total, dot);
  }
};

void match_long(const MatchArguments&, const Where&);

}  // namespace bam::cuda
