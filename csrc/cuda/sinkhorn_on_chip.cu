// All Sinkhorn iterations of a small problem in one launch of one cluster, whose blocks keep the scores in shared
// memory. A warp has whole rows, so that nothing waits within a pass. After it a block adds up its warps' column sums
// and sends every block the sums of the columns that it owns; an owner adds up what blocks sent, updates its columns
// and sends them to all. An arrival says when all of either has come: an iteration has no barrier of the cluster.
#include "launch.cuh"
#include "warp_rows.cuh"

namespace bam::cuda {
namespace {

constexpr int kThreads = kOnChipThreads, kWarps = kThreads / kWarp;

// What lies in a block's shared memory.
template <int kLaneOctets>
struct Places {
  static constexpr int kWidth = Row<kLaneOctets>::kWidth;

  float parts[kWarps][kWidth];
  float exponents[kWidth], mantissas[kWidth];  // of the columns
  float inbox[2 * kWidth];                     // (2, blocks, columns of one): sums, then largest exponents
  float updated[kWidth];                       // (2, columns of one): exponents, then mantissas
  Arrival sums_here, potentials_here;
  // Then the scores (rows, kWidth), and exponents and mantissas of the rows.

  static int64_t bytes(int64_t rows) {
    return static_cast<int64_t>(sizeof(Places)) + rows * static_cast<int64_t>((kWidth + 2) * sizeof(float));
  }
};

template <class Score, int kLaneOctets>
class SmallProblem {
 public:
  __device__ SmallProblem(const SinkhornOnChip& p, bool aligned)
      : p_(p),
        on_chip_(*static_cast<Places*>(shared_memory())),
        rows_(p, reinterpret_cast<float*>(&on_chip_ + 1), begin(p), mine(p)) {
    if (threadIdx.x == 0) begin_arrival(&on_chip_.sums_here);
    if (threadIdx.x == 1) begin_arrival(&on_chip_.potentials_here);
    while (1 << log_blocks_ < static_cast<int>(cluster_size())) ++log_blocks_;
    sync_cluster();  // a block's shared memory is there once the block has begun
    follow_earlier_kernels();
    rows_.fetch(aligned);
  }

  __device__ void run() {
    first_column_sums();
    send_sums(true);
    for_own_columns([&](int t, int64_t j) { set_first(t, j); });
    for (int iteration = 1; iteration < p_.iterations; ++iteration) {
      send_updated();
      pass(iteration + 1 == p_.iterations);
      send_sums(false);
      for_own_columns([&](int t, int64_t j) { update(t, j); });
    }
  }

 private:
  using Row = cuda::Row<kLaneOctets>;
  using Places = cuda::Places<kLaneOctets>;
  static constexpr int kLogQuads = kLaneOctets == 2 ? 7 : 8;
  static_assert(1 << kLogQuads == Row::kQuads, "a quad's owner is found by its upper bits");
  static_assert(Row::kQuads <= kThreads, "a thread adds up one quad at most");
  static constexpr int kColumns = Row::kColumns, kWidth = Row::kWidth;

  static __device__ int warp() { return static_cast<int>(threadIdx.x / kWarp); }
  // How many columns a block owns: whole quads, as clusters are of 2, 4, 8 or 16 blocks.
  __device__ int share() const { return kWidth >> log_blocks_; }
  __device__ int first_own() const { return static_cast<int>(cluster_rank()) * share(); }

  static __device__ int begin(const SinkhornOnChip& p) { return static_cast<int>(cluster_rank() * p.rows); }
  static __device__ int mine(const SinkhornOnChip& p) {
    const int left = static_cast<int>(p.m) - begin(p), rows = static_cast<int>(p.rows);
    return rows < left ? rows : left;
  }

  // Per column of this block's rows: the largest exponent, and the sum at it.
  __device__ void first_column_sums() {
    const float scale = rows_.scale();
    float x[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[k] = kNoShift;
    rows_.for_scores([&](int k, float s, float exponent, float) { x[k] = fmaxf(x[k], fmaf(s, scale, exponent)); });
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[k] = ceilf(x[k]);
    store_quads<kLaneOctets>(on_chip_.parts[warp()], x);
    sync_block();
    // Where the exponents of columns come later: only from owners to which this block has sent all of theirs.
    if (has_quad()) *quad(on_chip_.exponents) = combined(Max());
    sync_block();
    load_quads<kLaneOctets>(x, on_chip_.exponents);
    float total[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) total[k] = 0.0f;
    rows_.for_scores([&](int k, float s, float exponent, float mantissa) {
      total[k] = fmaf(exp2_fast(fmaf(s, scale, exponent - x[k])), mantissa, total[k]);
    });
    store_quads<kLaneOctets>(on_chip_.parts[warp()], total);
  }

  // One row step, and the column sums of this warp's rows without the factor col.mantissa_j.
  __device__ void pass(bool last) {
    float c[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) c[k] = 0.0f;
    rows_.pass(c, on_chip_.exponents, on_chip_.mantissas, last);
    store_quads<kLaneOctets>(on_chip_.parts[warp()], c);
  }

  // The quad that a thread combines for the block.
  static __device__ bool has_quad() { return threadIdx.x < static_cast<unsigned>(Row::kQuads); }
  static __device__ float4* quad(float* quads) { return reinterpret_cast<float4*>(quads) + threadIdx.x; }
  template <class Combine>
  __device__ float4 combined(Combine combine) {
    float4 all = *quad(on_chip_.parts[0]);
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const float4 part = *quad(on_chip_.parts[w]);
      all = {combine(all.x, part.x), combine(all.y, part.y), combine(all.z, part.z), combine(all.w, part.w)};
    }
    return all;
  }

  static __device__ void send(const float4& four, float* to, Arrival* arrival, int block) {
    const float x[4] = {four.x, four.y, four.z, four.w};
    send_16_bytes(x, to, arrival, static_cast<unsigned>(block));
  }
  static __device__ void expect(Arrival* arrival, int floats) {
    if (threadIdx.x != 0) return;
    expect_bytes(arrival, static_cast<unsigned>(floats * sizeof(float)));
    arrive(arrival);
  }

  // This block's column sums, and in the first step their largest exponents, to the columns' owners. An inbox is free:
  // its owner sent what it made of it.
  __device__ void send_sums(bool with_exponents) {
    sync_block();
    expect(&on_chip_.sums_here, (with_exponents ? 2 : 1) * kWidth);
    if (has_quad()) {
      const int column = static_cast<int>(threadIdx.x) * 4, in_share = column & (share() - 1);
      const int owner = static_cast<int>(threadIdx.x) >> (kLogQuads - log_blocks_);
      float* to = on_chip_.inbox + first_own() + in_share;
      send(combined(Sum()), to, &on_chip_.sums_here, owner);
      if (with_exponents) send(*quad(on_chip_.exponents), to + kWidth, &on_chip_.sums_here, owner);
    }
    wait_for_arrival<true>(&on_chip_.sums_here, odd_);
  }

  // The columns that this block has updated to all. Their places are free: every block has sent its sums, after a
  // barrier of its own.
  __device__ void send_updated() {
    sync_block();
    expect(&on_chip_.potentials_here, 2 * kWidth);
    for (int k = static_cast<int>(threadIdx.x); k < 2 * Row::kQuads; k += kThreads) {
      const int block = k & ((1 << log_blocks_) - 1), place = (k >> log_blocks_) * 4;
      float* to = place < share() ? on_chip_.exponents + place : on_chip_.mantissas + place - share();
      const float4& four = *reinterpret_cast<const float4*>(on_chip_.updated + place);
      send(four, to + first_own(), &on_chip_.potentials_here, block);
    }
    wait_for_arrival<true>(&on_chip_.potentials_here, odd_);
    odd_ ^= 1;
  }

  // each(t, j) for the t-th column that this block owns, column j of the scores.
  template <class Each>
  __device__ __forceinline__ void for_own_columns(Each each) {
#pragma unroll 1
    for (int t = static_cast<int>(threadIdx.x); t < share(); t += kThreads)
      each(t, Row::column_of((first_own() + t) / 4) + t % 4);
  }
  // What the blocks sent for column t, in their order; `missing` past the last block.
  __device__ __forceinline__ void load_sent(float (&x)[kMostCluster], const float* inbox, int t, float missing) const {
#pragma unroll
    for (int b = 0; b < kMostCluster; ++b) x[b] = b < 1 << log_blocks_ ? inbox[b * share() + t] : missing;
  }

  __device__ void set_first(int t, int64_t j) {
    float exponents[kMostCluster], sums[kMostCluster];
    load_sent(exponents, on_chip_.inbox + kWidth, t, kNoShift);
    load_sent(sums, on_chip_.inbox, t, 0.0f);
    Column all;
#pragma unroll
    for (int b = 0; b < kMostCluster; ++b) all.most = fmaxf(all.most, exponents[b]);
#pragma unroll
    for (int b = 0; b < kMostCluster; ++b) all.total += sums[b] * exp2_fast(exponents[b] - all.most);
    store_updated(column_potential(all.most, all.total), t, j);
  }

  __device__ void update(int t, int64_t j) {
    float sums[kMostCluster], c = 0.0f;
    load_sent(sums, on_chip_.inbox, t, 0.0f);
#pragma unroll
    for (int b = 0; b < kMostCluster; ++b) c += sums[b];
    const int place = first_own() + t;
    const Power before = {on_chip_.exponents[place], on_chip_.mantissas[place]};
    c *= before.mantissa;
    if (j < p_.n) p_.c[j] = c;
    store_updated(divided(before, c), t, j);
  }

  __device__ void store_updated(const Power& found, int t, int64_t j) {
    on_chip_.updated[t] = found.exponent;
    on_chip_.updated[share() + t] = found.mantissa;
    if (j >= p_.n) return;
    p_.col.exponent[j] = found.exponent;
    p_.col.mantissa[j] = found.mantissa;
  }

  const SinkhornOnChip& p_;
  Places& on_chip_;
  WarpRows<Score, kLaneOctets> rows_;
  int log_blocks_ = 0;
  unsigned odd_ = 0;  // the phase of the next sums, and of the potentials after them
};

struct OnChip {
  SinkhornOnChip p;
  bool aligned;
};

template <class Score, int kLaneOctets>
__global__ void __launch_bounds__(kThreads, 1) sinkhorn_on_chip_kernel(const OnChip a) {
  SmallProblem<Score, kLaneOctets>(a.p, a.aligned).run();
}

template <class Score, int kLaneOctets>
void launch_on_chip(const char* name, const SinkhornOnChip& p, const Where& where) {
  const OnChip a = {p, is_aligned(static_cast<const Score*>(p.scores.data), 0, p.scores.row_stride)};
  const Shape shape = {dim3(static_cast<unsigned>(p.cluster)), kThreads, Places<kLaneOctets>::bytes(p.rows), p.cluster};
  launch(name, sinkhorn_on_chip_kernel<Score, kLaneOctets>, shape, where, a);
}

template <class Score>
void launch_on_chip(const char* name, const SinkhornOnChip& p, const Where& where) {
  if (p.n <= Row<2>::kWidth) launch_on_chip<Score, 2>(name, p, where);
  else launch_on_chip<Score, 4>(name, p, where);
}

}  // namespace

void sinkhorn_on_chip(const SinkhornOnChip& p, const Where& where) {
  if (p.scores.type == ScoreType::kInt16) launch_on_chip<int16_t>("sinkhorn_on_chip_kernel<int16>", p, where);
  else launch_on_chip<float>("sinkhorn_on_chip_kernel<float32>", p, where);
}

}  // namespace bam::cuda
