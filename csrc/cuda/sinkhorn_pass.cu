// One Sinkhorn iteration in one read of the scores: a row is on chip, in one block or spread over a cluster, while it
// is summed and added to the columns.
//
// A thread owns 16 columns: their potentials and sums stay in its registers. Their scores come to shared memory some
// rows ahead; the one barrier is that of the row sums.
#include "launch.cuh"
#include "pass.cuh"

namespace bam::cuda {
namespace {

struct Pass {
  SinkhornPass p;
  bool aligned, partial_aligned;
};

template <class Score, bool kCluster>
__global__ void __launch_bounds__(kMostThreads) sinkhorn_pass_kernel(const Pass a) {
  const SinkhornPass& p = a.p;
  auto* scratch = static_cast<float*>(shared_memory());
  RowTeam<kCluster> team(scratch);
  Score* ring = reinterpret_cast<Score*>(static_cast<char*>(shared_memory()) + kScratchBytes);
  const int blocks = kCluster ? p.team.cluster : 1;
  const int64_t share = static_cast<int64_t>(blockDim.x) * kOwned, chunk = blockIdx.x / blocks;
  const int64_t first = (kCluster ? cluster_rank() : 0) * share;
  const int64_t begin = chunk * p.rows, end = begin + p.rows < p.m ? begin + p.rows : p.m;
  const Score* s = static_cast<const Score*>(p.scores.data);
  const Arriving arriving(scratch, kStages, first, p.n);
  follow_earlier_kernels();
  const float scale = number(p.scale);

  const auto fetch = [&](int64_t i, unsigned group) {
    const int stage = stage_of(group);
#pragma unroll
    for (int r = 0; r < kPassRows; ++r)
      if (i + r < end)
        arriving.fetch(ring + (stage * kPassRows + r) * share, s + (i + r) * p.scores.row_stride, a.aligned, stage);
    arriving.send_off(stage);
  };
  for (unsigned group = 0; group < kStages - 1; ++group) fetch(begin + group * kPassRows, group);
  OwnColumns col;
  col.load(p.col, first, p.n);
  float c[kOwned] = {}, exponent[kPassRows], next[kPassRows];
#pragma unroll
  for (int r = 0; r < kPassRows; ++r) next[r] = begin + r < end ? p.row.exponent[begin + r] : 0.0f;
  unsigned group = 0;
  for (int64_t i = begin; i < end; i += kPassRows, ++group) {
    // Since all threads have read the rows before, their sums have met.
    fetch(i + (kStages - 1) * kPassRows, group + kStages - 1);
    arriving.wait<kStages - 1>(stage_of(group), odd_use(group));
#pragma unroll
    for (int r = 0; r < kPassRows; ++r) {
      exponent[r] = next[r];
      next[r] = i + kPassRows + r < end ? p.row.exponent[i + kPassRows + r] : 0.0f;
    }
    const int count = end - i < kPassRows ? static_cast<int>(end - i) : kPassRows;
    pass_rows(ring + stage_of(group) * kPassRows * share, share, i, count, col, scale, exponent, p.row, c, team);
  }
  store_own(p.partial + chunk * p.n, c, first, p.n, a.partial_aligned);
}

template <class Score>
void launch_pass(const char* name, const SinkhornPass& p, const Where& where) {
  const auto* data = static_cast<const Score*>(p.scores.data);
  const Pass a = {p, is_aligned(data, 0, p.scores.row_stride), is_aligned(p.partial, 0, p.n)};
  const int64_t ring = static_cast<int64_t>(kStages) * kPassRows * p.team.threads * kOwned * sizeof(Score);
  const Shape shape = {dim3(blocks_for(p.m, p.rows) * p.team.cluster), p.team.threads, kScratchBytes + ring,
                       p.team.cluster};
  if (p.team.cluster > 1) launch(name, sinkhorn_pass_kernel<Score, true>, shape, where, a);
  else launch(name, sinkhorn_pass_kernel<Score, false>, shape, where, a);
}

}  // namespace

void sinkhorn_pass(const SinkhornPass& p, const Where& where) {
  if (p.scores.type == ScoreType::kInt16) launch_pass<int16_t>("sinkhorn_pass_kernel<int16>", p, where);
  else launch_pass<float>("sinkhorn_pass_kernel<float32>", p, where);
  const Potential untouched = {nullptr, nullptr};
  add_chunks({p.partial, blocks_for(p.m, p.rows), p.n, p.col.mantissa, p.c, p.accumulate, p.divide ? p.col : untouched},
             where);
}

#ifdef __CUDACC__
cudaError_t find_forms(int shared_bytes, bool* is_hopper_code, int* cluster) {
  auto* kernel = sinkhorn_pass_kernel<float, true>;
  *is_hopper_code = false;
  *cluster = 1;
  cudaFuncAttributes found;
  cudaError_t status = cudaFuncGetAttributes(&found, kernel);
  // Code for an older architecture, compiled again for this device, knows no clusters and waits for no kernel.
  if (status != cudaSuccess || found.ptxVersion < 90) return status;
  *is_hopper_code = true;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kMostCluster);
  config.blockDim = dim3(kMostThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  return cudaOccupancyMaxPotentialClusterSize(cluster, kernel, &config);
}
#endif

}  // namespace bam::cuda
