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
};

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

__device__ __forceinline__ void store_gradient(const Match& p, int64_t v, int64_t i, int64_t j,
                                               const float (&g)[kOctet], bool aligned) {
  const int64_t at = v * p.gradient_view_stride + i * p.gradient_row_stride + j, left = p.n - j;
  switch (p.gradient_type) {
    case FloatType::kFloat32: store_floats(static_cast<float*>(p.gradient) + at, g, left, aligned); break;
    case FloatType::kFloat16: store_floats(static_cast<__half*>(p.gradient) + at, g, left, aligned); break;
    case FloatType::kBFloat16: store_floats(static_cast<__nv_bfloat16*>(p.gradient) + at, g, left, aligned); break;
  }
}

// The sums over an image's source rows.
struct SourceSums {
  float exponent = 0.0f;  // of the last row, a guess for the next
  float lse = 0.0f, entropy = 0.0f;

  // of the row with sum_j e_j = total and sum_j e_j log2(e_j) = dot
  __device__ __forceinline__ void add(float a, float total, float dot) {
    lse += a * kLn2 * (log2f(total) - exponent);
    entropy += entropy_of(total, dot);
  }
};

void match_long(const MatchArguments&, const Where&);

}  // namespace bam::cuda
