// All Sinkhorn iterations of a small problem in one launch: every block keeps its rows' scores in shared memory, and
// the blocks meet twice an iteration, once when their column sums are written and once when the columns are updated.
#include "launch.cuh"
#include "pass.cuh"

namespace bam::cuda {
namespace {

// kCluster: all blocks are one cluster, whose barrier is the cheaper one; else the launch is cooperative.
template <class Score, bool kCluster>
class SmallProblem {
 public:
  __device__ SmallProblem(const SinkhornOnChip& p, bool aligned) : p_(p), team_(static_cast<float*>(shared_memory())) {
    const Arriving arriving(static_cast<float*>(shared_memory()), 1, p.n);
    follow_earlier_kernels();
    const Score* s = static_cast<const Score*>(p.scores.data);
    for (int i = 0; i < mine(); ++i)
      arriving.fetch(scores() + i * share(), s + (begin() + i) * p.scores.row_stride, aligned, 0);
    arriving.send_off(0);
    arriving.wait<0>(0, 0);
  }

  __device__ void run() {
    first_column_sums();
    sync_all();
    for_column_groups([&](int64_t j, unsigned columns) { set_first(j, columns); });
    for (int iteration = 1; iteration < p_.iterations; ++iteration) {
      sync_all();
      pass();
      sync_all();
      for_column_groups([&](int64_t j, unsigned columns) { update(j, columns); });
    }
  }

 private:
  __device__ void sync_all() {
    if (kCluster) sync_cluster();
    else sync_grid();
  }

  // What lies in shared memory: the potentials of a thread's columns, (threads), (rows, share).
  __device__ float4* potentials() const {
    return reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + kScratchBytes);
  }
  __device__ Column* parts() const {
    return reinterpret_cast<Column*>(potentials() + blockDim.x * (kOwned * kPotentialBytes / sizeof(float4)));
  }
  __device__ Score* scores() const { return reinterpret_cast<Score*>(parts() + blockDim.x); }
  __device__ int share() const { return static_cast<int>(blockDim.x) * kOwned; }

  // Columns that threads update side by side: few enough that all blocks take part and share out the partials over
  // many threads, whose reads one after another are what an update takes.
  __device__ unsigned width() const {
    unsigned found = 4;
    while (found < kWarp && found * gridDim.x < p_.n) found *= 2;
    return found;
  }

  // This block has rows begin() .. begin() + mine() - 1.
  __device__ int begin() const { return static_cast<int>(blockIdx.x * p_.rows); }
  __device__ int mine() const {
    const int left = static_cast<int>(p_.m) - begin(), rows = static_cast<int>(p_.rows);
    return rows < left ? rows : left;
  }

  // (blocks, n)
  __device__ float* shifts() const { return p_.partial; }
  __device__ float* sums() const { return p_.partial + gridDim.x * p_.n; }

  // Per column of this block's rows: the largest exponent, and the sum at it.
  __device__ void first_column_sums() {
    const float scale = number(p_.scale);
    float most[kOwned], total[kOwned];
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      most[k] = kNoShift;
      total[k] = 0.0f;
    }
    for_scores([&](int own, float s, float exponent, float) {
      most[own] = fmaxf(most[own], ceilf(fmaf(s, scale, exponent)));
    });
    for_scores([&](int own, float s, float exponent, float mantissa) {
      total[own] = fmaf(exp2_fast(fmaf(s, scale, exponent - most[own])), mantissa, total[own]);
    });
    store_own(shifts() + blockIdx.x * p_.n, most, 0, p_.n, false);
    store_own(sums() + blockIdx.x * p_.n, total, 0, p_.n, false);
  }

  template <class Each>
  __device__ void for_scores(Each each) const {
    for (int i = 0; i < mine(); ++i) {
      const float exponent = p_.row.exponent[begin() + i], mantissa = p_.row.mantissa[begin() + i];
#pragma unroll
      for (int q = 0; q < kOctets; ++q) {
        float s[kOctet];
        load_scores(s, scores() + i * share() + octet_place(q));
#pragma unroll
        for (int k = 0; k < kOctet; ++k) each(q * kOctet + k, s[k], exponent, mantissa);
      }
    }
  }

  // One row step, and the column sums of this block's rows without the factor col.mantissa_j.
  __device__ void pass() {
    constexpr int kRows = kMostRows<Score>;
    const float scale = number(p_.scale);
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    Group<Score, kRows, false> rows(potentials(), team_);
    rows.load(p_.col, 0, p_.n);
    for (int i = 0; i < mine(); i += kRows) {
      const float exponent = lane < kRows && i + lane < mine() ? p_.row.exponent[begin() + i + lane] : 0.0f;
      rows.pass(scores() + i * share(), begin() + i, mine() - i, scale, exponent, p_.row);
    }
    store_own(sums() + blockIdx.x * p_.n, rows.sums(), 0, p_.n, false);
  }

  // Groups of columns are shared out over the blocks; each(column, columns) by all threads of a block.
  template <class Each>
  __device__ void for_column_groups(Each each) const {
    const unsigned columns = width();
    for (int64_t first = blockIdx.x * columns; first < p_.n; first += gridDim.x * columns)
      each(first + threadIdx.x % columns, columns);
  }

  __device__ void set_first(int64_t j, unsigned columns) {
    const Column all = merge_partials(shifts(), sums(), gridDim.x, p_.n, j, columns, parts());
    if (threadIdx.x >= columns || j >= p_.n) return;
    const Power found = column_potential(all.most, all.total);
    p_.col.exponent[j] = found.exponent;
    p_.col.mantissa[j] = found.mantissa;
  }

  __device__ void update(int64_t j, unsigned columns) {
    float c = add_partials(sums(), gridDim.x, p_.n, j, columns, reinterpret_cast<float*>(parts()));
    if (threadIdx.x >= columns || j >= p_.n) return;
    c *= p_.col.mantissa[j];
    p_.c[j] = c;
    divide_column(p_.col, j, c);
  }

  const SinkhornOnChip& p_;
  RowTeam<false> team_;  // a row is in one block
};

struct OnChip {
  SinkhornOnChip p;
  bool aligned;
};

template <class Score, bool kCluster>
__global__ void __launch_bounds__(kOnChipThreads, 1) sinkhorn_on_chip_kernel(const OnChip a) {
  SmallProblem<Score, kCluster>(a.p, a.aligned).run();
}

template <class Score>
void launch_on_chip(const char* name, const SinkhornOnChip& p, const Where& where) {
  const auto* data = static_cast<const Score*>(p.scores.data);
  const int64_t shared =
      kScratchBytes +
      p.team.threads * static_cast<int64_t>(sizeof(Column) + kOwned * (kPotentialBytes + p.rows * sizeof(Score)));
  const bool cluster = p.team.cluster > 1;
  const unsigned blocks = cluster ? static_cast<unsigned>(p.team.cluster) : blocks_for(p.m, p.rows);
  const Shape shape = {dim3(blocks), p.team.threads, shared, p.team.cluster, !cluster};
  const OnChip a = {p, is_aligned(data, 0, p.scores.row_stride)};
  if (cluster) launch(name, sinkhorn_on_chip_kernel<Score, true>, shape, where, a);
  else launch(name, sinkhorn_on_chip_kernel<Score, false>, shape, where, a);
}

}  // namespace

void sinkhorn_on_chip(const SinkhornOnChip& p, const Where& where) {
  if (p.scores.type == ScoreType::kInt16) launch_on_chip<int16_t>("sinkhorn_on_chip_kernel<int16>", p, where);
  else launch_on_chip<float>("sinkhorn_on_chip_kernel<float32>", p, where);
}

}  // namespace bam::cuda
