// `match` of rows too long for the chip: a read for each sum, then one more that writes P and G octet by octet. A block
// holds an image; a thread sees the same columns in every read, so that G may take the place of the scores.
#include "launch.cuh"
#include "match.cuh"

namespace bam::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kThreads <= kMostThreads, "the scratch of reductions has room for the most threads");
constexpr int64_t kTargetBytes = 64 << 10;  // of an octet of every target, for all threads

template <class Score>
class LongImage {
 public:
  __device__ LongImage(const MatchArguments& a, int64_t i)
      : a_(a), p_(a.p), i_(i), team_(static_cast<float*>(shared_memory())) {
    float* after = reinterpret_cast<float*>(static_cast<char*>(shared_memory()) + kScratchBytes);
    of_targets_ = reinterpret_cast<Row*>(after);
    of_sources_ = of_targets_ + p_.L;
    targets_ = reinterpret_cast<float*>(of_sources_ + p_.V) + threadIdx.x;
    means_ = p_.top_k ? p_.means + i_ * p_.n : nullptr;
    target_scale_ = number(p_.target_scale);
    source_scale_ = number(p_.source_scale);
  }

  __device__ void run() {
    for (int64_t t = 0; t < p_.L; ++t) find_target(t);
    sync_block();
    if (p_.top_k) keep_largest();
    for (int64_t v = 0; v < p_.V; ++v) find_source(v);
    sync_block();
    float matched[1] = {0.0f};
    for_octets([&](int64_t j) { finish(j, matched[0]); });
    team_.reduce(matched, Sum());
    if (threadIdx.x != 0) return;
    p_.sums[p_.sums_stride + i_] = entropy_;
    if (!p_.V) return;
    p_.sums[i_] = sources_.lse - matched[0] * number(p_.score_over_tau);
    p_.sums[2 * p_.sums_stride + i_] = sources_.entropy;
  }

 private:
  // Terms of a row are 2^(scale*s + exponent), and weight times that in P or G.
  struct Row {
    float exponent, weight;
  };

  template <class Each>
  __device__ void for_octets(Each each) const {
    for (int64_t j = threadIdx.x * kOctet; j < p_.n; j += blockDim.x * kOctet) each(j);
  }

  __device__ void target_scores(float (&x)[kOctet], int64_t t, int64_t j) const {
    const Score* s = static_cast<const Score*>(p_.target.data) + t * p_.target.view_stride + i_ * p_.target.row_stride;
    load_scores(x, s + j, p_.n - j, a_.target_aligned);
  }
  __device__ void source_scores(float (&x)[kOctet], int64_t v, int64_t j) const {
    const Score* s = static_cast<const Score*>(p_.source.data) + v * p_.source.view_stride + i_ * p_.source.row_stride;
    load_scores(x, s + j, p_.n - j, a_.source_aligned);
  }

  // Within the row and, with top-k once the threshold is known, kept.
  __device__ bool counts(int64_t j) const {
    if (j >= p_.n) return false;
    if (!has_threshold_) return true;
    return is_kept(threshold_, j);
  }

  __device__ bool is_kept(const Threshold& threshold, int64_t j) const {
    return threshold.keeps(bits_of(means_[j]), public_column(static_cast<uint32_t>(j), p_.W, p_.T, p_.B));
  }

  __device__ float target_term(float x, int64_t j, float exponent) const {
    return exp2_fast(fmaf(x, target_scale_, p_.col.exponent[j] + exponent)) * p_.col.mantissa[j];
  }

  // sum_j p_j and sum_j p_j log2(p_j) over the columns that count.
  __device__ void target_sums(int64_t t, float exponent, float (&sums)[2]) {
    sums[0] = sums[1] = 0.0f;
    for_octets([&](int64_t j) {
      float x[kOctet];
      target_scores(x, t, j);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        if (!counts(j + k)) continue;
        const float p = target_term(x[k], j + k, exponent);
        sums[0] += p;
        sums[1] = fmaf(p, log2_of(p), sums[1]);
      }
    });
    team_.reduce(sums, Sum());
  }

  __device__ float target_exponent(int64_t t) {
    float most[1] = {-INFINITY};
    for_octets([&](int64_t j) {
      float x[kOctet];
      target_scores(x, t, j);
#pragma unroll
      for (int k = 0; k < kOctet; ++k)
        if (counts(j + k)) most[0] = fmaxf(most[0], fmaf(x[k], target_scale_, p_.col.exponent[j + k]));
    });
    team_.reduce(most, Max());
    return exponent_of(most[0]);
  }

  __device__ void keep(Row* rows, int64_t row, float exponent, float weight) {
    if (threadIdx.x == 0) rows[row] = {exponent, weight};
  }

  __device__ void find_target(int64_t t) {
    float exponent = p_.row_exponent[t * p_.row_view_stride + i_], sums[2];
    target_sums(t, exponent, sums);
    if (is_poor(sums[0])) {
      exponent = target_exponent(t);
      target_sums(t, exponent, sums);
    }
    if (t == 0 && p_.row_out.exponent && threadIdx.x == 0) {
      const Power found = reciprocal(exponent, sums[0]);
      p_.row_out.exponent[i_] = found.exponent;
      p_.row_out.mantissa[i_] = found.mantissa;
    }
    keep(of_targets_, t, exponent, inverse_or_zero(sums[0]));
    entropy_ += entropy_of(sums[0], sums[1]);
  }

  // The k columns of the largest mean, which is written once, so that every comparison is of the same rounding; then P
  // again from the scores, because the kept mass of a view may have underflowed.
  __device__ void keep_largest() {
    for_octets([&](int64_t j) {
      float mean[kOctet] = {};
      for (int64_t t = 0; t < p_.L; ++t) {
        float x[kOctet];
        target_scores(x, t, j);
#pragma unroll
        for (int k = 0; k < kOctet; ++k)
          if (j + k < p_.n)
            mean[k] = fmaf(target_term(x[k], j + k, of_targets_[t].exponent), of_targets_[t].weight, mean[k]);
      }
      store_octet(means_ + j, mean, p_.n - j, false);
    });
    threshold_ = find_threshold(p_.top_k, p_.n, [&](const Threshold& threshold) {
      float found[1] = {0.0f};
      for_octets([&](int64_t j) {
        for (int k = 0; k < kOctet && j + k < p_.n; ++k) found[0] += is_kept(threshold, j + k) ? 1.0f : 0.0f;
      });
      team_.reduce(found, Sum());
      return static_cast<int64_t>(found[0]);
    });
    has_threshold_ = true;
    entropy_ = 0.0f;
    for (int64_t t = 0; t < p_.L; ++t) {
      const float exponent = target_exponent(t);
      float sums[2];
      target_sums(t, exponent, sums);
      keep(of_targets_, t, exponent, inverse_or_zero(sums[0]));
      entropy_ += entropy_of(sums[0], sums[1]);
    }
  }

  // sum_j e_j and sum_j e_j log2(e_j).
  __device__ void source_sums(int64_t v, float exponent, float (&sums)[2]) {
    sums[0] = sums[1] = 0.0f;
    for_octets([&](int64_t j) {
      float s[kOctet];
      source_scores(s, v, j);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        const float x = fmaf(s[k], source_scale_, exponent), e = exp2_fast(x);
        sums[0] += e;
        sums[1] = fmaf(e, x, sums[1]);
      }
    });
    team_.reduce(sums, Sum());
  }

  __device__ void find_source(int64_t v) {
    float sums[2];
    source_sums(v, source_exponent_, sums);
    if (is_poor(sums[0])) {
      float most[1] = {-INFINITY};
      for_octets([&](int64_t j) {
        float s[kOctet];
        source_scores(s, v, j);
#pragma unroll
        for (int k = 0; k < kOctet; ++k) most[0] = fmaxf(most[0], s[k] * source_scale_);
      });
      team_.reduce(most, Max());
      source_exponent_ = exponent_of(most[0]);
      source_sums(v, source_exponent_, sums);
    }
    const float a = row_sum_of_targets(v, p_);
    keep(of_sources_, v, source_exponent_, a / sums[0]);
    sources_.add(a, source_exponent_, sums[0], sums[1]);
  }

  // P and G of the octet at column j; adds Pbar_v s_v to `matched`.
  __device__ void finish(int64_t j, float& matched) {
    for (int64_t t = 0; t < p_.L; ++t) {
      float x[kOctet], p[kOctet];
      target_scores(x, t, j);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        p[k] = counts(j + k) ? target_term(x[k], j + k, of_targets_[t].exponent) * of_targets_[t].weight : 0.0f;
        targets_[(t * kOctet + k) * blockDim.x] = p[k];
      }
      if (p_.targets)
        store_octet(p_.targets + t * p_.targets_view_stride + i_ * p_.n + j, p, p_.n - j, a_.targets_aligned);
    }
    for (int64_t v = 0; v < p_.V; ++v) {
      float s[kOctet], g[kOctet];
      source_scores(s, v, j);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        float pbar = 0.0f;
        for (int64_t t = 0; t < p_.L; ++t)
          if (is_matched(t, v, p_.V)) pbar += targets_[(t * kOctet + k) * blockDim.x];
        pbar *= p_.pair_weight;
        matched = fmaf(pbar, s[k], matched);
        const float e = exp2_fast(fmaf(s[k], source_scale_, of_sources_[v].exponent));
        g[k] = (e * of_sources_[v].weight - pbar) * p_.gradient_scale;
      }
      if (p_.gradient) store_gradient(p_, gradient_row(p_, v, i_), j, g, a_.gradient_aligned);
    }
  }

  const MatchArguments& a_;
  const Match& p_;
  int64_t i_;
  RowTeam<false> team_;
  Row *of_targets_, *of_sources_;  // (L), (V)
  float* targets_;                 // (L, kOctet, threads): this thread's place in them
  float* means_;
  float target_scale_, source_scale_;
  Threshold threshold_ = {0, 0};
  bool has_threshold_ = false;
  float entropy_ = 0.0f;
  float source_exponent_ = 0.0f;  // of the last row, a guess for the next
  SourceSums sources_;
};

template <class Score>
__global__ void __launch_bounds__(kThreads, 1) match_long_kernel(const MatchArguments a) {
  follow_earlier_kernels();
  LongImage<Score>(a, blockIdx.x).run();
}

}  // namespace

void match_long(const MatchArguments& a, const Where& where) {
  const Match& p = a.p;
  const auto target_bytes = [&](int threads) { return p.L * kOctet * threads * static_cast<int64_t>(sizeof(float)); };
  int threads = kThreads;
  while (threads > kWarp && target_bytes(threads) > kTargetBytes) threads /= 2;
  const int64_t shared = kScratchBytes + (p.L + p.V) * 2 * static_cast<int64_t>(sizeof(float)) + target_bytes(threads);
  const Shape shape = {dim3(static_cast<unsigned>(p.b)), threads, shared};
  if (p.target.type == ScoreType::kInt16)
    launch("match_long_kernel<int16>", match_long_kernel<int16_t>, shape, where, a);
  else launch("match_long_kernel<float32>", match_long_kernel<float>, shape, where, a);
}

}  // namespace bam::cuda
