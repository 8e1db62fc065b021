// The loss and its statistics, at the end of a step: one block, in a fixed order.
#include "intrinsics.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace bam::cuda {
namespace {

// Threads of the one block. Some read columns and others the rest, so that all reads are on their way at once.
constexpr int kThreads = 1024, kColumnThreads = 512, kNormThreads = 256;
constexpr int kImageThreads = kThreads - kColumnThreads - kNormThreads;

struct Totals {
  double loss = 0.0, target_entropy = 0.0, source_entropy = 0.0, columns = 0.0;
  float least = INFINITY, most = -INFINITY;
};
__device__ __forceinline__ Totals exchange(const Totals& x, int mask) {
  using bam::cuda::exchange;
  return {exchange(x.loss, mask),    exchange(x.target_entropy, mask), exchange(x.source_entropy, mask),
          exchange(x.columns, mask), exchange(x.least, mask),          exchange(x.most, mask)};
}
struct AddTotals {
  __device__ __forceinline__ Totals operator()(const Totals& a, const Totals& b) const {
    return {a.loss + b.loss,
            a.target_entropy + b.target_entropy,
            a.source_entropy + b.source_entropy,
            a.columns + b.columns,
            fminf(a.least, b.least),
            fmaxf(a.most, b.most)};
  }
};

__device__ Totals totals_of_thread(const LossAndStats& p) {
  Totals mine;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kColumnThreads) {
#pragma unroll 16
    for (int64_t j = thread; j < p.n; j += kColumnThreads) {
      const float c = p.c[j];
      mine.columns += c;  // NaN too, which the two below leave out
      mine.least = fminf(mine.least, c);
      mine.most = fmaxf(mine.most, c);
    }
  } else if (thread < kColumnThreads + kNormThreads) {
    double spoilt = 0.0;
    if (p.norm) {
#pragma unroll 8
      for (int64_t i = thread - kColumnThreads; i < p.m; i += kNormThreads) spoilt += 0.0 * p.norm[i];
    }
    mine.loss = mine.target_entropy = mine.source_entropy = spoilt;
  } else {
    for (int64_t i = thread - kColumnThreads - kNormThreads; i < p.count; i += kImageThreads) {
      mine.loss += p.images[i];
      mine.target_entropy += p.images[p.count + i];
      mine.source_entropy += p.images[2 * p.count + i];
    }
  }
  return mine;
}

__global__ void __launch_bounds__(kThreads, 1) loss_and_stats_kernel(const LossAndStats p) {
  follow_earlier_kernels();
  Totals totals[1] = {totals_of_thread(p)};
  over_block<kThreads / kWarp>(totals, static_cast<Totals*>(shared_memory()), AddTotals());
  if (threadIdx.x != 0) return;
  const Totals& all = totals[0];
  const double B = static_cast<double>(p.B), mean = all.columns / static_cast<double>(p.n);
  const double loss = all.loss / B, target_entropy = all.target_entropy / (B * p.L);
  const double above = all.most / mean - 1.0, below = 1.0 - all.least / mean;
  p.loss[0] = static_cast<float>(loss);
  p.stats[0] = static_cast<float>(target_entropy);
  p.stats[1] = static_cast<float>(all.source_entropy / (B * p.V));
  p.stats[2] = static_cast<float>(loss - target_entropy);
  p.stats[3] = static_cast<float>(below > above ? below : above);
  p.stats[4] = static_cast<float>(p.uniform_loss);
  p.stats[5] = static_cast<float>(p.uniform_loss - loss);
}

}  // namespace

void loss_and_stats(const LossAndStats& p, const Where& where) {
  launch("loss_and_stats_kernel", loss_and_stats_kernel,
         {dim3(1), kThreads, kThreads / kWarp * static_cast<int64_t>(sizeof(Totals))}, where, p);
}

}  // namespace bam::cuda
