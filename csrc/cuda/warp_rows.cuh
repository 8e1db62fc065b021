// Rows of a small problem that a warp has whole in shared memory, as floats: int16 is turned into them once. Nothing in
// here waits for another warp.
#pragma once

#include "reduce.cuh"
#include "sums.cuh"
#include "tile.cuh"

namespace bam::cuda {

// How a warp's columns lie: a lane has kLaneOctets octets of a row, neighbours' side by side. On chip a row is in quads
// of 4 neighbours: the first of each lane, lane by lane, then the second of each.
template <int kLaneOctets>
struct Row {
  static constexpr int kColumns = kLaneOctets * kOctet, kWidth = kWarp * kColumns;
  static constexpr int kFours = kColumns / 4, kQuads = kWidth / 4;
  // Rows at a time: their exponentials fill 64 registers.
  static constexpr int kRows = 64 / kColumns;

  static __device__ int octet_place(int q) { return (q * kWarp + lane()) * kOctet; }
  static __device__ int lane() { return static_cast<int>(threadIdx.x % kWarp); }
  static __device__ int column_of(int quad) {
    const int f = quad / kWarp;
    return (f / 2 * kWarp + quad % kWarp) * kOctet + f % 2 * 4;
  }
};

template <int kLaneOctets>
__device__ __forceinline__ void load_quads(float (&x)[kLaneOctets * kOctet], const float* quads) {
  using Row = Row<kLaneOctets>;
#pragma unroll
  for (int f = 0; f < Row::kFours; ++f) {
    const float4 four = reinterpret_cast<const float4*>(quads)[f * kWarp + Row::lane()];
    memcpy(x + 4 * f, &four, sizeof four);
  }
}

template <int kLaneOctets>
__device__ __forceinline__ void store_quads(float* quads, const float (&x)[kLaneOctets * kOctet]) {
  using Row = Row<kLaneOctets>;
#pragma unroll
  for (int f = 0; f < Row::kFours; ++f)
    reinterpret_cast<float4*>(quads)[f * kWarp + Row::lane()] = {x[4 * f], x[4 * f + 1], x[4 * f + 2], x[4 * f + 3]};
}

// This block's rows begin .. begin + mine - 1 of a problem, a group of kRows for each warp and again. Their scores
// (rows, kWidth) are at `scores`, then their exponents and mantissas, where the r-th lane alone reads and writes those
// of the r-th row of its warp's groups. mine not positive: none.
template <class Score, int kLaneOctets>
class WarpRows {
  using Row = cuda::Row<kLaneOctets>;
  static constexpr int kRows = Row::kRows, kColumns = Row::kColumns, kWidth = Row::kWidth;

 public:
  __device__ WarpRows(const SinkhornOnChip& p, float* scores, int begin, int mine)
      : p_(p),
        scores_(scores),
        row_exponents_(scores + p.rows * kWidth),
        row_mantissas_(row_exponents_ + p.rows),
        begin_(begin),
        mine_(mine) {}

  // The scores and potentials of this warp's rows; columns past the last are masked. All loads of a group are under way
  // before the first is used.
  __device__ void fetch(bool aligned) {
    // As `number` has it, but multiplied when it has come.
    const float on_device = p_.scale.pointer ? *p_.scale.pointer : 1.0f;
    for_groups([&](int first, int count) {
      const Score* rows = static_cast<const Score*>(p_.scores.data) + (begin_ + first) * p_.scores.row_stride;
      const bool has_row = Row::lane() < kRows && Row::lane() < count;
      const int64_t i = begin_ + first + Row::lane();
      const float exponent = has_row ? p_.row.exponent[i] : 0.0f, mantissa = has_row ? p_.row.mantissa[i] : 0.0f;
      alignas(16) Score octets[kRows][kLaneOctets][kOctet];
      const auto is_whole = [&](int r, int q) { return aligned && r < count && Row::octet_place(q) + kOctet <= p_.n; };
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int q = 0; q < kLaneOctets; ++q)
          if (is_whole(r, q))
            load_octet(octets[r][q], rows + r * p_.scores.row_stride + Row::octet_place(q), kOctet, true, Score());
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int q = 0; q < kLaneOctets; ++q)
          if (is_whole(r, q)) store_octet_here(octets[r][q], first + r, q);
      }
#pragma unroll 1
      for (int q = 0; q < kLaneOctets; ++q)
        if (!is_whole(0, q)) store_cut_octets(rows, first, count, q);
      if (Row::lane() >= kRows) return;
      row_exponents_[first + Row::lane()] = exponent;
      row_mantissas_[first + Row::lane()] = mantissa;
    });
    scale_ = p_.scale.factor * on_device;
  }

  __device__ float scale() const { return scale_; }

  // each(k, s, exponent, mantissa) for every score of column k of this lane, with the potential of its row.
  template <class Each>
  __device__ __forceinline__ void for_scores(Each each) const {
    for_groups([&](int first, int count) {
      const float exponents = Row::lane() < kRows ? row_exponents_[first + Row::lane()] : 0.0f;
      const float mantissas = Row::lane() < kRows ? row_mantissas_[first + Row::lane()] : 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= count) continue;
        const float exponent = from_lane(exponents, r), mantissa = from_lane(mantissas, r);
        float s[kColumns];
        load_quads<kLaneOctets>(s, scores_ + (first + r) * kWidth);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) each(k, s[k], exponent, mantissa);
      }
    });
  }

  // For all rows i: row_i = 1 / sum_j 2^(scale*s_ij) * col_j, stored if `last`, and c_j += the row's share of column j
  // without the factor col.mantissa_j. `exponents` and `mantissas` of the columns are on chip.
  __device__ __forceinline__ void pass(float (&c)[kColumns], const float* exponents, const float* mantissas,
                                       bool last) {
    for_groups([&](int first, int count) { add_rows(c, first, count, exponents, mantissas, last); });
  }

 private:
  // each(first, count) for the groups of kRows rows that are this warp's, `count` of them there.
  template <class Each>
  __device__ __forceinline__ void for_groups(Each each) const {
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x / kWarp) * kRows; first < mine_;
         first += kOnChipThreads / kWarp * kRows)
      each(first, mine_ - first);
  }

  // Where entry k of this lane's octet q of row i is.
  __device__ float* place_here(int i, int q, int k) const {
    return scores_ + i * kWidth + ((2 * q + k / 4) * kWarp + Row::lane()) * 4 + k % 4;
  }
  __device__ __forceinline__ void store_octet_here(const Score (&octet)[kOctet], int i, int q) const {
    float x[kOctet];
    load_scores(x, octet);
#pragma unroll
    for (int k = 0; k < kOctet; k += 4)
      *reinterpret_cast<float4*>(place_here(i, q, k)) = {x[k], x[k + 1], x[k + 2], x[k + 3]};
  }
  __device__ void store_cut_octets(const Score* rows, int first, int count, int q) const {
#pragma unroll 1
    for (int r = 0; r < kRows && r < count; ++r) {
#pragma unroll 1
      for (int k = 0; k < kOctet; ++k) {
        const int j = Row::octet_place(q) + k;
        *place_here(first + r, q, k) = j < p_.n ? value_of(rows[r * p_.scores.row_stride + j]) : kMaskedScore;
      }
    }
  }

  // c_j += sum_r e_rj / total_r. The exponents of the rows' last potentials are guesses of the new ones: a poor one
  // costs time, never accuracy. A row with no key left gets an infinite potential and adds nothing.
  __device__ __forceinline__ void add_rows(float (&c)[kColumns], int first, int count, const float* exponents,
                                           const float* mantissas, bool last) {
    const float* rows = scores_ + first * kWidth;
    const int lane = Row::lane();
    float exponent = lane < kRows ? row_exponents_[first + lane] : 0.0f;
    float e[kRows][kColumns], total[kRows];
#pragma unroll 1
    for (bool again = false;; again = true) {
      if (again) exponent = better_exponent(rows, exponents);
      exponentials(rows, exponents, mantissas, exponent, e, total);
      over_lanes(total, Sum());
      bool poor = false;
#pragma unroll
      for (int r = 0; r < kRows; ++r) poor |= r < count && is_poor(total[r]);
      if (again || !poor) break;
    }
    float mine = total[0];  // of row r in lane r
#pragma unroll
    for (int r = 1; r < kRows; ++r) mine = lane == r ? total[r] : mine;
    const float inverse_of_lane = inverse_or_zero(mine);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float inverse = from_lane(inverse_of_lane, r);
      if (r >= count) continue;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) c[k] = fmaf(e[r][k], inverse, c[k]);
    }
    if (lane >= kRows || lane >= count) return;
    const Power found = reciprocal(exponent, mine);
    row_exponents_[first + lane] = found.exponent;
    if (!last) return;
    p_.row.exponent[begin_ + first + lane] = found.exponent;
    p_.row.mantissa[begin_ + first + lane] = found.mantissa;
  }

  // e_rj = 2^(scale*s_rj + col.exponent_j + exponent_r); total_r = sum_j e_rj * col.mantissa_j of this lane's columns.
  __device__ __forceinline__ void exponentials(const float* rows, const float* exponents, const float* mantissas,
                                               float exponent_of_lane, float (&e)[kRows][kColumns],
                                               float (&total)[kRows]) const {
    float of_columns[kColumns];
    load_quads<kLaneOctets>(of_columns, exponents);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float exponent = from_lane(exponent_of_lane, r);
      float x[kColumns];
      load_quads<kLaneOctets>(x, rows + r * kWidth);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) e[r][k] = exp2_fast(fmaf(x[k], scale_, of_columns[k] + exponent));
    }
    load_quads<kLaneOctets>(of_columns, mantissas);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      total[r] = 0.0f;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) total[r] = fmaf(e[r][k], of_columns[k], total[r]);
    }
  }

  // In lane r that of row r.
  __device__ __forceinline__ float better_exponent(const float* rows, const float* exponents) const {
    float of_columns[kColumns], most[kRows];
    load_quads<kLaneOctets>(of_columns, exponents);
    float found = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      most[r] = -INFINITY;
      float x[kColumns];
      load_quads<kLaneOctets>(x, rows + r * kWidth);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) most[r] = fmaxf(most[r], fmaf(x[k], scale_, of_columns[k]));
    }
    over_lanes(most, Max());
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (Row::lane() == r) found = exponent_of(most[r]);
    return found;
  }

  const SinkhornOnChip& p_;
  float *scores_, *row_exponents_, *row_mantissas_;
  float scale_;
  int begin_, mine_;
};

}  // namespace bam::cuda
