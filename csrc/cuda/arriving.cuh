// Rows of scores on their way to shared memory, some ahead of their use.
//
// On sm_90 and newer one thread asks for what a block has of a row in one bulk copy, and all threads of the block wait
// for its arrival. Before, each thread copies the octets that it owns, 16 bytes at a time. In either case an octet that
// is cut by the end of the row, or lies past it, and those of rows that are not aligned are stored by their owner, who
// alone reads them: without a barrier of the block.
#pragma once

#include "tile.cuh"

namespace bam::cuda {

// The place of piece `piece` of this thread's `pieces`, of 16 bytes or of a multiple: a warp's are side by side, its
// threads' next to each other, so that a thread's places are a fixed distance apart.
__device__ __forceinline__ int piece_place(int piece, int pieces) {
  const int thread = static_cast<int>(threadIdx.x);
  return (thread / kWarp * pieces + piece) * kWarp + thread % kWarp;
}

// The place of octet q of this thread among a block's columns.
__device__ __forceinline__ int octet_place(int q) {
  return piece_place(q, kOctets) * kOctet;
}

// A block's columns of rows that have `left` of them from its first one on, in `stages` groups of rows. A stage may be
// fetched again when all threads of the block have read it, which a barrier since must say.
class Arriving {
 public:
  __device__ __forceinline__ Arriving(float* scratch, int stages, int64_t left)
      : arrivals_(reinterpret_cast<Arrival*>(reinterpret_cast<char*>(scratch) + kPartsBytes) + 2) {
    const int64_t share = static_cast<int64_t>(blockDim.x) * kOwned;
    here_ = static_cast<int>(left < share ? left : share);
    is_whole_ = here_ - octet_place(kOctets - 1) >= kOctet;
    if (!has_arrivals()) return;
    if (static_cast<int>(threadIdx.x) < stages) begin_arrival(arrivals_ + threadIdx.x);
    sync_block();
  }

  // Whether this thread has a part in a fetch; others need not call it.
  __device__ __forceinline__ bool takes_part(bool aligned) const {
    return !has_arrivals() || !aligned || !is_whole_ || is_elected();
  }

  // This block's columns, which begin at `row`, to their place on chip, masked past the end of the row.
  template <class Score>
  __device__ __forceinline__ void fetch(Score* to, const Score* row, bool aligned, int stage) const {
    fetch(to, row, 0, 1, aligned, stage);
  }
  // Fetches this block's columns of `rows` rows, which lie `stride` scores apart, to one place after another.
  template <class Score>
  __device__ __forceinline__ void fetch(Score* to, const Score* row, int64_t stride, int rows, bool aligned,
                                        int stage) const {
    const int share = static_cast<int>(blockDim.x) * kOwned;
    if (has_arrivals() && aligned) {
      if (is_elected() && here_ >= kOctet) {
        const unsigned bytes = static_cast<unsigned>(here_ / kOctet * kOctet * sizeof(Score));
#pragma unroll 1
        for (int r = 0; r < rows; ++r) {
          expect_bytes(arrivals_ + stage, bytes);
          copy_bulk(to + r * share, row + r * stride, bytes, arrivals_ + stage);
        }
      }
      if (is_whole_) return;
    }
#pragma unroll 1
    for (int r = 0; r < rows; ++r) fetch_own(to + r * share, row + r * stride, aligned);
  }

  // What was fetched since the last stage was sent off is this one's.
  __device__ __forceinline__ void send_off(int stage) const {
    if (!has_arrivals()) commit_copies();
    else if (is_elected()) arrive(arrivals_ + stage);
  }

  // Until the stage has come, for the first, second, third time as `odd` is 0, 1, 0; kLater stages were sent off since.
  template <int kLater>
  __device__ __forceinline__ void wait(int stage, unsigned odd) const {
    if (has_arrivals()) wait_for_arrival<false>(arrivals_ + stage, odd);
    else wait_for_copies<kLater>();
  }

 private:
  // One of the last warp: the first has more to do than others when sums of a row have met.
  static __device__ __forceinline__ bool is_elected() { return threadIdx.x == blockDim.x - kWarp; }

  // Fetches those of this thread's octets that no bulk copy brings.
  template <class Score>
  __device__ __forceinline__ void fetch_own(Score* to, const Score* row, bool aligned) const {
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      const int place = octet_place(q);
      if (aligned && here_ - place >= kOctet) {
        if (!has_arrivals()) copy_octet_later(to + place, row + place);
      } else {
        store_cut_octet(to + place, row + place, here_ - place);
      }
    }
    // A row that is aligned may be copied to this place later.
    if (has_arrivals() && !aligned) order_before_bulk_copies();
  }

  template <class Score>
  static __device__ __forceinline__ void copy_octet_later(Score* to, const Score* from) {
#pragma unroll
    for (int c = 0; c < Chunk<Score>::kPerOctet; ++c)
      copy_later(to + c * Chunk<Score>::kCount, from + c * Chunk<Score>::kCount);
  }
  template <class Score>
  static __device__ __forceinline__ void store_cut_octet(Score* to, const Score* from, int left) {
#pragma unroll 1
    for (int k = 0; k < kOctet; ++k) to[k] = k < left ? from[k] : masked_score<Score>();
  }

  Arrival* arrivals_;  // one a stage
  int here_;           // how many columns of a row this block has; not positive past its end
  bool is_whole_;      // whether all of this thread's octets are
};

// Where the k-th of what comes is, of `stages` that take turns, and how often modulo 2 the stage was used before.
__device__ __forceinline__ int stage_of(unsigned k, unsigned stages) {
  return static_cast<int>(k % stages);
}
__device__ __forceinline__ unsigned odd_use(unsigned k, unsigned stages) {
  return k / stages & 1;
}

}  // namespace bam::cuda
