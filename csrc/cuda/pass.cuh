// Some rows of a Sinkhorn pass whose scores are in shared memory: what a pass over a slab and the one-launch form
// share.
#pragma once

#include "arriving.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace bam::cuda {

// The column potential of a thread's columns; mantissa 0 past the last column.
struct OwnColumns {
  float exponent[kOwned], mantissa[kOwned];

  __device__ __forceinline__ void load(const Potential& col, int64_t first, int64_t n) {
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      const int64_t j = first + octet_place(q);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        exponent[q * kOctet + k] = j + k < n ? col.exponent[j + k] : 0.0f;
        mantissa[q * kOctet + k] = j + k < n ? col.mantissa[j + k] : 0.0f;
      }
    }
  }
};

// e_rj = 2^(scale*s_rj + col.exponent_j + exponent_r); total_r = sum_j e_rj * col.mantissa_j of this thread's columns.
template <class Score>
__device__ __forceinline__ void exponentials(const Score* rows, int64_t share, const OwnColumns& col, float scale,
                                             const float (&exponent)[kPassRows], float (&e)[kPassRows][kOwned],
                                             float (&total)[kPassRows]) {
#pragma unroll
  for (int r = 0; r < kPassRows; ++r) {
    total[r] = 0.0f;
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      float x[kOctet];
      load_scores(x, rows + r * share + octet_place(q));
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        const int own = q * kOctet + k;
        e[r][own] = exp2_fast(fmaf(x[k], scale, col.exponent[own] + exponent[r]));
        total[r] = fmaf(e[r][own], col.mantissa[own], total[r]);
      }
    }
  }
}

template <class Score>
__device__ __forceinline__ void largest_terms(const Score* rows, int64_t share, const OwnColumns& col, float scale,
                                              float (&most)[kPassRows]) {
#pragma unroll
  for (int r = 0; r < kPassRows; ++r) {
    most[r] = -INFINITY;
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      float x[kOctet];
      load_scores(x, rows + r * share + octet_place(q));
#pragma unroll
      for (int k = 0; k < kOctet; ++k) most[r] = fmaxf(most[r], fmaf(x[k], scale, col.exponent[q * kOctet + k]));
    }
  }
}

// c_j += sum_r e_rj / total_r, and the potentials of rows i .. i + count - 1; what is on chip past them is not looked
// at. `exponent` is a guess of theirs: a poor one costs time, never accuracy. The column sums lack the factor
// col.mantissa_j. A row with no key left gets an infinite potential and adds nothing.
template <class Score, bool kCluster>
__device__ __forceinline__ void pass_rows(const Score* rows, int64_t share, int64_t i, int count, const OwnColumns& col,
                                          float scale, float (&exponent)[kPassRows], const Potential& row,
                                          float (&c)[kOwned], RowTeam<kCluster>& team) {
  float e[kPassRows][kOwned], total[kPassRows];
  exponentials(rows, share, col, scale, exponent, e, total);
  team.reduce(total, Sum());
  bool poor = false;
#pragma unroll
  for (int r = 0; r < kPassRows; ++r) poor |= r < count && is_poor(total[r]);
  if (poor) {
    float most[kPassRows];
    largest_terms(rows, share, col, scale, most);
    team.reduce(most, Max());
#pragma unroll
    for (int r = 0; r < kPassRows; ++r) exponent[r] = exponent_of(most[r]);
    exponentials(rows, share, col, scale, exponent, e, total);
    team.reduce(total, Sum());
  }
#pragma unroll
  for (int r = 0; r < kPassRows; ++r) {
    if (r >= count) continue;
    const float inverse = inverse_or_zero(total[r]);
#pragma unroll
    for (int k = 0; k < kOwned; ++k) c[k] = fmaf(e[r][k], inverse, c[k]);
    if (threadIdx.x == static_cast<unsigned>(r) && (!kCluster || cluster_rank() == 0)) {
      const Power found = reciprocal(exponent[r], total[r]);
      row.exponent[i + r] = found.exponent;
      row.mantissa[i + r] = found.mantissa;
    }
  }
}

// A thread's columns of a row of floats.
__device__ __forceinline__ void store_own(float* row, const float (&x)[kOwned], int64_t first, int64_t n,
                                          bool aligned) {
#pragma unroll
  for (int q = 0; q < kOctets; ++q) {
    float part[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) part[k] = x[q * kOctet + k];
    store_floats(row + first + octet_place(q), part, n - first - octet_place(q), aligned);
  }
}

}  // namespace bam::cuda
