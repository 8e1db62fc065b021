// The rows of an image on chip, and the targets P of its L target rows.
//
// A thread owns kOwned columns of every row: their scores come on chip a few rows ahead; it keeps their targets in
// shared memory that only it reads. Rows share reductions in pairs.
#pragma once

#include "match.cuh"
#include "pass.cuh"

namespace bam::cuda {

// Which of a thread's columns count.
using Chosen = unsigned;
static_assert(kOwned <= 32, "one bit for each");

constexpr int kPair = 2;  // rows that share a reduction
static_assert(kFewStages >= 2 * kPair, "the next pair comes while one is finished");
static_assert(kPair == 2, "sums of two numbers a row are reduced at once, four at most");

// kRing: rows on chip or on their way.
template <class Score, bool kCluster, int kRing>
class Targets {
 protected:
  __device__ Targets(const MatchArguments& a, unsigned i)
      : a_(a),
        p_(a.p),
        i_(i),
        share_(static_cast<int>(blockDim.x) * kOwned),
        L_(static_cast<int>(a.p.L)),
        first_(kCluster ? static_cast<int>(cluster_rank()) * share_ : 0),
        team_(static_cast<float*>(shared_memory())),
        arriving_(static_cast<float*>(shared_memory()), kRing, a.p.n - first_) {
    targets_ = reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + kScratchBytes);
    ring_ = reinterpret_cast<Score*>(targets_ + p_.L * share_ / 4);
    reports_ = thread() == 0;
  }

  // Asks for the first rows, then finds the targets, which are written where they are wanted, and their entropy.
  __device__ void find() {
    fetch_rows(0, kRing);
    scale_ = number(p_.target_scale);
    source_scale_ = number(p_.source_scale);
    find_targets();
    if (p_.top_k) keep_largest();
    if (reports_) p_.sums[p_.sums_stride + i_] = entropy_;
    if (p_.targets) {
#pragma unroll 1
      for (int t = 0; t < L_; ++t) write_target(t);
    }
  }

  // Number of this thread among those that look after rows; in a cluster only the first block's threads have one.
  static __device__ __forceinline__ unsigned thread() { return !kCluster || cluster_rank() == 0 ? threadIdx.x : ~0u; }

  // Row u of the image: its target rows, then its source rows.
  __device__ void fetch(unsigned u) const {
    const bool is_target = u < p_.L, aligned = is_target ? a_.target_aligned : a_.source_aligned;
    if (!arriving_.takes_part(aligned)) return;
    if (u < p_.L + p_.V)
      arriving_.fetch(row_on_chip(u), (is_target ? target_row(u) : source_row(u - p_.L)) + first_, aligned,
                      stage_of(u, kRing));
    arriving_.send_off(stage_of(u, kRing));
  }
  __device__ void fetch_rows(unsigned begin, unsigned end) const {
#pragma unroll 1
    for (unsigned u = begin; u < end; ++u) fetch(u);
  }
  // kLater: how many of the rows after u have been fetched, or fewer.
  template <int kLater>
  __device__ const Score* await_row(unsigned u) const {
    arriving_.template wait<kLater>(stage_of(u, kRing), odd_use(u, kRing));
    return row_on_chip(u);
  }
  __device__ __forceinline__ Score* row_on_chip(unsigned u) const { return ring_ + stage_of(u, kRing) * share_; }
  __device__ const Score* target_row(int64_t t) const {
    return static_cast<const Score*>(p_.target.data) + t * p_.target.view_stride + i_ * p_.target.row_stride;
  }
  __device__ const Score* source_row(int64_t v) const {
    return static_cast<const Score*>(p_.source.data) + v * p_.source.view_stride + i_ * p_.source.row_stride;
  }
  // Entries 4f .. 4f + 3 of this thread's in target t.
  __device__ float4& four(int t, int f) const { return targets_[t * share_ / 4 + piece_place(f, kOwned / 4)]; }

  __device__ void read_target(float (&p)[kOwned], int t) const {
#pragma unroll
    for (int f = 0; f < kOwned / 4; ++f) {
      const float4 part = four(t, f);
      memcpy(p + 4 * f, &part, sizeof part);
    }
  }

  // p_rj = 2^x_rj col.mantissa_j with x_rj = scale*s_rj + col.exponent_j + exponent_r over the chosen columns; sums[2r]
  // = sum_j p_rj, sums[2r + 1] = sum_j p_rj log2(p_rj).
  template <int kRows>
  __device__ void target_terms(const float (&s)[kRows][kOwned], const OwnColumns& col, Chosen chosen,
                               const float (&exponent)[kRows], float (&p)[kRows][kOwned], float (&sums)[2 * kRows]) {
#pragma unroll
    for (int v = 0; v < 2 * kRows; ++v) sums[v] = 0.0f;
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const float log2_mantissa = log2_of(col.mantissa[k]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float x = fmaf(s[r][k], scale_, col.exponent[k] + exponent[r]);
        const float term = exp2_fast(x) * col.mantissa[k];
        p[r][k] = chosen >> k & 1 ? term : 0.0f;
        sums[2 * r] += p[r][k];
        sums[2 * r + 1] = fmaf(p[r][k], x + log2_mantissa, sums[2 * r + 1]);
      }
    }
    team_.reduce(sums, Sum());
  }

  template <int kRows>
  __device__ void target_exponents(const float (&s)[kRows][kOwned], const OwnColumns& col, Chosen chosen,
                                   float (&exponent)[kRows]) {
    float most[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      most[r] = -INFINITY;
#pragma unroll
      for (int k = 0; k < kOwned; ++k)
        if (chosen >> k & 1) most[r] = fmaxf(most[r], fmaf(s[r][k], scale_, col.exponent[k]));
    }
    team_.reduce(most, Max());
#pragma unroll
    for (int r = 0; r < kRows; ++r) exponent[r] = exponent_of(most[r]);
  }

  __device__ void keep_target(int t, const float (&p)[kOwned], float total) {
    const float inverse = inverse_or_zero(total);
#pragma unroll
    for (int f = 0; f < kOwned / 4; ++f) {
      float part[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        part[k] = rounded_product(p[4 * f + k], inverse);
        all_[4 * f + k] = t == 0 ? part[k] : all_[4 * f + k] + part[k];
      }
      four(t, f) = {part[0], part[1], part[2], part[3]};
    }
  }

  // Fills x octet by octet: load(octet, its place in the row).
  template <class Load>
  static __device__ __forceinline__ void read_octets(float (&x)[kOwned], Load load) {
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      float part[kOctet];
      load(part, octet_place(q));
#pragma unroll
      for (int k = 0; k < kOctet; ++k) x[q * kOctet + k] = part[k];
    }
  }
  // Reads this thread's scores of rows u and u + 1 of the image; with `alone`, of row u twice.
  template <int kLater>
  __device__ __forceinline__ void read_pair(float (&x)[kPair][kOwned], int u, bool alone) const {
    const Score* rows[kPair];
#pragma unroll
    for (int r = 0; r < kPair; ++r) rows[r] = await_row<kLater>(alone ? u : u + r);
    Unmasked<Score> scores;
    scores.begin();
#pragma unroll
    for (int r = 0; r < kPair; ++r)
      read_octets(x[r], [&](float (&part)[kOctet], int place) { scores.load(part, rows[r] + place); });
    if (!scores.any()) return;
#pragma unroll
    for (int r = 0; r < kPair; ++r)
      read_octets(x[r], [&](float (&part)[kOctet], int place) { load_scores(part, rows[r] + place); });
  }
  __device__ void read_target_again(float (&x)[kOwned], const Score* row) const {
    read_octets(x, [&](float (&part)[kOctet], int place) {
      load_scores(part, row + first_ + place, p_.n - first_ - place, a_.target_aligned);
    });
  }

  __device__ void find_targets() {
    constexpr Chosen everything = ~0u;
#pragma unroll 1
    for (int t = 0; t < L_; t += kPair) {
      float exponent[kPair], s[kPair][kOwned], p[kPair][kOwned], sums[2 * kPair];
#pragma unroll
      for (int r = 0; r < kPair; ++r) exponent[r] = p_.row_exponent[(t + r < L_ ? t + r : t) * p_.row_view_stride + i_];
#pragma unroll 1
      for (bool again = false;; again = true) {
        OwnColumns col;  // on its way while the rows are awaited; no registers are left to keep it
        col.load(p_.col, first_, p_.n);
        read_pair<kRing - kPair>(s, t, t + kPair > L_);
        if (again) target_exponents(s, col, everything, exponent);
        target_terms(s, col, everything, exponent, p, sums);
        if (again || !is_poor_pair(sums)) break;
      }
      // These rows are not read again: those that follow take their places.
      fetch_rows(t + kRing, (t + kPair < L_ ? t + kPair : L_) + kRing);
      if (t == 0 && p_.row_out.exponent && reports_) {
        const Power found = reciprocal(exponent[0], sums[0]);
        p_.row_out.exponent[i_] = found.exponent;
        p_.row_out.mantissa[i_] = found.mantissa;
      }
#pragma unroll
      for (int r = 0; r < kPair; ++r)
        if (t + r < L_) keep_target(t + r, p[r], sums[2 * r]);
      // Row t + r is looked after by thread r.
      const bool second = thread() == 1;
      if (thread() < kPair && t + thread() < p_.L)
        entropy_ += entropy_of(second ? sums[2] : sums[0], second ? sums[3] : sums[1]);
    }
    entropy_ += exchange(entropy_, 1);
  }

  static __device__ bool is_poor_pair(const float (&sums)[2 * kPair]) {
    bool poor = false;
#pragma unroll
    for (int r = 0; r < kPair; ++r) poor |= is_poor(sums[2 * r]);
    return poor;
  }

  __device__ int64_t column(int own) const { return first_ + octet_place(own / kOctet) + own % kOctet; }

  // This thread's columns whose mean has bits of at least `least`.
  __device__ Chosen at_least(int32_t least) const {
    Chosen found = 0;
#pragma unroll
    for (int k = 0; k < kOwned; ++k)
      if (column(k) < p_.n && bits_of(all_[k]) >= least) found |= 1u << k;
    return found;
  }

  __device__ Chosen kept(const Threshold& threshold) const {
    const Chosen above = at_least(threshold.low + 1), tied = at_least(threshold.low) & ~above;
    if (threshold.cut == p_.n) return above | tied;
    Chosen found = above;
#pragma unroll 1
    for (int k = 0; k < kOwned; ++k)
      if (tied >> k & 1 && public_column(static_cast<uint32_t>(column(k)), p_.W, p_.T, p_.B) < threshold.cut)
        found |= 1u << k;
    return found;
  }

  // The k columns of the largest mean. Where a view has next to no mass in them, its P is made again from the scores.
  __device__ void keep_largest() {
    const Chosen chosen = kept(find_threshold(p_.top_k, p_.n, [&](const Threshold& threshold) {
      float found[1] = {static_cast<float>(count_bits(kept(threshold)))};  // exact: a row on chip is below 2^24
      team_.reduce(found, Sum());
      return static_cast<int64_t>(found[0]);
    }));
    entropy_ = 0.0f;
#pragma unroll 1
    for (int t = 0; t < L_; ++t) {
      float p[1][kOwned], sums[2];
      read_target(p[0], t);
      kept_terms(chosen, p[0], sums);
      if (is_poor(sums[0])) {
        float x[1][kOwned], exponent[1];
        read_target_again(x[0], target_row(t));
        OwnColumns col;
        col.load(p_.col, first_, p_.n);
        target_exponents(x, col, chosen, exponent);
        target_terms(x, col, chosen, exponent, p, sums);
        kept_terms(chosen, p[0], sums);
      }
      keep_target(t, p[0], sums[0]);
      if (reports_) entropy_ += entropy_of(sums[0], sums[1]);
    }
  }

  // p_j of columns that are not chosen becomes 0; sums[0] = sum_j p_j, sums[1] = sum_j p_j log2(p_j).
  __device__ void kept_terms(Chosen chosen, float (&p)[kOwned], float (&sums)[2]) {
    sums[0] = sums[1] = 0.0f;
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      p[k] = chosen >> k & 1 ? p[k] : 0.0f;
      sums[0] += p[k];
      sums[1] = fmaf(p[k], log2_of(p[k]), sums[1]);
    }
    team_.reduce(sums, Sum());
  }

  __device__ void write_target(int t) {
    float p[kOwned];
    read_target(p, t);
    store_own(p_.targets + t * p_.targets_view_stride + i_ * p_.n, p, first_, p_.n, a_.targets_aligned);
  }

  const MatchArguments& a_;
  const Match& p_;
  unsigned i_;
  int share_, L_, first_;  // a row on chip has fewer than 2^24 columns
  RowTeam<kCluster> team_;
  Arriving arriving_;
  float4* targets_;  // (L, share)
  Score* ring_;      // (kRing, share)
  bool reports_;
  float scale_ = 0.0f, source_scale_ = 0.0f;
  float entropy_ = 0.0f;    // of targets, where this thread reports
  float all_[kOwned] = {};  // sum_t P_t
};

}  // namespace bam::cuda
