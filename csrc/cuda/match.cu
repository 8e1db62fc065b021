// Per image: the targets P of its L rows, and the loss, entropies and gradient of its V source rows against them, every
// score read and exponentiated once.
//
// A block, or a cluster, holds an image. A thread owns kOwned columns of every row: their scores come on chip a few
// rows ahead; it keeps their targets in shared memory that only it reads, and writes their gradient when the row is on
// chip, so that the gradient may take the place of the scores. The barriers are those of the row sums, one for two
// source rows.
#include "launch.cuh"
#include "match.cuh"
#include "pass.cuh"

namespace bam::cuda {
namespace {

// Which of a thread's columns count.
using Chosen = unsigned;
static_assert(kOwned <= 32, "one bit for each");

constexpr int kPair = 2;  // source rows that share a reduction
static_assert(kStages >= 2 * kPair, "the next pair comes while one is finished");

template <class Score, bool kCluster>
class Image {
 public:
  __device__ Image(const MatchArguments& a, int64_t i)
      : a_(a),
        p_(a.p),
        i_(i),
        share_(static_cast<int>(blockDim.x) * kOwned),
        L_(static_cast<int>(a.p.L)),
        first_(static_cast<int64_t>(kCluster ? cluster_rank() : 0) * share_),
        team_(static_cast<float*>(shared_memory())),
        arriving_(static_cast<float*>(shared_memory()), kStages, a.p.n - first_) {
    targets_ = reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + kScratchBytes);
    ring_ = reinterpret_cast<Score*>(targets_ + p_.L * share_ / 4);
    reports_ = threadIdx.x == 0 && (!kCluster || cluster_rank() == 0);
  }

  __device__ void run() {
    follow_earlier_kernels();
    fetch_rows(0, kStages - 1);
    find_targets();
    if (p_.top_k) keep_largest();
    else add_mantissa_entropy();
    if (reports_) p_.sums[p_.sums_stride + i_] = entropy_;
    if (p_.targets) {
#pragma unroll 1
      for (int t = 0; t < L_; ++t) write_target(t);
    }
    if (p_.V) match_sources();
  }

 private:
  // Row u of the image: its target rows, then its source rows.
  __device__ void fetch(unsigned u) const {
    const bool is_target = u < p_.L, aligned = is_target ? a_.target_aligned : a_.source_aligned;
    if (!arriving_.takes_part(aligned)) return;
    if (u < p_.L + p_.V)
      arriving_.fetch(row_on_chip(u), (is_target ? target_row(u) : source_row(u - p_.L)) + first_, aligned,
                      stage_of(u, kStages));
    arriving_.send_off(stage_of(u, kStages));
  }
  __device__ void fetch_rows(unsigned begin, unsigned end) const {
#pragma unroll 1
    for (unsigned u = begin; u < end; ++u) fetch(u);
  }
  // kLater: how many of the rows after u have been fetched, or fewer.
  template <int kLater>
  __device__ const Score* await_row(unsigned u) const {
    arriving_.template wait<kLater>(stage_of(u, kStages), odd_use(u, kStages));
    return row_on_chip(u);
  }
  __device__ __forceinline__ Score* row_on_chip(unsigned u) const { return ring_ + stage_of(u, kStages) * share_; }
  // Once sums of row u have met, no thread reads the rows before it any more: those before the end were fetched.
  static __device__ __forceinline__ unsigned fetched_after(unsigned u) { return u + kStages; }
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

  // p_j = 2^x_j col.mantissa_j with x_j = scale*s_j + col.exponent_j + exponent over the chosen columns; sums[0] +=
  // p_j, sums[1] += p_j x_j.
  __device__ void target_terms(const float (&s)[kOwned], Chosen chosen, float exponent, float (&p)[kOwned],
                               float (&sums)[2]) {
    sums[0] = sums[1] = 0.0f;
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const float x = fmaf(s[k], scale_, col_.exponent[k] + exponent), term = exp2_fast(x) * col_.mantissa[k];
      p[k] = chosen >> k & 1 ? term : 0.0f;
      sums[0] += p[k];
      sums[1] = fmaf(p[k], x, sums[1]);
    }
    team_.reduce(sums, Sum());
  }

  __device__ float target_exponent(const float (&x)[kOwned], Chosen chosen) {
    float most[1] = {-INFINITY};
#pragma unroll
    for (int k = 0; k < kOwned; ++k)
      if (chosen >> k & 1) most[0] = fmaxf(most[0], fmaf(x[k], scale_, col_.exponent[k]));
    team_.reduce(most, Max());
    return exponent_of(most[0]);
  }

  __device__ void keep_target(int t, const float (&p)[kOwned], float total) {
    const float inverse = inverse_or_zero(total);
#pragma unroll
    for (int f = 0; f < kOwned / 4; ++f)
      four(t, f) = {p[4 * f] * inverse, p[4 * f + 1] * inverse, p[4 * f + 2] * inverse, p[4 * f + 3] * inverse};
#pragma unroll
    for (int k = 0; k < kOwned; ++k) all_[k] = t == 0 ? p[k] * inverse : fmaf(p[k], inverse, all_[k]);
  }

  // Each octet by `load(octet, place)`.
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
  // Of a row on chip.
  static __device__ __forceinline__ void read_own(float (&x)[kOwned], const Score* row) {
    Unmasked<Score> scores;
    scores.begin();
    read_octets(x, [&](float (&part)[kOctet], int place) { scores.load(part, row + place); });
    if (scores.any()) read_octets(x, [&](float (&part)[kOctet], int place) { load_scores(part, row + place); });
  }
  __device__ void read_target_again(float (&x)[kOwned], const Score* row) const {
    read_octets(x, [&](float (&part)[kOctet], int place) {
      load_scores(part, row + first_ + place, p_.n - first_ - place, a_.target_aligned);
    });
  }

  __device__ void find_targets() {
    constexpr Chosen everything = ~0u;
    scale_ = number(p_.target_scale);
    col_.load(p_.col, first_, p_.n);
#pragma unroll 1
    for (int t = 0; t < L_; ++t) {
      float exponent = p_.row_exponent[t * p_.row_view_stride + i_], x[kOwned], p[kOwned], sums[2];
      read_own(x, await_row<kStages - 2>(t));
#pragma unroll 1
      for (bool again = false;; again = true) {
        if (again) exponent = target_exponent(x, everything);
        target_terms(x, everything, exponent, p, sums);
        if (again || !is_poor(sums[0])) break;
      }
      fetch(fetched_after(t) - 1);
      if (t == 0 && p_.row_out.exponent && reports_) {
        const Power found = reciprocal(exponent, sums[0]);
        p_.row_out.exponent[i_] = found.exponent;
        p_.row_out.mantissa[i_] = found.mantissa;
      }
      keep_target(t, p, sums[0]);
      if (reports_) entropy_ += entropy_of(sums[0], sums[1]);
    }
  }

  // log2(p_j) has that of the column's mantissa, too: of all targets at once.
  __device__ void add_mantissa_entropy() {
    float sum[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < kOwned; ++k) sum[0] = fmaf(all_[k], log2_of(col_.mantissa[k]), sum[0]);
    team_.reduce(sum, Sum());
    if (reports_) entropy_ -= sum[0] * kLn2;
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
      float p[kOwned], sums[2];
      read_target(p, t);
      kept_terms(chosen, p, sums);
      if (is_poor(sums[0])) {
        float x[kOwned];
        read_target_again(x, target_row(t));
        target_terms(x, chosen, target_exponent(x, chosen), p, sums);
        kept_terms(chosen, p, sums);
      }
      keep_target(t, p, sums[0]);
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

  // e_rj = 2^(scale*s_rj + exponent_r); sums[2r] = sum_j e_rj, sums[2r + 1] = sum_j e_rj s_rj.
  __device__ void source_terms(const float (&s)[kPair][kOwned], float scale, const float (&exponent)[kPair],
                               float (&e)[kPair][kOwned], float (&sums)[2 * kPair]) {
#pragma unroll
    for (int r = 0; r < kPair; ++r) {
      sums[2 * r] = sums[2 * r + 1] = 0.0f;
#pragma unroll
      for (int k = 0; k < kOwned; ++k) {
        e[r][k] = exp2_fast(fmaf(s[r][k], scale, exponent[r]));
        sums[2 * r] += e[r][k];
        sums[2 * r + 1] = fmaf(e[r][k], s[r][k], sums[2 * r + 1]);
      }
    }
    team_.reduce(sums, Sum());
  }

  __device__ void source_exponents(const float (&s)[kPair][kOwned], float scale, float (&exponent)[kPair]) {
    float most[kPair];
#pragma unroll
    for (int r = 0; r < kPair; ++r) {
      most[r] = -INFINITY;
#pragma unroll
      for (int k = 0; k < kOwned; ++k) most[r] = fmaxf(most[r], s[r][k] * scale);
    }
    team_.reduce(most, Max());
#pragma unroll
    for (int r = 0; r < kPair; ++r) exponent[r] = exponent_of(most[r]);
  }

  // Pbar_v / pair_weight of octet q: never the difference from the sum of all, of which v's own may be the most.
  __device__ void sum_targets(float (&pbar)[kOctet], int v, int q) const {
    const bool is_target = v < L_ && p_.V > 1;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) pbar[k] = is_target ? 0.0f : all_[q * kOctet + k];
    if (is_target) {
#pragma unroll 1
      for (int t = 0; t < L_; ++t) {
        if (t == v) continue;
#pragma unroll
        for (int f = 0; f < kOctet / 4; ++f) {
          const float4 part = four(t, q * (kOctet / 4) + f);
          pbar[4 * f] += part.x;
          pbar[4 * f + 1] += part.y;
          pbar[4 * f + 2] += part.z;
          pbar[4 * f + 3] += part.w;
        }
      }
    }
  }

  // Adds Pbar_v s_v / pair_weight to `matched` and writes G_v.
  __device__ void finish_source(int v, const float (&s)[kOwned], const float (&e)[kOwned], float of_e, float& matched) {
    const float of_gradient = of_e * p_.gradient_scale, of_targets = -p_.pair_weight * p_.gradient_scale;
    const int64_t gradient = gradient_row(p_, v, i_);
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      float g[kOctet], pbar[kOctet];
      sum_targets(pbar, v, q);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        matched = fmaf(pbar[k], s[q * kOctet + k], matched);
        g[k] = fmaf(e[q * kOctet + k], of_gradient, pbar[k] * of_targets);
      }
      if (p_.gradient) store_gradient(p_, gradient, first_ + octet_place(q), g, a_.gradient_aligned);
    }
  }

  __device__ void match_sources() {
    const float scale = number(p_.source_scale);
    SourceSums of_rows;
    float matched[1] = {0.0f}, exponent[kPair] = {};  // exponents: those of the last pair, guesses for the next
#pragma unroll 1
    for (int v = 0; v < p_.V; v += kPair) {
      float s[kPair][kOwned], e[kPair][kOwned], sums[2 * kPair];
#pragma unroll
      for (int r = 0; r < kPair; ++r) read_own(s[r], await_row<0>(L_ + (v + r < p_.V ? v + r : v)));
#pragma unroll 1
      for (bool again = false;; again = true) {
        if (again) source_exponents(s, scale, exponent);
        source_terms(s, scale, exponent, e, sums);
        bool poor = false;
#pragma unroll
        for (int r = 0; r < kPair; ++r) poor |= is_poor(sums[2 * r]);
        if (again || !poor) break;
      }
      fetch_rows(fetched_after(L_ + v) - (v ? kPair : 1), fetched_after(L_ + v));
#pragma unroll
      for (int r = 0; r < kPair; ++r) {
        if (v + r >= p_.V) continue;
        const float a = row_sum_of_targets(v + r, p_), total = sums[2 * r];
        // A cluster's threads have no registers left to keep the scores of the last row.
        if (kCluster && r == kPair - 1) read_own(s[r], row_on_chip(L_ + v + r));
        if (reports_) of_rows.add(a, exponent[r], total, sums[2 * r + 1] * scale + total * exponent[r]);
        finish_source(v + r, s[r], e[r], a / total, matched[0]);
      }
    }
    team_.reduce(matched, Sum());
    if (!reports_) return;
    p_.sums[i_] = of_rows.lse - matched[0] * p_.pair_weight * number(p_.score_over_tau);
    p_.sums[2 * p_.sums_stride + i_] = of_rows.entropy;
  }

  const MatchArguments& a_;
  const Match& p_;
  int64_t i_;
  int share_, L_;
  int64_t first_;
  RowTeam<kCluster> team_;
  Arriving arriving_;
  float4* targets_;  // (L, share)
  Score* ring_;      // (kStages, share)
  bool reports_;
  float scale_ = 0.0f, entropy_ = 0.0f;  // of targets, where this thread reports
  OwnColumns col_;
  float all_[kOwned] = {};  // sum_t P_t
};

template <class Score, bool kCluster>
__global__ void __launch_bounds__(kMostThreads, kRegisterThreads / kMostThreads) match_kernel(const MatchArguments a) {
  Image<Score, kCluster>(a, blockIdx.x / (kCluster ? a.p.team.cluster : 1)).run();
}

template <class Score>
void launch_match(const char* name, const MatchArguments& a, const Where& where) {
  const Match& p = a.p;
  const int64_t share = static_cast<int64_t>(p.team.threads) * kOwned;
  const int64_t shared = kScratchBytes + share * (p.L * sizeof(float) + kStages * sizeof(Score));
  const Shape shape = {dim3(static_cast<unsigned>(p.b * p.team.cluster)), p.team.threads, shared, p.team.cluster};
  if (p.team.cluster > 1) launch(name, match_kernel<Score, true>, shape, where, a);
  else launch(name, match_kernel<Score, false>, shape, where, a);
}

}  // namespace

void match(const Match& p, const Where& where) {
  const MatchArguments a = {p, scores_aligned(p.target), scores_aligned(p.source),
                            is_aligned(p.targets, p.targets_view_stride, p.n), gradient_aligned(p)};
  if (p.team.threads == 0) match_long(a, where);
  else if (p.target.type == ScoreType::kInt16) launch_match<int16_t>("match_kernel<int16>", a, where);
  else launch_match<float>("match_kernel<float32>", a, where);
}

}  // namespace bam::cuda
