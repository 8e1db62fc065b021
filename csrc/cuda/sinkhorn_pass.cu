// One Sinkhorn iteration in one read of the scores: a row is on chip, in one block or spread over a cluster, while it
// is summed and added to the columns.
//
// A thread owns kOwned columns, whose sums stay in its registers. Their scores come to shared memory some groups of
// rows ahead. Where a block has whole rows, a thread takes the exponentials of the next group before it asks for the
// row sums of this one, so that it waits for no other thread unless that is late by a group. The chunks' column sums
// are added by a small kernel, which divides too: ranks need the sums between two passes, and in the next pass every
// block would have to read those of all.
#include "launch.cuh"
#include "pass.cuh"

namespace bam::cuda {
namespace {

struct Pass {
  SinkhornPass p;
  bool aligned, partial_aligned;
};

// Groups of kRows rows of a chunk, named by their first row, kStages of them on chip or on their way.
template <class Score, int kRows, int kStages>
class Ring {
 public:
  // s: the block's part of the chunk's rows, of which there are `rows` with `left` columns from there on
  __device__ __forceinline__ Ring(float* scratch, Score* places, const Pass& a, const Score* s, int rows, int64_t left)
      : arriving_(scratch, kStages, left),
        places_(places),
        s_(s),
        stride_(a.p.scores.row_stride),
        rows_(rows),
        aligned_(a.aligned) {}

  __device__ __forceinline__ void fetch(int i) const {
    if (!arriving_.takes_part(aligned_)) return;
    const int left = rows_ - i;
    arriving_.fetch(at(i), s_ + i * stride_, stride_, left < kRows ? left : kRows, aligned_, stage(i));
    arriving_.send_off(stage(i));
  }
  // kLater groups were fetched since.
  template <int kLater>
  __device__ __forceinline__ void wait(int i) const {
    arriving_.template wait<kLater>(stage(i), odd_use(static_cast<unsigned>(i) / kRows, kStages));
  }
  __device__ __forceinline__ Score* at(int i) const {
    return places_ + stage(i) * kRows * static_cast<int>(blockDim.x) * kOwned;
  }

 private:
  static __device__ __forceinline__ int stage(int i) { return stage_of(static_cast<unsigned>(i) / kRows, kStages); }

  const Arriving arriving_;
  Score* places_;
  const Score* s_;
  int64_t stride_;
  int rows_;
  bool aligned_;
};

// The rows of a chunk, added group by group. kAhead: the exponentials of the next group are taken before the sums of
// this one are asked for.
template <class Score, int kRows, int kStages, bool kAhead, bool kCluster>
class ChunkSums {
 public:
  using Rows = Group<Score, kRows, kCluster>;

  // row: of the chunk's first row
  __device__ __forceinline__ ChunkSums(const Ring<Score, kRows, kStages>& ring, Rows& rows,
                                       PassTeam<kRows, kCluster>& team, const Potential& row, int count)
      : ring_(ring), rows_(rows), team_(team), row_(row), count_(count), next_(guess(0)) {}

  __device__ __forceinline__ void add_all() {
    // Without arrivals the sums of a group are waited for by all threads: nothing can be done in between.
    const bool ahead = kAhead && has_arrivals();
    Terms<kRows> even, odd;
#pragma unroll 1
    while (i_ < count_) {
      ring_.template wait<kStages - 1>(i_);
      exponentiate(i_, even);
      team_.offer(totals_);
      bool added;
#pragma unroll 1
      do {
        added = add(even, odd, ahead);
        if (ahead && added && i_ < count_) added = add(odd, even, ahead);
      } while (ahead && added && i_ < count_);
      if (added) continue;
      const float better = rows_.better_exponent(ring_.at(i_));
      next_ = lane() % kRows < count_ - i_ ? better : -INFINITY;
      is_guess_ = false;
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kWarp); }

  // Lane r's exponent of row i + r to start from. Rows past the last add nothing.
  __device__ __forceinline__ float guess(int i) const {
    return lane() < kRows && i + lane() < count_ ? row_.exponent[i + lane()] : -INFINITY;
  }
  __device__ __forceinline__ void exponentiate(int i, Terms<kRows>& terms) {
    const float exponent = next_;
    next_ = guess(i + kRows);
    rows_.exponentiate(terms, totals_, ring_.at(i), exponent);
  }
  // Adds group i_, whose sums are offered, unless its guess was poor; `later` become the terms of the next.
  __device__ __forceinline__ bool add(Terms<kRows>& terms, Terms<kRows>& later, bool ahead) {
    const bool has_later = ahead && i_ + kRows < count_;
    if (has_later) {
      ring_.template wait<kStages - 2>(i_ + kRows);
      exponentiate(i_ + kRows, later);
    }
    const float total = team_.collect();
    if (rows_.any_poor(total, count_ - i_) && is_guess_) return false;
    if (has_later) team_.offer(totals_);
    // Since all threads have offered their sums, they have read the rows.
    ring_.fetch(i_ + kStages * kRows);
    rows_.add(terms, total, i_, count_ - i_, row_);
    is_guess_ = true;
    i_ += kRows;
    return true;
  }

  const Ring<Score, kRows, kStages>& ring_;
  Rows& rows_;
  PassTeam<kRows, kCluster>& team_;
  const Potential row_;
  const int count_;
  float next_, totals_[kRows];
  int i_ = 0;
  bool is_guess_ = true;
};

template <class Score, int kRows, int kStages, bool kAhead, bool kCluster>
__global__ void __launch_bounds__(kMostThreads, kRegisterThreads / kMostThreads) sinkhorn_pass_kernel(const Pass a) {
  const SinkhornPass& p = a.p;
  auto* scratch = static_cast<float*>(shared_memory());
  PassTeam<kRows, kCluster> team(scratch);
  auto* potentials = static_cast<char*>(shared_memory()) + kScratchBytes;
  const int blocks = kCluster ? p.team.cluster : 1;
  const int share = static_cast<int>(blockDim.x) * kOwned;
  const int64_t chunk = blockIdx.x / blocks;
  const int64_t first = static_cast<int64_t>(kCluster ? cluster_rank() : 0) * share;
  const int64_t begin = chunk * p.rows;
  const int mine = static_cast<int>(begin + p.rows < p.m ? p.rows : p.m - begin);
  const Ring<Score, kRows, kStages> ring(
      scratch, reinterpret_cast<Score*>(potentials + share * Potentials<Score>::kBytes), a,
      static_cast<const Score*>(p.scores.data) + begin * p.scores.row_stride + first, mine, p.n - first);
  follow_earlier_kernels();
  // What the first group takes is asked for before all else.
  ring.fetch(0);
  OwnColumns own;
  own.load(p.col, first, p.n);
  Group<Score, kRows, kCluster> rows(reinterpret_cast<float4*>(potentials), team, number(p.scale));
  ChunkSums<Score, kRows, kStages, kAhead, kCluster> of_rows(ring, rows, team,
                                                             {p.row.exponent + begin, p.row.mantissa + begin}, mine);
#pragma unroll 1
  for (int g = 1; g < kStages; ++g) ring.fetch(g * kRows);
  rows.begin(own);
  of_rows.add_all();
  store_own(p.partial + chunk * p.n, rows.sums(), first, p.n, a.partial_aligned);
}

template <class Score, int kGroup>
void launch_pass(const char* name, const SinkhornPass& p, const Where& where) {
  const auto* data = static_cast<const Score*>(p.scores.data);
  const Pass a = {p, is_aligned(data, 0, p.scores.row_stride), is_aligned(p.partial, 0, p.n)};
  const int64_t of_column = Potentials<Score>::kBytes + kGroups * kGroup * static_cast<int64_t>(sizeof(Score));
  const Shape shape = {dim3(blocks_for(p.m, p.rows) * p.team.cluster), p.team.threads,
                       kScratchBytes + p.team.threads * kOwned * of_column, p.team.cluster};
  constexpr bool kHalves = kPassAhead && kGroup == 4;
  constexpr int kRows = kHalves ? kGroup / 2 : kGroup, kStages = kGroups * kGroup / kRows;
  if (p.team.cluster > 1) launch(name, sinkhorn_pass_kernel<Score, kGroup, kGroups, false, true>, shape, where, a);
  else launch(name, sinkhorn_pass_kernel<Score, kRows, kStages, kHalves, false>, shape, where, a);
}

template <class Score>
void launch_pass(const char* name, const SinkhornPass& p, const Where& where) {
  if (p.group == kMostRows<Score>) launch_pass<Score, kMostRows<Score>>(name, p, where);
  else launch_pass<Score, kMostRows<Score> / 2>(name, p, where);
}

}  // namespace

void sinkhorn_pass(const SinkhornPass& p, const Where& where) {
  const bool is_fixed = p.scores.type == ScoreType::kInt16;
  if (is_fixed) launch_pass<int16_t>("sinkhorn_pass_kernel<int16>", p, where);
  else launch_pass<float>("sinkhorn_pass_kernel<float32>", p, where);
  const bool leaves_factor = is_fixed ? Potentials<int16_t>::kLeavesFactor : Potentials<float>::kLeavesFactor;
  const Potential untouched = {nullptr, nullptr};
  add_chunks({p.partial, blocks_for(p.m, p.rows), p.n, leaves_factor ? p.col.mantissa : nullptr, p.c, p.accumulate,
              p.divide ? p.col : untouched},
             where);
}

#ifdef __CUDACC__
cudaError_t find_forms(int shared_bytes, bool* is_hopper_code, int (&clusters)[4]) {
  auto* kernel = sinkhorn_pass_kernel<float, kMostRows<float>, kGroups, false, true>;
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
