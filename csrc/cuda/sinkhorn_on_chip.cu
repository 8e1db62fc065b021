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
    parts_ = reinterpret_cast<Column*>(static_cast<char*>(shared_memory()) + kScratchBytes);
    rows_ = reinterpret_cast<Score*>(parts_ + blockDim.x);
    share_ = static_cast<int64_t>(blockDim.x) * kOwned;
    begin_ = blockIdx.x * p.rows;
    end_ = begin_ + p.rows < p.m ? begin_ + p.rows : p.m;
    shift_ = p.partial;
    sum_ = p.partial + gridDim.x * p.n;
    while (width_ < kWarp && width_ * gridDim.x < p.n) width_ *= 2;
    const Arriving arriving(static_cast<float*>(shared_memory()), 1, 0, p.n);
    follow_earlier_kernels();
    scale_ = number(p.scale);
    const Score* s = static_cast<const Score*>(p.scores.data);
    for (int64_t i = begin_; i < end_; ++i)
      arriving.fetch(rows_ + (i - begin_) * share_, s + i * p.scores.row_stride, aligned, 0);
    arriving.send_off(0);
    arriving.wait<0>(0, 0);
  }

  __device__ void run() {
    first_column_sums();
    sync_all();
    for_column_groups([&](int64_t j) { set_first(j); });
    for (int iteration = 1; iteration < p_.iterations; ++iteration) {
      sync_all();
      pass();
      sync_all();
      for_column_groups([&](int64_t j) { update(j); });
    }
  }

 private:
  __device__ void sync_all() {
    if (kCluster) sync_cluster();
    else sync_grid();
  }

  // Per column of this block's rows: the largest exponent, and the sum at it.
  __device__ void first_column_sums() {
    float most[kOwned], total[kOwned];
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      most[k] = kNoShift;
      total[k] = 0.0f;
    }
    for_scores([&](int own, float s, float exponent, float) {
      most[own] = fmaxf(most[own], ceilf(fmaf(s, scale_, exponent)));
    });
    for_scores([&](int own, float s, float exponent, float mantissa) {
      total[own] = fmaf(exp2_fast(fmaf(s, scale_, exponent - most[own])), mantissa, total[own]);
    });
    store_own(shift_ + blockIdx.x * p_.n, most, 0, p_.n, false);
    store_own(sum_ + blockIdx.x * p_.n, total, 0, p_.n, false);
  }

  template <class Each>
  __device__ void for_scores(Each each) const {
    for (int64_t i = begin_; i < end_; ++i) {
      const float exponent = p_.row.exponent[i], mantissa = p_.row.mantissa[i];
#pragma unroll
      for (int q = 0; q < kOctets; ++q) {
        float s[kOctet];
        load_scores(s, rows_ + (i - begin_) * share_ + octet_place(q));
#pragma unroll
        for (int k = 0; k < kOctet; ++k) each(q * kOctet + k, s[k], exponent, mantissa);
      }
    }
  }

  // One row step, and the column sums of this block's rows without the factor col.mantissa_j.
  __device__ void pass() {
    OwnColumns col;
    col.load(p_.col, 0, p_.n);
    float c[kOwned] = {};
    for (int64_t i = begin_; i < end_; i += kPassRows) {
      float exponent[kPassRows];
#pragma unroll
      for (int r = 0; r < kPassRows; ++r) exponent[r] = i + r < end_ ? p_.row.exponent[i + r] : 0.0f;
      const int count = end_ - i < kPassRows ? static_cast<int>(end_ - i) : kPassRows;
      pass_rows(rows_ + (i - begin_) * share_, share_, i, count, col, scale_, exponent, p_.row, c, team_);
    }
    store_own(sum_ + blockIdx.x * p_.n, c, 0, p_.n, false);
  }

  // Groups of `width_` columns are shared out over the blocks; each(column) by all threads of a block.
  template <class Each>
  __device__ void for_column_groups(Each each) const {
    for (int64_t first = blockIdx.x * width_; first < p_.n; first += gridDim.x * width_)
      each(first + threadIdx.x % width_);
  }

  __device__ void set_first(int64_t j) {
    const Column all = merge_partials(shift_, sum_, gridDim.x, p_.n, j, width_, parts_);
    if (threadIdx.x >= width_ || j >= p_.n) return;
    const Power found = column_potential(all.most, all.total);
    p_.col.exponent[j] = found.exponent;
    p_.col.mantissa[j] = found.mantissa;
  }

  __device__ void update(int64_t j) {
    float c = add_partials(sum_, gridDim.x, p_.n, j, width_, reinterpret_cast<float*>(parts_));
    if (threadIdx.x >= width_ || j >= p_.n) return;
    c *= p_.col.mantissa[j];
    p_.c[j] = c;
    divide_column(p_.col, j, c);
  }

  const SinkhornOnChip& p_;
  RowTeam<false> team_;  // a row is in one block
  float scale_;
  Column* parts_;  // (threads)
  Score* rows_;    // (rows, share)
  int64_t share_, begin_, end_;
  float *shift_, *sum_;  // (blocks, n)
  // Columns that threads update side by side: few enough that all blocks take part and share out the partials over
  // many threads, whose reads one after another are what an update takes.
  unsigned width_ = 4;
};

struct OnChip {
  SinkhornOnChip p;
  bool aligned;
};

template <class Score, bool kCluster>
__global__ void __launch_bounds__(kMostThreads) sinkhorn_on_chip_kernel(const OnChip a) {
  SmallProblem<Score, kCluster>(a.p, a.aligned).run();
}

template <class Score>
void launch_on_chip(const char* name, const SinkhornOnChip& p, const Where& where) {
  const auto* data = static_cast<const Score*>(p.scores.data);
  const int64_t shared =
      kScratchBytes + p.team.threads * static_cast<int64_t>(sizeof(Column) + p.rows * kOwned * sizeof(Score));
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
