// Per image: the targets P of its L rows, and the loss, entropies and gradient of its V source rows against them, every
// score read and exponentiated once.
//
// A block, or a cluster, holds an image. A thread owns kOwned columns of every row: their scores come on chip a few
// rows ahead; it keeps their targets in shared memory that only it reads, and writes their gradient when the row is on
// chip, so that the gradient may take the place of the scores. The barriers are those of the row sums, one for two
// rows. What a row adds to the sums of its image is found by one thread, another for each row of 32: those that wait
// for it wait once.
#include "launch.cuh"
#include "match.cuh"
#include "pass.cuh"

namespace bam::cuda {
namespace {

// Which of a thread's columns count.
using Chosen = unsigned;
static_assert(kOwned <= 32, "one bit for each");

constexpr int kPair = 2;  // rows that share a reduction
static_assert(kStages >= 2 * kPair, "the next pair comes while one is finished");
static_assert(kPair == 2, "sums of two numbers a row are reduced at once, four at most");

// A source row's exponent, sum_j e_j and sum_j e_j s_j.
struct SourceRow {
  float exponent, total, dot;
};

template <class Score, bool kCluster>
class Image {
 public:
  __device__ Image(const MatchArguments& a, unsigned i)
      : a_(a),
        p_(a.p),
        i_(i),
        share_(static_cast<int>(blockDim.x) * kOwned),
        L_(static_cast<int>(a.p.L)),
        first_(kCluster ? static_cast<int>(cluster_rank()) * share_ : 0),
        team_(static_cast<float*>(shared_memory())),
        arriving_(static_cast<float*>(shared_memory()), kStages, a.p.n - first_) {
    targets_ = reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + kScratchBytes);
    ring_ = reinterpret_cast<Score*>(targets_ + p_.L * share_ / 4);
    reports_ = thread() == 0;
  }

  __device__ void run() {
    follow_earlier_kernels();
    fetch_rows(0, kStages);
    scale_ = number(p_.target_scale);
    source_scale_ = number(p_.source_scale);
    find_targets();
    if (p_.top_k) keep_largest();
    if (reports_) p_.sums[p_.sums_stride + i_] = entropy_;
    if (p_.targets) {
#pragma unroll 1
      for (int t = 0; t < L_; ++t) write_target(t);
    }
    if (p_.V) match_sources();
  }

 private:
  // The one that looks after rows; in other blocks of a cluster than the first it has none.
  static __device__ __forceinline__ unsigned thread() { return !kCluster || cluster_rank() == 0 ? threadIdx.x : ~0u; }

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
  // Of the pair of rows that begins at row u; of that row twice where it is alone.
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
        read_pair<kStages - kPair>(s, t, t + kPair > L_);
        if (again) target_exponents(s, col, everything, exponent);
        target_terms(s, col, everything, exponent, p, sums);
        if (again || !is_poor_pair(sums)) break;
      }
      // These rows are not read again: those that follow take their places.
      fetch_rows(t + kStages, (t + kPair < L_ ? t + kPair : L_) + kStages);
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

  // Once sums of the pair of rows v and v + 1 have met, rows before this one have been asked for: no thread reads the
  // pair before any more nor, but for what finish_sources and finish_cut_octets do, this pair.
  __device__ __forceinline__ int fetched_after(int v) const {
    return L_ + v + kStages + (v >= 0 && (is_target(v) || a_.gradient_cut) ? 0 : kPair);
  }

  __device__ void match_sources() {
    float exponent[kPair] = {};  // those of the last pair, guesses for the next
    SourceRow kept = {};         // the row of kTogether that this thread looks after
#pragma unroll 1
    for (int v = 0; v < V(); v += kPair) {
      float s[kPair][kOwned], e[kPair][kOwned], sums[2 * kPair], matched;
#pragma unroll 1
      for (bool again = false;; again = true) {
        read_pair<0>(s, L_ + v, v + kPair > V());
        if (again) source_exponents(s, exponent);
        matched = source_terms(s, v, exponent, e, sums);
        if (again || !is_poor_pair(sums)) break;
      }
      fetch_rows(fetched_after(v - kPair), fetched_after(v));
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

  const MatchArguments& a_;
  const Match& p_;
  unsigned i_;
  int share_, L_, first_;  // a row on chip has fewer than 2^24 columns
  RowTeam<kCluster> team_;
  Arriving arriving_;
  float4* targets_;  // (L, share)
  Score* ring_;      // (kStages, share)
  bool reports_;
  float scale_ = 0.0f, source_scale_ = 0.0f;
  float entropy_ = 0.0f;    // of targets, where this thread reports
  float matched_ = 0.0f;    // this thread's part of sum_vj Pbar_vj s_vj / pair_weight
  SourceSums of_rows_;      // of those that this thread looks after
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
