// Per image: the targets P of its L rows, and the loss, entropies and gradient of its V source rows against them, every
// score read and exponentiated once.
//
// A block, or a cluster, holds an image. A thread owns kOwned columns of every row: their scores come on chip a few
// rows ahead; it keeps their targets in shared memory that only it reads, and writes their gradient when the row is on
// chip, so that the gradient may take the place of the scores. The barriers are those of the row sums, one for two
// rows. What a row adds to the sums of its image takes long chains of logarithms and divisions: 32 threads each keep
// the sums of a row of 32, and go through them together.
#include "launch.cuh"
#include "match_targets.cuh"

namespace bam::cuda {
namespace {

// A source row's exponent, sum_j e_j and sum_j e_j s_j.
struct SourceRow {
  float exponent, total, dot;
};

template <class Score, bool kCluster, int kRing>
class Image : Targets<Score, kCluster, kRing> {
 public:
  __device__ Image(const MatchArguments& a, unsigned i) : Targets<Score, kCluster, kRing>(a, i) {}

  __device__ void run() {
    follow_earlier_kernels();
    find();
    if (p_.V) match_sources();
  }

 private:
  using Base = Targets<Score, kCluster, kRing>;
  using Base::a_;
  using Base::all_;
  using Base::arriving_;
  using Base::fetch_rows;
  using Base::find;
  using Base::first_;
  using Base::four;
  using Base::i_;
  using Base::is_poor_pair;
  using Base::L_;
  using Base::p_;
  using Base::reports_;
  using Base::row_on_chip;
  using Base::source_scale_;
  using Base::team_;
  using Base::thread;

  // e_rj = 2^(scale*s_rj + exponent_r); sums[2r] = sum_j e_rj, sums[2r + 1] = sum_j e_rj s_rj. Returns
  // sum_rj Pbar_rj s_rj / pair_weight of this thread's columns and of those of rows v and v + 1 that are no targets.
  __device__ float source_terms(const float (&s)[kPair][kOwned], int v, const float (&exponent)[kPair],
                                float (&e)[kPair][kOwned], float (&sums)[2 * kPair]) {
    float of_row[kPair] = {}, matched = 0.0f;
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
#pragma unroll
      for (int r = 0; r < kPair; ++r) {
        e[r][k] = exp2_fast(fmaf(s[r][k], source_scale_, exponent[r]));
        sums[2 * r] += e[r][k];
        sums[2 * r + 1] = fmaf(e[r][k], s[r][k], sums[2 * r + 1]);
        of_row[r] = fmaf(all_[k], s[r][k], of_row[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kPair; ++r)
      if (v + r < V() && !is_target(v + r)) matched += of_row[r];
    find_now(matched);  // scores need no registers any more
    team_.reduce(sums, Sum());
    return matched;
  }

  __device__ void source_exponents(const float (&s)[kPair][kOwned], float (&exponent)[kPair]) {
    float most[kPair];
#pragma unroll
    for (int r = 0; r < kPair; ++r) {
      most[r] = -INFINITY;
#pragma unroll
      for (int k = 0; k < kOwned; ++k) most[r] = fmaxf(most[r], s[r][k] * source_scale_);
    }
    team_.reduce(most, Max());
#pragma unroll
    for (int r = 0; r < kPair; ++r) exponent[r] = exponent_of(most[r]);
  }

  // Whether some target is not one of source view v's.
  __device__ __forceinline__ bool is_target(int v) const { return v < L_ && V() > 1; }
  // row_sum_of_targets in cheaper instructions.
  __device__ __forceinline__ float row_sum(int v) const {
    return static_cast<float>(is_target(v) ? L_ - 1 : L_) * p_.pair_weight;
  }
  __device__ __forceinline__ int V() const { return static_cast<int>(p_.V); }

  // Pbar_v / pair_weight of octet q: never the difference from the sum of all, of which v's own may be the most.
  __device__ void sum_targets(float (&pbar)[kOctet], int v, int q) const {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) pbar[k] = 0.0f;
#pragma unroll 1
    for (int t = 0; t < L_; ++t) {
      if (!is_matched(t, v, p_.V)) continue;
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

  // What a row of the gradient is made of: G_v = of_e e_v + of_targets Pbar_v / pair_weight.
  struct Factors {
    float of_e[kPair], of_targets;
  };

  // Writes rows G_v and G_v+1 of two that are no targets where this thread's octets are aligned.
  template <FloatType kType>
  __device__ void write_pair(int v, const float (&e)[kPair][kOwned], const Factors& factors) const {
    int64_t at[kPair];
#pragma unroll
    for (int r = 0; r < kPair; ++r) at[r] = gradient_row(p_, v + r, i_) + gradient_column(0);
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      float of_all[kOctet];
#pragma unroll
      for (int k = 0; k < kOctet; ++k) of_all[k] = rounded_product(all_[q * kOctet + k], factors.of_targets);
#pragma unroll
      for (int r = 0; r < kPair; ++r) {
        float g[kOctet];
#pragma unroll
        for (int k = 0; k < kOctet; ++k) g[k] = fmaf(e[r][q * kOctet + k], factors.of_e[r], of_all[k]);
        store_whole_gradient<kType>(p_, at[r] + q * kWarp * kOctet, g);
      }
    }
  }

  // Writes what is aligned of rows G_v and G_v+1; adds to `matched` what source_terms left out.
  __device__ void finish_sources(int v, const float (&e)[kPair][kOwned], const Factors& factors, float& matched) {
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
#pragma unroll
      for (int r = 0; r < kPair; ++r) {
        if (v + r >= V()) continue;
        float g[kOctet];
        if (is_target(v + r)) {
          sum_targets(g, v + r, q);
          float s[kOctet];
          load_scores(s, row_on_chip(L_ + v + r) + octet_place(q));
#pragma unroll
          for (int k = 0; k < kOctet; ++k) {
            matched = fmaf(g[k], s[k], matched);
            g[k] = fmaf(e[r][q * kOctet + k], factors.of_e[r], rounded_product(g[k], factors.of_targets));
          }
        } else {
#pragma unroll
          for (int k = 0; k < kOctet; ++k)
            g[k] =
                fmaf(e[r][q * kOctet + k], factors.of_e[r], rounded_product(all_[q * kOctet + k], factors.of_targets));
        }
        if (is_aligned_gradient(q)) store_whole_gradient(p_, gradient_row(p_, v + r, i_) + gradient_column(q), g);
      }
    }
  }

  __device__ __forceinline__ int gradient_column(int q) const { return first_ + octet_place(0) + q * kWarp * kOctet; }
  __device__ __forceinline__ bool is_aligned_gradient(int q) const {
    return p_.gradient && a_.gradient_aligned && static_cast<int>(p_.n) - gradient_column(q) >= kOctet;
  }

  // The gradient's octets that are cut or not aligned, from scores again: few, or all of them in a gradient that is
  // slow to write anyway.
  __device__ void finish_cut_octets(int v, const float (&exponent)[kPair], const Factors& factors) const {
#pragma unroll 1
    for (int q = 0; q < kOctets; ++q) {
      if (is_aligned_gradient(q) || gradient_column(q) >= static_cast<int>(p_.n)) continue;
#pragma unroll 1
      for (int r = 0; r < kPair && v + r < V(); ++r) {
        float s[kOctet], g[kOctet];
        load_scores(s, row_on_chip(L_ + v + r) + octet_place(q));
        sum_targets(g, is_target(v + r) ? v + r : L_, q);
        const float of_e = r ? factors.of_e[1] : factors.of_e[0], exponent_r = r ? exponent[1] : exponent[0];
#pragma unroll
        for (int k = 0; k < kOctet; ++k)
          g[k] =
              fmaf(exp2_fast(fmaf(s[k], source_scale_, exponent_r)), of_e, rounded_product(g[k], factors.of_targets));
        store_gradient(p_, gradient_row(p_, v + r, i_), gradient_column(q), g, false);
      }
    }
  }

  __device__ void add_row(int v, const SourceRow& row) {
    if (thread() < kTogether && v < V())
      of_rows_.add(row_sum(v), row.exponent, row.total, row.dot * source_scale_ + row.total * row.exponent);
  }

  // The row of the image before which all are asked for once sums of source rows v and v + 1 have met. No thread reads
  // the pair before this one any more, nor this pair, unless finish_sources or finish_cut_octets does.
  __device__ __forceinline__ int fetched_after(int v) const {
    return L_ + v + kRing + (v >= 0 && (is_target(v) || a_.gradient_cut) ? 0 : kPair);
  }

  __device__ void match_sources() {
    float exponent[kPair] = {};  // those of the last pair, guesses for the next
    SourceRow kept = {};         // the row of kTogether that this thread looks after
#pragma unroll 1
    for (int v = 0; v < V(); v += kPair) {
      float s[kPair][kOwned], e[kPair][kOwned], sums[2 * kPair], matched;
#pragma unroll 1
      for (bool again = false;; again = true) {
        Base::template read_pair<0>(s, L_ + v, v + kPair > V());
        if (again) source_exponents(s, exponent);
        matched = source_terms(s, v, exponent, e, sums);
        if (again || !is_poor_pair(sums)) break;
      }
      if (arriving_.takes_part(a_.source_aligned)) fetch_rows(fetched_after(v - kPair), fetched_after(v));
      Factors factors = {{}, -p_.pair_weight * p_.gradient_scale};
#pragma unroll
      for (int r = 0; r < kPair; ++r) {
        factors.of_e[r] = row_sum(v + r) / sums[2 * r] * p_.gradient_scale;
        if (static_cast<unsigned>(v + r) % kTogether == thread()) kept = {exponent[r], sums[2 * r], sums[2 * r + 1]};
      }
      if (kWritesPairs && is_aligned_gradient(kOctets - 1) && !is_target(v) && v + kPair <= V()) {
        if (p_.gradient_type == FloatType::kFloat32) write_pair<FloatType::kFloat32>(v, e, factors);
        else if (p_.gradient_type == FloatType::kFloat16) write_pair<FloatType::kFloat16>(v, e, factors);
        else write_pair<FloatType::kBFloat16>(v, e, factors);
      } else if (p_.gradient || is_target(v)) {
        finish_sources(v, e, factors, matched);
        if (p_.gradient) finish_cut_octets(v, exponent, factors);
      }
      matched_ += matched;
      if ((v + kPair) % kTogether == 0 || v + kPair >= V())
        add_row(v / kTogether * kTogether + static_cast<int>(thread()), kept);
    }
    report();
  }

  __device__ void report() {
    float sums[4] = {matched_, of_rows_.lse, of_rows_.entropy, 0.0f};
    team_.reduce(sums, Sum());
    if (!reports_) return;
    p_.sums[i_] = sums[1] - sums[0] * p_.pair_weight * number(p_.score_over_tau);
    p_.sums[2 * p_.sums_stride + i_] = sums[2];
  }

  // Source rows whose parts are found at once: a cluster's threads have no registers left to keep more.
  static constexpr int kTogether = kCluster ? kPair : kWarp;
  // Clusters of float32 scores have none for write_pair either.
  static constexpr bool kWritesPairs = !kCluster || sizeof(Score) == 2;

  float matched_ = 0.0f;  // this thread's part of sum_vj Pbar_vj s_vj / pair_weight
  SourceSums of_rows_;    // of those that this thread looks after
};

template <class Score, bool kCluster, int kRing>
__global__ void __launch_bounds__(kMostThreads, kRegisterThreads / kMostThreads) match_kernel(const MatchArguments a) {
  Image<Score, kCluster, kRing>(a, blockIdx.x / (kCluster ? a.p.team.cluster : 1)).run();
}

template <class Score>
void launch_match(const char* name, const MatchArguments& a, const Where& where) {
  const Match& p = a.p;
  const int64_t share = static_cast<int64_t>(p.team.threads) * kOwned;
  const int64_t shared = kScratchBytes + share * (p.L * sizeof(float) + p.stages * sizeof(Score));
  const Shape shape = {dim3(static_cast<unsigned>(p.b * p.team.cluster)), p.team.threads, shared, p.team.cluster};
  if (p.team.cluster > 1) return launch(name, match_kernel<Score, true, kFewStages>, shape, where, a);
  if constexpr (sizeof(Score) == 2)
    if (p.stages == kStages) return launch(name, match_kernel<Score, false, kStages>, shape, where, a);
  launch(name, match_kernel<Score, false, kFewStages>, shape, where, a);
}

}  // namespace

void match(const Match& p, const Where& where) {
  const MatchArguments a = {p,
                            scores_aligned(p.target),
                            scores_aligned(p.source),
                            is_aligned(p.targets, p.targets_view_stride, p.n),
                            gradient_aligned(p),
                            p.gradient && (!gradient_aligned(p) || p.n % kOctet != 0)};
  if (p.team.threads == 0) match_long(a, where);
  else if (p.target.type == ScoreType::kInt16) launch_match<int16_t>("match_kernel<int16>", a, where);
  else launch_match<float>("match_kernel<float32>", a, where);
}

}  // namespace bam::cuda
