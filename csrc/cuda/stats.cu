// The loss and its statistics, at the end of a step: one block, in a fixed order.
#include "intrinsics.cuh"
#include "launch.cuh"

namespace bam::cuda {
namespace {

constexpr int kThreads = 512;

struct Totals {
  double loss = 0.0, target_entropy = 0.0, source_entropy = 0.0, columns = 0.0;
  float least = INFINITY, most = -INFINITY;

  __device__ void add(const Totals& other) {
    loss += other.loss;
    target_entropy += other.target_entropy;
    source_entropy += other.source_entropy;
    columns += other.columns;
    least = fminf(least, other.least);
    most = fmaxf(most, other.most);
  }
};

__device__ Totals totals_of_thread(const LossAndStats& p) {
  Totals mine;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
    mine.loss += p.images[i];
    mine.target_entropy += p.images[p.count + i];
    mine.source_entropy += p.images[2 * p.count + i];
  }
#pragma unroll 8
  for (int64_t j = threadIdx.x; j < p.n; j += kThreads) {
    const float c = p.c[j];
    mine.columns += c;  // NaN too, which the two below leave out
    mine.least = fminf(mine.least, c);
    mine.most = fmaxf(mine.most, c);
  }
  double spoilt = 0.0;
  if (p.norm)
    for (int64_t i = threadIdx.x; i < p.m; i += kThreads) spoilt += 0.0 * p.norm[i];
  mine.loss += spoilt;
  mine.target_entropy += spoilt;
  mine.source_entropy += spoilt;
  return mine;
}

__global__ void __launch_bounds__(kThreads) loss_and_stats_kernel(const LossAndStats p) {
  follow_earlier_kernels();
  auto* totals = static_cast<Totals*>(shared_memory());
  totals[threadIdx.x] = totals_of_thread(p);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    sync_block();
    if (threadIdx.x < static_cast<unsigned>(half)) totals[threadIdx.x].add(totals[threadIdx.x + half]);
  }
  if (threadIdx.x != 0) return;
  const Totals& all = totals[0];
  const double B = static_cast<double>(p.B), mean = all.columns / static_cast<double>(p.n);
  const double loss = all.loss / B, target_entropy = all.target_entropy / (B * p.L);
  const double residuals[2] = {all.most / mean - 1.0, 1.0 - all.least / mean};
  p.loss[0] = static_cast<float>(loss);
  p.stats[0] = static_cast<float>(target_entropy);
  p.stats[1] = static_cast<float>(all.source_entropy / (B * p.V));
  p.stats[2] = static_cast<float>(loss - target_entropy);
  p.stats[3] = static_cast<float>(residuals[residuals[1] > residuals[0]]);
  p.stats[4] = static_cast<float>(p.uniform_loss);
  p.stats[5] = static_cast<float>(p.uniform_loss - loss);
}

}  // namespace

void loss_and_stats(const LossAndStats& p, const Where& where) {
  launch("loss_and_stats_kernel", loss_and_stats_kernel,
         {dim3(1), kThreads, kThreads * static_cast<int64_t>(sizeof(Totals))}, where, p);
}

}  // namespace bam::cuda
