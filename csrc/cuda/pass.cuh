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
  float of_first;  // the exponent of the first column of all

  __device__ __forceinline__ void load(const Potential& col, int64_t first, int64_t n) {
    of_first = col.exponent[0];
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

// Numbers of a thread's columns in shared memory, which it alone reads, as its registers hold exponentials and sums.
template <int kFloats>
class OwnFloats {
 public:
  static constexpr int kFours =  kFloats / 4;

  __device__ __forceinline__ explicit OwnFloats(float4* shared) : shared_(shared) {}

  __device__ __forceinline__ float4& four(int f) const { return shared_[piece_place(f, kFours)]; }
  // Eight from four f on.
  __device__ __forceinline__ void load(float (&x)[kOctet], int f) const {
    const float4 parts[2] = {four(f), four(f + 1)};
    memcpy(x, parts, sizeof parts);
  }

 private:
  float4* shared_;
};

// What exponentials take of the column potentials of a thread's columns, and the sums of rows of them.
//
// Of float32 scores the exponents are whole numbers, which take nothing from a score's last bits, and sums are weighted
// by the mantissas.
template <class Score>
class Potentials {
 public:
  static constexpr int kBytes = kPotentialBytes;  // of a column in shared memory
  // Whether col.mantissa_j is a factor that the column sums lack.
  static constexpr bool kLeavesFactor = true;
  // Whether terms at an exponent of minus infinity are 0 whatever a score's bits are: those of rows past the last.
  static constexpr bool kTermsAreNumbers = false;

  __device__ __forceinline__ explicit Potentials(float4* shared) : own_(shared) {}

  __device__ __forceinline__ void keep(const OwnColumns& own) {
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      own_.four(f) = {own.exponent[4 * f], own.exponent[4 * f + 1], own.exponent[4 * f + 2], own.exponent[4 * f + 3]};
      own_.four(kFours + f) = {own.mantissa[4 * f], own.mantissa[4 * f + 1], own.mantissa[4 * f + 2],
                               own.mantissa[4 * f + 3]};
    }
  }

  // Exponents of the columns of octet q, without the part that all have.
  __device__ __forceinline__ void exponents(float (&x)[kOctet], int q) const { own_.load(x, 2 * q); }
  __device__ __forceinline__ float of_all() const { return 0.0f; }
  // The exponent of a term.
  static __device__ __forceinline__ float exponent(float score, float scale, float of_column, float of_row) {
    return fmaf(score, scale, of_column + of_row);
  }

  template <int kRows>
  __device__ __forceinline__ void sum(const float (&e)[kRows][kOwned], float (&total)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) total[r] = 0.0f;
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      const float4 mantissa = own_.four(kFours + f);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        total[r] = fmaf(e[r][4 * f], mantissa.x, total[r]);
        total[r] = fmaf(e[r][4 * f + 1], mantissa.y, total[r]);
        total[r] = fmaf(e[r][4 * f + 2], mantissa.z, total[r]);
        total[r] = fmaf(e[r][4 * f + 3], mantissa.w, total[r]);
      }
    }
  }

 private:
  static constexpr int kFours = kOwned / 4;

  OwnFloats<2 * kOwned> own_;
};

// Of int16 scores they are one number, less the exponent of the first column. Its rounding is a hundredth of the
// scores' own at most: two columns' potentials differ by no more than two scores can, 2^16 steps, of which a float
// keeps 24 bits; where scores are close, the potentials are as close.
template <>
class Potentials<int16_t> {
 public:
  static constexpr int kBytes = sizeof(float);
  static constexpr bool kLeavesFactor = false, kTermsAreNumbers = true;

  __device__ __forceinline__ explicit Potentials(float4* shared) : own_(shared) {}

  // Minus infinity past the last column.
  __device__ __forceinline__ void keep(const OwnColumns& own) {
    float x[kOwned];
#pragma unroll
    for (int k = 0; k < kOwned; ++k) x[k] = own.exponent[k] - own.of_first + log2_fast(own.mantissa[k]);
    of_first_ = own.of_first;
#pragma unroll
    for (int f = 0; f < kOwned / 4; ++f) own_.four(f) = {x[4 * f], x[4 * f + 1], x[4 * f + 2], x[4 * f + 3]};
  }

  __device__ __forceinline__ void exponents(float (&x)[kOctet], int q) const { own_.load(x, 2 * q); }
  __device__ __forceinline__ float of_all() const { return of_first_; }
  static __device__ __forceinline__ float exponent(float score, float scale, float of_column, float of_row) {
    return fmaf(score, scale, of_row) + of_column;
  }

  template <int kRows>
  __device__ __forceinline__ void sum(const float (&e)[kRows][kOwned], float (&total)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      total[r] = e[r][0];
#pragma unroll
      for (int k = 1; k < kOwned; ++k) total[r] += e[r][k];
    }
  }

 private:
  OwnFloats<kOwned> own_;
  float of_first_;
};

// The row sums of a group, offered by all threads before any asks for them: where there are arrivals, and a row is in
// one block, a thread has other work in between and waits for none that is late by less.
template <int kRows, bool kCluster>
class PassTeam : public RowTeam<kCluster> {
 public:
  // Others use it after a barrier of the block.
  __device__ explicit PassTeam(float* scratch) : RowTeam<kCluster>(scratch) {
    if (kIsOneBlock && has_arrivals() && threadIdx.x == 0) begin_arrival(this->arrivals_, blockDim.x / kWarp * kRows);
  }

  __device__ __forceinline__ void offer(const float (&x)[kRows]) {
    if (!kIsOneBlock || !has_arrivals()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) kept_[r] = x[r];
      return;
    }
    const float of_warp = this->template over_lanes<1>(x, Sum());
    const unsigned lane = threadIdx.x % kWarp;
    if (lane >= kRows) return;
    this->of_warps()[threadIdx.x / kWarp * kRows + lane] = of_warp;
    arrive(this->arrivals_);
  }

  // Lane l of a warp gets row l % kRows. A thread that offers again has these: two sets of sums are enough.
  __device__ __forceinline__ float collect() {
    if (!kIsOneBlock || !has_arrivals()) return this->reduce_to_lanes(kept_, Sum());
    wait_for_arrival<false>(this->arrivals_, odd_);
    odd_ ^= 1;
    const float all = this->template gather<kRows, kRows>(this->of_warps(), blockDim.x / kWarp, Sum());
    this->take_turn();
    return all;
  }

 private:
  static constexpr bool kIsOneBlock = !kCluster;

  float kept_[kRows];
  unsigned odd_ = 0;
};

// A thread's exponentials of kRows rows, at the exponents of lanes: lane l looks after row l % kRows.
template <int kRows>
struct Terms {
  float e[kRows][kOwned], exponent;
};

// kRows rows at a time.
template <class Score, int kRows, bool kCluster>
class Group {
 public:
  using Terms = cuda::Terms<kRows>;

  __device__ __forceinline__ Group(float4* potentials, PassTeam<kRows, kCluster>& team, float scale)
      : potentials_(potentials), team_(team), scale_(scale) {}

  __device__ __forceinline__ void begin(const OwnColumns& own) {
    potentials_.keep(own);
#pragma unroll
    for (int k = 0; k < kOwned; ++k) c_[k] = 0.0f;
  }

  // The rows' terms, and this thread's sums of them, which the team wants. `exponent`, of row r in lane r, is a guess
  // of theirs: a poor one costs time, never accuracy.
  __device__ __forceinline__ void exponentiate(Terms& terms, float (&totals)[kRows], const Score* rows,
                                               float exponent) const {
    terms.exponent = exponent;
    exponentials(terms, rows);
    potentials_.sum(terms.e, totals);
  }

  // Whether a row's guess was poor, by the team's sums, in lane r that of row r. What is on chip past `count` rows is
  // not looked at.
  static __device__ __forceinline__ bool any_poor(float total, int count) {
    return any_lane(static_cast<int>(threadIdx.x % kWarp) % kRows < count && is_poor(total));
  }

  // A good exponent of row r in lane r.
  __device__ __forceinline__ float better_exponent(const Score* rows) const {
    float most[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) most[r] = -INFINITY;
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      float x[kOctet], of_columns[kOctet];
      potentials_.exponents(of_columns, q);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        load_scores(x, rows + r * share() + octet_place(q));
#pragma unroll
        for (int k = 0; k < kOctet; ++k) most[r] = fmaxf(most[r], fmaf(x[k], scale_, of_columns[k]));
      }
    }
    return exponent_of(team_.reduce_to_lanes(most, Max())) - potentials_.of_all();
  }
  // c_j += sum_r e_rj / total_r, and the potentials of rows i .. i + count - 1. A row with no key left gets an infinite
  // potential and adds nothing.
  __device__ __forceinline__ void add(const Terms& terms, float total, int i, int count, const Potential& row) {
    const unsigned lane = threadIdx.x % kWarp;
    const float inverse_of_lane = total == 0.0f ? 0.0f : reciprocal_fast(total);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float inverse = from_lane(inverse_of_lane, r);
      if (!Potentials<Score>::kTermsAreNumbers && r >= count) continue;
#pragma unroll
      for (int k = 0; k < kOwned; ++k) c_[k] = fmaf(terms.e[r][k], inverse, c_[k]);
    }
    if (threadIdx.x < kRows && static_cast<int>(lane) < count && (!kCluster || cluster_rank() == 0)) {
      const Power found = reciprocal(terms.exponent, total);
      row.exponent[i + static_cast<int>(lane)] = found.exponent;
      row.mantissa[i + static_cast<int>(lane)] = found.mantissa;
    }
  }

  // The column sums since `begin`; Potentials says what they lack.
  __device__ __forceinline__ const float (&sums() const)[kOwned] { return c_; }

 private:
  static __device__ __forceinline__ int share() { return static_cast<int>(blockDim.x) * kOwned; }

  // e_rj = 2^(scale*s_rj + exponent of column j + exponent_r).
  __device__ __forceinline__ void exponentials(Terms& terms, const Score* rows) const {
    const float of_lane = terms.exponent + potentials_.of_all();
    float exponent[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) exponent[r] = from_lane(of_lane, r);
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      float x[kOctet], of_columns[kOctet];
      potentials_.exponents(of_columns, q);
      Unmasked<Score> scores;
      scores.begin();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scores.load(x, rows + r * share() + octet_place(q));
#pragma unroll
        for (int k = 0; k < kOctet; ++k)
          terms.e[r][q * kOctet + k] = exp2_fast(Potentials<Score>::exponent(x[k], scale_, of_columns[k], exponent[r]));
      }
      if (!scores.any()) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) clear_masked(terms.e[r] + q * kOctet, rows + r * share() + octet_place(q));
    }
  }

  Potentials<Score> potentials_;
  PassTeam<kRows, kCluster>& team_;
  float scale_, c_[kOwned];
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
