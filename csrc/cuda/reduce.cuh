// Sums and maxima over the threads of a block, or of a cluster, and partials of blocks that are added up in order.
#pragma once

#include "cuda.h"
#include "intrinsics.cuh"
#include "row.cuh"

namespace bam::cuda {

struct Sum {
  static constexpr float kIdentity = 0.0f;
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  static constexpr float kIdentity = -INFINITY;
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The threads that hold a row: those of a block, or of all blocks of a cluster. One barrier of the block a reduction,
// then what each block sends to all: what was written for one is read before the next but one overwrites it, and a
// block ends only when all has come that others send it. In every thread the same value, in a fixed order.
template <bool kCluster>
class RowTeam {
 public:
  __device__ explicit RowTeam(float* scratch)
      : scratch_(scratch), arrivals_(reinterpret_cast<Arrival*>(reinterpret_cast<char*>(scratch) + kPartsBytes)) {
    if (!kCluster) return;
    if (threadIdx.x < 2) begin_arrival(arrivals_ + threadIdx.x);
    sync_cluster();  // a block's shared memory is there once the block has begun
  }

  // 1, 2 or 4 values at once.
  template <int kValues, class Combine>
  __device__ __forceinline__ void reduce(float (&x)[kValues], Combine combine) {
    to_all(x, reduce_to_lanes(x, combine));
  }
  // Reduces as `reduce` does, but lane l of a warp gets value l % kValues only, for work that lanes share. x is
  // overwritten.
  template <int kValues, class Combine>
  __device__ __forceinline__ float reduce_to_lanes(float (&x)[kValues], Combine combine) {
    static_assert(kValues <= 4 && kWarp % kValues == 0, "the scratch of a warp is 4 floats");
    const float mine = over_lanes<1>(x, combine);
    const unsigned lane = threadIdx.x % kWarp, buffer = turn_ % 2;
    float* of_warps = scratch_ + buffer * (kMostThreads / kWarp) * 4;
    if (lane < kValues) of_warps[threadIdx.x / kWarp * kValues + lane] = mine;
    sync_block();
    float all = gather<kValues, kValues>(of_warps, blockDim.x / kWarp, combine);
    if (kCluster) {
      float* of_blocks = scratch_ + (2 * kMostThreads / kWarp + buffer * kMostCluster) * 4;
      to_all(x, all);
      exchange_blocks(x, of_blocks, arrivals_ + buffer);
      all = gather<4, kValues>(of_blocks, cluster_size(), combine);
    }
    turn_ = (turn_ + 1) % 4;
    return all;
  }

 private:
  // Over the lanes of a warp; lane l gets value l % kValues. While a lane has several values it hands every other one
  // to the lane that keeps those. The two that a step combines are the same two in both of its lanes.
  template <int kOffset, int kValues, class Combine>
  static __device__ __forceinline__ float over_lanes(const float (&x)[kValues], Combine combine) {
    if constexpr (kOffset == kWarp) {
      return x[0];
    } else if constexpr (kValues == 1) {
      const float both[1] = {combine(x[0], exchange(x[0], kOffset))};
      return over_lanes<2 * kOffset>(both, combine);
    } else {
      const bool odd = threadIdx.x / kOffset % 2 != 0;
      float kept[kValues / 2];
#pragma unroll
      for (int v = 0; v < kValues / 2; ++v)
        kept[v] = combine(odd ? x[2 * v + 1] : x[2 * v], exchange(odd ? x[2 * v] : x[2 * v + 1], kOffset));
      return over_lanes<2 * kOffset>(kept, combine);
    }
  }
  // To `of_blocks` of every block, which has all of them when its arrival says so.
  template <int kValues>
  __device__ __forceinline__ void exchange_blocks(const float (&x)[kValues], float* of_blocks, Arrival* arrival) const {
    if (threadIdx.x == 0) {
      expect_bytes(arrival, cluster_size() * 16);
      arrive(arrival);
    }
    if (threadIdx.x < cluster_size()) {
      float four[4] = {};
#pragma unroll
      for (int v = 0; v < kValues; ++v) four[v] = x[v];
      send_16_bytes(four, of_blocks + cluster_rank() * 4, arrival, threadIdx.x);
    }
    wait_for_arrival<true>(arrival, turn_ / 2);
  }
  // Gives every lane all values, of which lane l has value l % kValues.
  template <int kValues>
  static __device__ __forceinline__ void to_all(float (&x)[kValues], float of_lane) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) x[v] = kValues == 1 ? of_lane : from_lane(of_lane, v);
  }
  // Parts of kStride floats, `count` of them: lane l combines those of value l % kValues that are its own, then the
  // lanes of a value their results.
  template <int kStride, int kValues, class Combine>
  static __device__ __forceinline__ float gather(const float* parts, unsigned count, Combine combine) {
    const unsigned lane = threadIdx.x % kWarp;
    float mine[1] = {Combine::kIdentity};
#pragma unroll
    for (unsigned first = 0; first < kMostParts; first += kWarp / kValues) {
      const unsigned part = first + lane / kValues;
      if (part < count) mine[0] = combine(mine[0], parts[part * kStride + lane % kValues]);
    }
    return over_lanes<kValues>(mine, combine);
  }
  static constexpr unsigned kMostParts = kMostThreads / kWarp > kMostCluster ? kMostThreads / kWarp : kMostCluster;

  float* scratch_;
  Arrival* arrivals_;  // (2)
  unsigned turn_ = 0;  // buffers take turns, and so do the phases of their arrivals
};

// col_j <- before / c; with `before` not given, col_j / c.
__device__ __forceinline__ void divide_column(const Potential& col, int64_t j, float c, const Power& before) {
  const Power found = divided(before, c);
  col.exponent[j] = found.exponent;
  col.mantissa[j] = found.mantissa;
}
__device__ __forceinline__ void divide_column(const Potential& col, int64_t j, float c) {
  divide_column(col, j, c, {col.exponent[j], col.mantissa[j]});
}

// A column's sum as total * 2^most; most is an integer at or above the largest term's logarithm.
struct Column {
  float most = kNoShift, total = 0.0f;
};

// `before` and several parts of the same column, added up in order.
template <int kCount>
__device__ __forceinline__ Column together(const Column& before, const float (&most)[kCount],
                                           const float (&total)[kCount]) {
  Column all = {before.most, 0.0f};
#pragma unroll
  for (int q = 0; q < kCount; ++q) all.most = fmaxf(all.most, most[q]);
  all.total = before.total * exp2_fast(before.most - all.most);
#pragma unroll
  for (int q = 0; q < kCount; ++q) all.total += total[q] * exp2_fast(most[q] - all.most);
  return all;
}

// Parts that a thread reads before it waits for the first: sums, of which 16 threads take the 132 or 264 of a Hopper's
// pass in one turn or two, and columns of two numbers.
constexpr int kSumsAtOnce = 9, kColumnsAtOnce = 8;

// Where the partials of chunk c, or of the last, begin. A row has fewer than 2^31 columns: one multiplication.
__device__ __forceinline__ int64_t chunk_at(unsigned c, unsigned count, int64_t n) {
  return static_cast<int64_t>(static_cast<uint64_t>(c < count ? c : count - 1) * static_cast<uint32_t>(n));
}

// Partials (chunks, n) of the column j of each of `width` neighbours, which divides the block's threads: chunks are
// shared out over threads with the same column and put together in order, and the first `width` threads get the result.
// `parts` holds one of a kind for each thread. j >= n: nothing is read. Past its last chunk a thread reads that again:
// reads that are always done are all on their way at once.
__device__ __forceinline__ float add_partials(const float* partial, int64_t chunks, int64_t n, int64_t j,
                                              unsigned width, float* parts) {
  const unsigned slices = blockDim.x / width, slice = threadIdx.x / width, count = static_cast<unsigned>(chunks);
  float mine = 0.0f;
  for (unsigned first = slice; first < count && j < n; first += kSumsAtOnce * slices) {
    const unsigned left = count - first;
    float x[kSumsAtOnce];
#pragma unroll
    for (unsigned u = 0; u < kSumsAtOnce; ++u) x[u] = partial[chunk_at(first + u * slices, count, n) + j];
#pragma unroll
    for (unsigned u = 0; u < kSumsAtOnce; ++u) mine += u * slices < left ? x[u] : 0.0f;
  }
  parts[threadIdx.x] = mine;
  sync_block();
  float total = 0.0f;
  if (slice == 0)
#pragma unroll 8
    for (unsigned q = 0; q < slices; ++q) total += parts[q * width + threadIdx.x];
  sync_block();
  return total;
}

__device__ __forceinline__ Column merge_partials(const float* shift, const float* sum, int64_t chunks, int64_t n,
                                                 int64_t j, unsigned width, Column* parts) {
  const unsigned slices = blockDim.x / width, slice = threadIdx.x / width, count = static_cast<unsigned>(chunks);
  float most[kColumnsAtOnce], total[kColumnsAtOnce];
  Column mine;
  for (unsigned first = slice; first < count && j < n; first += kColumnsAtOnce * slices) {
    const unsigned left = count - first;
#pragma unroll
    for (unsigned u = 0; u < kColumnsAtOnce; ++u) {
      const int64_t at = chunk_at(first + u * slices, count, n) + j;
      most[u] = shift[at];
      total[u] = sum[at];
    }
#pragma unroll
    for (unsigned u = 1; u < kColumnsAtOnce; ++u) most[u] = u * slices < left ? most[u] : kNoShift;
    mine = together(mine, most, total);
  }
  parts[threadIdx.x] = mine;
  sync_block();
  Column all;
  if (slice == 0)
    for (unsigned first = 0; first < slices; first += kColumnsAtOnce) {
#pragma unroll
      for (unsigned u = 0; u < kColumnsAtOnce; ++u) {
        const Column other = first + u < slices ? parts[(first + u) * width + threadIdx.x] : Column();
        most[u] = other.most;
        total[u] = other.total;
      }
      all = together(all, most, total);
    }
  sync_block();
  return all;
}

// out_j = factor_j * sum over chunks of partial[chunk, j], added to what is there if `accumulate`; then col <- col /
// out. partial (chunks, n); factor null: 1; col null: left alone.
struct AddChunks {
  const float* partial;
  int64_t chunks, n;
  const float* factor;
  float* out;
  bool accumulate;
  Potential col = {nullptr, nullptr};
};
void add_chunks(const AddChunks&, const Where&);

}  // namespace bam::cuda
