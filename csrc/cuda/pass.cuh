// Some rows of a Sinkhorn pass whose scores are in shared memory, and a thread's own columns, which the match uses too.
#pragma once

#include "arriving.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace bam::cuda {

// The column potential of a thread's columns; mantissa 0 past the last column.
struct OwnColumns {
  float exponent[kOwned], mantissa[kOwned];

  __device__ __forceinline__ void load(const Potential& col, int64_t first, int64_t n) {
    load(exponent, col.exponent, first, n);
    load(mantissa, col.mantissa, first, n);
  }

 private:
  static __device__ __forceinline__ void load(float (&x)[kOwned], const float* of_columns, int64_t first, int64_t n) {
    const bool aligned = reinterpret_cast<uintptr_t>(of_columns) % 16 == 0;
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      const int64_t j = first + octet_place(q);
      float part[kOctet];
      load_octet(part, of_columns + j, n - j, aligned, 0.0f);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) x[q * kOctet + k] = part[k];
    }
  }
};

// kRows rows at a time: their exponentials and the sums of the columns fill a thread's registers, so the potentials of
// its columns are in shared memory, which it alone reads.
template <class Score, int kRows, bool kCluster>
class Group {
 public:
  // potentials: 2 kOwned floats a thread
  __device__ __forceinline__ Group(float4* potentials, RowTeam<kCluster>& team)
      : potentials_(potentials), team_(team) {}

  __device__ __forceinline__ void load(const Potential& col, int64_t first, int64_t n) {
    OwnColumns own;
    own.load(col, first, n);
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      four(f) = {own.exponent[4 * f], own.exponent[4 * f + 1], own.exponent[4 * f + 2], own.exponent[4 * f + 3]};
      four(kFours + f) = {own.mantissa[4 * f], own.mantissa[4 * f + 1], own.mantissa[4 * f + 2],
                          own.mantissa[4 * f + 3]};
    }
#pragma unroll
    for (int k = 0; k < kOwned; ++k) c_[k] = 0.0f;
  }

  // c_j += sum_r e_rj / total_r, and the potentials of rows i .. i + count - 1; what is on chip past them is not looked
  // at. `exponent`, of row i + r in lane r, is a guess of theirs: a poor one costs time, never accuracy. A row with no
  // key left gets an infinite potential and adds nothing.
  __device__ __forceinline__ void pass(const Score* rows, int64_t i, int count, float scale, float exponent,
                                       const Potential& row) {
    // Lane l looks after row l % kRows.
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    float e[kRows][kOwned], total;
#pragma unroll 1
    for (bool again = false;; again = true) {
      if (again) exponent = better_exponent(rows, scale);
      float totals[kRows];
      exponentials(rows, scale, exponent, e, totals);
      total = team_.reduce_to_lanes(totals, Sum());
      if (again || !any_lane(lane % kRows < count && is_poor(total))) break;
    }
    const float inverse_of_lane = inverse_or_zero(total);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float inverse = from_lane(inverse_of_lane, r);
      if (r >= count) continue;
#pragma unroll
      for (int k = 0; k < kOwned; ++k) c_[k] = fmaf(e[r][k], inverse, c_[k]);
    }
    if (threadIdx.x < kRows && lane < count && (!kCluster || cluster_rank() == 0)) {
      const Power found = reciprocal(exponent, total);
      row.exponent[i + lane] = found.exponent;
      row.mantissa[i + lane] = found.mantissa;
    }
  }

  // The column sums since `load`, without the factor col.mantissa_j.
  __device__ __forceinline__ const float (&sums() const)[kOwned] { return c_; }

 private:
  static constexpr int kFours = kOwned / 4;

  static __device__ __forceinline__ int share() { return static_cast<int>(blockDim.x) * kOwned; }

  __device__ __forceinline__ float4& four(int f) const { return potentials_[piece_place(f, 2 * kFours)]; }

  // Exponents of the columns of octet q.
  __device__ __forceinline__ void exponents(float (&x)[kOctet], int q) const {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const float4 part = four(2 * q + f);
      memcpy(x + 4 * f, &part, sizeof part);
    }
  }

  // e_rj = 2^(scale*s_rj + col.exponent_j + exponent_r); total_r = sum_j e_rj * col.mantissa_j of this thread's
  // columns.
  __device__ __forceinline__ void exponentials(const Score* rows, float scale, float exponent_of_lane,
                                               float (&e)[kRows][kOwned], float (&total)[kRows]) const {
    float exponent[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) exponent[r] = from_lane(exponent_of_lane, r);
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      float x[kOctet], of_columns[kOctet];
      exponents(of_columns, q);
      Unmasked<Score> scores;
      scores.begin();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scores.load(x, rows + r * share() + octet_place(q));
#pragma unroll
        for (int k = 0; k < kOctet; ++k)
          e[r][q * kOctet + k] = exp2_fast(fmaf(x[k], scale, of_columns[k] + exponent[r]));
      }
      if (!scores.any()) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) clear_masked(e[r] + q * kOctet, rows + r * share() + octet_place(q));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) total[r] = 0.0f;
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      const float4 mantissa = four(kFours + f);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        total[r] = fmaf(e[r][4 * f], mantissa.x, total[r]);
        total[r] = fmaf(e[r][4 * f + 1], mantissa.y, total[r]);
        total[r] = fmaf(e[r][4 * f + 2], mantissa.z, total[r]);
        total[r] = fmaf(e[r][4 * f + 3], mantissa.w, total[r]);
      }
    }
  }

  // In lane r that of row r.
  __device__ __forceinline__ float better_exponent(const Score* rows, float scale) const {
    float most[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) most[r] = -INFINITY;
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      float x[kOctet], of_columns[kOctet];
      exponents(of_columns, q);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        load_scores(x, rows + r * share() + octet_place(q));
#pragma unroll
        for (int k = 0; k < kOctet; ++k) most[r] = fmaxf(most[r], fmaf(x[k], scale, of_columns[k]));
      }
    }
    return exponent_of(team_.reduce_to_lanes(most, Max()));
  }

  float4* potentials_;
  RowTeam<kCluster>& team_;
  float c_[kOwned];
};

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
