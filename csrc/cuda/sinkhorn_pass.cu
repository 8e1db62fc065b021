// One Sinkhorn iteration in one read of the scores: a row is on chip, in one block or spread over a cluster, while it
// is summed and added to the columns.
//
// A thread owns kOwned columns, whose sums stay in its registers. Their scores come to shared memory a group of rows
// ahead; the one barrier of a group is that of its row sums. The chunks' column sums are added by a small kernel, which
// divides too: ranks need the sums between two passes, and in the next pass every block would have to read those of
// all.
#include "launch.cuh"
#include "pass.cuh"

namespace bam::cuda {
namespace {

struct Pass {
  SinkhornPass p;
  bool aligned, partial_aligned;
};

template <class Score, int kRows, bool kCluster>
__global__ void __launch_bounds__(kMostThreads, kRegisterThreads / kMostThreads) sinkhorn_pass_kernel(const Pass a) {
  const SinkhornPass& p = a.p;
  auto* scratch = static_cast<float*>(shared_memory());
  RowTeam<kCluster> team(scratch);
  auto* potentials = reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + kScratchBytes);
  Score* ring = reinterpret_cast<Score*>(potentials + blockDim.x * (kOwned * kPotentialBytes / sizeof(float4)));
  const int blocks = kCluster ? p.team.cluster : 1;
  const int share = static_cast<int>(blockDim.x) * kOwned;
  const int64_t chunk = blockIdx.x / blocks;
  const int64_t first = static_cast<int64_t>(kCluster ? cluster_rank() : 0) * share;
  const int64_t begin = chunk * p.rows;
  const int mine = static_cast<int>(begin + p.rows < p.m ? p.rows : p.m - begin);
  const Score* s = static_cast<const Score*>(p.scores.data) + begin * p.scores.row_stride + first;
  const Arriving arriving(scratch, kGroups, p.n - first);
  follow_earlier_kernels();
  const auto fetch = [&](int i, unsigned group) {
    const int stage = stage_of(group, kGroups);
    if (!arriving.takes_part(a.aligned)) return;
    const int left = mine - i;
    arriving.fetch(ring + stage * kRows * share, s + i * p.scores.row_stride, p.scores.row_stride,
                   left < kRows ? left : kRows, a.aligned, stage);
    arriving.send_off(stage);
  };
  // Before anything that waits for memory.
  for (unsigned group = 0; group < kGroups - 1; ++group) fetch(static_cast<int>(group) * kRows, group);
  const float scale = number(p.scale);
  Group<Score, kRows, kCluster> rows(potentials, team);
  rows.load(p.col, first, p.n);
  // The exponents that the next group starts from, one a lane.
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const auto guess = [&](int i) { return lane < kRows && i + lane < mine ? p.row.exponent[begin + i + lane] : 0.0f; };
  float next = guess(0);
  for (int i = 0; i < mine; i += kRows) {
    const unsigned group = static_cast<unsigned>(i) / kRows;
    // Since all threads have read the rows before, their sums have met.
    fetch(i + (kGroups - 1) * kRows, group + kGroups - 1);
    arriving.wait<kGroups - 1>(stage_of(group, kGroups), odd_use(group, kGroups));
    const float exponent = next;
    next = guess(i + kRows);
    rows.pass(ring + stage_of(group, kGroups) * kRows * share, begin + i, mine - i, scale, exponent, p.row);
  }
  store_own(p.partial + chunk * p.n, rows.sums(), first, p.n, a.partial_aligned);
}

template <class Score, int kRows>
void launch_pass(const char* name, const SinkhornPass& p, const Where& where) {
  const auto* data = static_cast<const Score*>(p.scores.data);
  const Pass a = {p, is_aligned(data, 0, p.scores.row_stride), is_aligned(p.partial, 0, p.n)};
  const int64_t of_column = kPotentialBytes + kGroups * kRows * static_cast<int64_t>(sizeof(Score));
  const Shape shape = {dim3(blocks_for(p.m, p.rows) * p.team.cluster), p.team.threads,
                       kScratchBytes + p.team.threads * kOwned * of_column, p.team.cluster};
  if (p.team.cluster > 1) launch(name, sinkhorn_pass_kernel<Score, kRows, true>, shape, where, a);
  else launch(name, sinkhorn_pass_kernel<Score, kRows, false>, shape, where, a);
}

template <class Score>
void launch_pass(const char* name, const SinkhornPass& p, const Where& where) {
  if (p.group == kMostRows<Score>) launch_pass<Score, kMostRows<Score>>(name, p, where);
  else launch_pass<Score, kMostRows<Score> / 2>(name, p, where);
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
cudaError_t find_forms(int shared_bytes, bool* is_hopper_code, int (&clusters)[4]) {
  auto* kernel = sinkhorn_pass_kernel<float, kMostRows<float>, true>;
  *is_hopper_code = false;
  cudaFuncAttributes found;
  const cudaError_t status = cudaFuncGetAttributes(&found, kernel);
  // Code for an older architecture, compiled again for this device, knows no clusters and waits for no kernel.
  if (status != cudaSuccess || found.ptxVersion < 90) return status;
  *is_hopper_code = true;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (int k = 0; k < 4; ++k) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 2u << k;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(2u << k);
    config.blockDim = dim3(kMostThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&clusters[k], kernel, &config) != cudaSuccess) clusters[k] = 0;
  }
  cudaGetLastError();  // where there are no clusters, or none of a size, rows take other ways
  return cudaSuccess;
}
#endif

}  // namespace bam::cuda
