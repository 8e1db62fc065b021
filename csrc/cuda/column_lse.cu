// The first column step, what makes scores of a product in the same read, and that alone.
//
// The warps of a block have the same columns, an octet a lane, and different rows of its chunk. What they found is put
// together in shared memory, so that a chunk has one partial a column; chunks are merged in order by a second kernel:
// results do not differ from run to run. The rows of a product have unit length before it, as 16 bits need; the sums of
// the source's softmax are left to the match, which has whole rows on chip and reads no score twice for them.
#include "launch.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace bam::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kColumns = kWarp * kOctet;  // of a block
constexpr int kRows = 4;                  // of a warp, on their way at once
static_assert(kRows * kOctet <= 32, "positives are the bits of a word");
constexpr int64_t kBiasBytes = kWarps * kColumns * sizeof(float), kSumsBytes = 2 * kBiasBytes;
constexpr int kSumBlocks = 3, kQuantizeBlocks = 4;  // for whose registers a multiprocessor has room: shapes.py counts
// On sm_100 the epilogue would spill with the registers that three blocks leave it.
#if __CUDA_ARCH__ >= 1000
constexpr int kEpilogueBlocks = 2;
#else
constexpr int kEpilogueBlocks = kSumBlocks;
#endif

constexpr int kMergeThreads = 128;  // 4 to a column: they have the partials of 32 chunks on their way at once
constexpr int kAddThreads = 512;    // 16 to a column, for 144 chunks

struct Chunks {
  ColumnLse p;
  bool aligned;  // the rows that are read and those that are written
};

// The columns of a thread: `left` of 8 from j on; and the rows of its chunk, `rows` from `first` on. A row has fewer
// than 2^31 columns, and a chunk fewer rows: no device holds that many.
struct Place {
  unsigned j;
  int left, rows;
  int64_t first;
  __device__ __forceinline__ explicit Place(const Chunks& a)
      : j(blockIdx.x * kColumns + threadIdx.x % kWarp * kOctet),
        left(a.p.n - j >= kOctet ? kOctet
             : a.p.n > j         ? static_cast<int>(a.p.n - j)
                                 : 0),
        rows(static_cast<int>(a.p.m - blockIdx.y * a.p.rows < a.p.rows ? a.p.m - blockIdx.y * a.p.rows : a.p.rows)),
        first(blockIdx.y * a.p.rows) {}
  // Whether kRows whole octets are there, at addresses that are multiples of 16 bytes.
  __device__ __forceinline__ bool whole(const Chunks& a, int row) const {
    return a.aligned && left == kOctet && row + kRows <= rows;
  }
  // Columns that are there in a row of the chunk.
  __device__ __forceinline__ int left_of(int row) const { return row < rows ? left : 0; }
};

// The first of the rows that a warp has at once, and how many rows further the next ones are.
__device__ __forceinline__ int first_row() {
  return static_cast<int>(threadIdx.x / kWarp) * kRows;
}
constexpr int kNextRows = kWarps * kRows;

// Which columns of rows i to i + kRows are positives: bit r * kOctet + k for column j + k of row i + r.
__device__ __forceinline__ uint32_t find_positives(const Positives& p, int64_t i, int64_t j) {
  const int64_t before = p.own_columns - j, end = before + p.T * p.B;
  const int first_own = before > 0 ? static_cast<int>(before) : 0;
  const int last_own = end < kOctet ? static_cast<int>(end) : kOctet;
  const int image = own_image(j + first_own, p.own_columns, p.T, p.B);
  const auto first = static_cast<uint32_t>(p.first), period = static_cast<uint32_t>(p.period);
  const auto B = static_cast<uint32_t>(p.B);
  uint32_t place = static_cast<uint32_t>(i) % period, own = (first + place) % B, bits = 0;
#pragma unroll 1
  for (int r = 0; r < kRows; ++r) {
    const int64_t steps = static_cast<int64_t>(own) - image;
    for (int64_t k = first_own + (steps < 0 ? steps + p.B : steps); k < last_own; k += p.B)
      bits |= 1u << (r * kOctet + k);
    if (++own == B) own = 0;
    if (++place == period) {
      place = 0;
      own = first % B;
    }
  }
  return bits;
}

// Whether an octet has keys of this rank's images.
__device__ __forceinline__ bool has_own_keys(const Positives& p, int64_t j) {
  return p.masked && j + kOctet > p.own_columns && j < p.own_columns + p.T * p.B;
}

// kRows rows of the chunk; rows and columns past the last are masked. whole: there are none.
template <class Score>
__device__ __forceinline__ void load_rows(float (&x)[kRows][kOctet], const ColumnLse& p, const Place& at, int row,
                                          bool whole) {
  const Score* from = static_cast<const Score*>(p.scores.data) + (at.first + row) * p.scores.row_stride + at.j;
  if (whole) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) load_scores(x[r], from + r * p.scores.row_stride);
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) load_scores(x[r], from + r * p.scores.row_stride, at.left_of(row + r), false);
}

// Where a thread keeps numbers of its octet in shared memory, which it alone reads until the block's warps are put
// together.
__device__ __forceinline__ float* own_slot() {
  return static_cast<float*>(shared_memory()) + threadIdx.x * kOctet;
}
__device__ __forceinline__ void keep(float* slot, const float (&x)[kOctet]) {
#pragma unroll
  for (int c = 0; c < Chunk<float>::kPerOctet; ++c)
    reinterpret_cast<int4*>(slot)[c] = packed(x + c * Chunk<float>::kCount);
}

// Keep the biases in shared memory, since registers hold the scores, and return the steps of a unit. A thread calls it
// when its first scores are on their way: these wait for nothing.
__device__ __forceinline__ float keep_bias(const ColumnLse& p, const Place& at) {
  float bias[kOctet];
#pragma unroll
  for (int k = 0; k < kOctet; ++k) bias[k] = p.bias && k < at.left ? p.bias[at.j + k] : 0.0f;
  keep(own_slot(), bias);
  return 1.0f / number(p.step);
}

// Add the bias, mask the positives, and write the scores as fixed point, whose values are then x. Where no score of a
// thread is masked, not a number or too large, none is asked for that.
__device__ __forceinline__ void finish_rows(float (&x)[kRows][kOctet], const ColumnLse& p, const Place& at, int row,
                                            bool whole, float steps_per_unit) {
  int16_t* to = p.fixed + (at.first + row) * p.fixed_stride + at.j;
  float bias[kOctet], of_row[kRows] = {}, largest = 0.0f;
  load_scores(bias, own_slot());
#pragma unroll
  for (int k = 0; k < kOctet; ++k)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r][k] += bias[k];
      of_row[r] = largest_or_nan(of_row[r], x[r][k]);
    }
#pragma unroll
  for (int r = 0; r < kRows; ++r) largest = largest_or_nan(largest, of_row[r]);
  const uint32_t positives = has_own_keys(p.positives, at.j) ? find_positives(p.positives, at.first + row, at.j) : 0;
  if (whole && positives == 0 && largest * steps_per_unit <= kMostFixed) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int32_t bits[kOctet];
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        const float shifted = rounded_product(x[r][k], steps_per_unit) + kThreeTimes2To22;
        bits[k] = bits_of(shifted);
        x[r][k] = shifted - kThreeTimes2To22;
      }
      store_16_bytes(to + r * p.fixed_stride, {low_halves(bits[0], bits[1]), low_halves(bits[2], bits[3]),
                                               low_halves(bits[4], bits[5]), low_halves(bits[6], bits[7])});
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int16_t fixed[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      fixed[k] = positives >> (r * kOctet + k) & 1 ? kMaskedFixed : to_fixed(x[r][k], steps_per_unit);
      x[r][k] = value_of(fixed[k]);
    }
    store_octet(to + r * p.fixed_stride, fixed, at.left_of(row + r), whole);
  }
}

__global__ void __launch_bounds__(kThreads, kQuantizeBlocks) quantize_kernel(const Chunks a) {
  follow_earlier_kernels();
  const Place at(a);
  if (at.left == 0) return;
  float steps_per_unit = 0.0f;
  for (int row = first_row(); row < at.rows; row += kNextRows) {
    const bool whole = at.whole(a, row);
    float x[kRows][kOctet];
    load_rows<float>(x, a.p, at, row, whole);
    if (row == first_row()) steps_per_unit = keep_bias(a.p, at);
    finish_rows(x, a.p, at, row, whole, steps_per_unit);
  }
}

// The sums of an octet of columns, each total * 2^most as in Column.
struct Columns {
  float most[kOctet], total[kOctet];
};

// The exponent of row r of kRows in lane r, and its mantissa in lane kRows + r.
__device__ __forceinline__ float potential_of_lane(const Potential& potential, const Place& at, int row) {
  const unsigned part = threadIdx.x / kRows % 2;
  const int of_lane = row + static_cast<int>(threadIdx.x % kRows);
  return of_lane < at.rows ? (part == 0 ? potential.exponent : potential.mantissa)[at.first + of_lane] : 0.0f;
}

__device__ __forceinline__ void add_rows(Columns& columns, const float (&x)[kRows][kOctet], float scale,
                                         float of_rows) {
  float exponent[kRows], mantissa[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    exponent[r] = from_lane(of_rows, r);
    mantissa[r] = from_lane(of_rows, kRows + r);
  }
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    float largest = columns.most[k];
#pragma unroll
    for (int r = 0; r < kRows; ++r) largest = fmaxf(largest, fmaf(x[r][k], scale, exponent[r]));
    const float most = ceil_fast(largest);
    float total = columns.total[k] * exp2_fast(columns.most[k] - most);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      total = fmaf(exp2_fast(fmaf(x[r][k], scale, exponent[r] - most)), mantissa[r], total);
    columns.most[k] = most;
    columns.total[k] = total;
  }
}

// The sums of the block's column that the thread has of those that warps have: warps are added up in order.
__device__ __forceinline__ Column over_warps(const Columns& columns) {
  const float* const shared = static_cast<float*>(shared_memory());
  constexpr int kTotals = kWarps * kColumns;
  keep(own_slot(), columns.most);
  keep(own_slot() + kTotals, columns.total);
  sync_block();
  float most[kWarps], total[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    most[w] = shared[w * kColumns + threadIdx.x];
    total[w] = shared[kTotals + w * kColumns + threadIdx.x];
  }
  return together(Column(), most, total);
}

// What the sums of a column were, and those that are written: `fresh` is added. Of ColumnLse, or of Merge.
template <class Sums>
__device__ __forceinline__ Column earlier_sums(const Sums& p, int64_t j) {
  return p.accumulate && j < p.n ? Column{p.shift[j], p.sum[j]} : Column();
}
template <class Sums>
__device__ __forceinline__ void store_sums(const Sums& p, int64_t j, const Column& before, const Column& fresh) {
  const float most = fmaxf(before.most, fresh.most);
  p.shift[j] = most;
  p.sum[j] = before.total * exp2_fast(before.most - most) + fresh.total * exp2_fast(fresh.most - most);
}

template <class Score, bool kEpilogue>
__global__ void __launch_bounds__(kThreads, kEpilogue ? kEpilogueBlocks : kSumBlocks)
    column_lse_kernel(const Chunks a) {
  follow_earlier_kernels();
  const ColumnLse& p = a.p;
  const Place at(a);
  float scale = 0.0f, steps_per_unit = 0.0f;
  Columns columns;
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    columns.most[k] = kNoShift;
    columns.total[k] = 0.0f;
  }
  for (int row = first_row(); row < at.rows; row += kNextRows) {
    const bool whole = at.whole(a, row);
    float x[kRows][kOctet];
    load_rows<Score>(x, p, at, row, whole);
    const float of_rows = potential_of_lane(p.row, at, row);
    if (row == first_row()) {
      scale = number(p.scale);
      if (kEpilogue) steps_per_unit = keep_bias(p, at);
    }
    if (kEpilogue) finish_rows(x, p, at, row, whole, steps_per_unit);
    add_rows(columns, x, scale, of_rows);
  }

  const int64_t j = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const Column before = gridDim.y == 1 ? earlier_sums(p, j) : Column();
  const Column fresh = over_warps(columns);
  if (j >= p.n) return;
  if (gridDim.y == 1) return store_sums(p, j, before, fresh);
  p.partial[blockIdx.y * p.n + j] = fresh.most;
  p.partial[(gridDim.y + blockIdx.y) * p.n + j] = fresh.total;
}

struct Merge {
  const float* partial;  // (2, chunks, n)
  int64_t chunks, n;
  float* shift;
  float* sum;
  bool accumulate;
};

// The column that a thread helps to merge: lane l of every warp has column l of the block's 32.
__device__ __forceinline__ int64_t merged_column() {
  return static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
}

// What is added to the sum is asked for before the partials are waited for.
__global__ void __launch_bounds__(kMergeThreads) merge_lse_kernel(const Merge p) {
  follow_earlier_kernels();
  const int64_t j = merged_column();
  const Column before = earlier_sums(p, j);
  const Column fresh = merge_partials(p.partial, p.partial + p.chunks * p.n, p.chunks, p.n, j, kWarp,
                                      static_cast<Column*>(shared_memory()));
  if (threadIdx.x < kWarp && j < p.n) store_sums(p, j, before, fresh);
}

__global__ void __launch_bounds__(kAddThreads, 2) add_chunks_kernel(const AddChunks p) {
  follow_earlier_kernels();
  const int64_t j = merged_column();
  const bool mine = threadIdx.x < kWarp && j < p.n;
  const float factor = mine && p.factor ? p.factor[j] : 1.0f, before = mine && p.accumulate ? p.out[j] : 0.0f;
  Power col = {};
  if (mine && p.col.exponent) col = {p.col.exponent[j], p.col.mantissa[j]};
  const float total = add_partials(p.partial, p.chunks, p.n, j, kWarp, static_cast<float*>(shared_memory()));
  if (!mine) return;
  const float sum = fmaf(total, factor, before);
  p.out[j] = sum;
  if (p.col.exponent) divide_column(p.col, j, sum, col);
}

void merge(const ColumnLse& p, int64_t chunks, const Where& where) {
  const Shape shape = {dim3(blocks_for(p.n, kWarp)), kMergeThreads, kMergeThreads * sizeof(Column)};
  launch("merge_lse_kernel", merge_lse_kernel, shape, where,
         Merge{p.partial, chunks, p.n, p.shift, p.sum, p.accumulate});
}

}  // namespace

void add_chunks(const AddChunks& p, const Where& where) {
  const Shape shape = {dim3(blocks_for(p.n, kWarp)), kAddThreads, kAddThreads * sizeof(float)};
  launch("add_chunks_kernel", add_chunks_kernel, shape, where, p);
}

void column_lse(const ColumnLse& p, const Where& where) {
  const unsigned chunks = blocks_for(p.m, p.rows);
  const dim3 blocks(blocks_for(p.n, kColumns), chunks);
  const Shape shape = {blocks, kThreads, kSumsBytes};
  if (p.scores.type == ScoreType::kInt16) {
    const bool aligned = is_aligned(static_cast<const int16_t*>(p.scores.data), 0, p.scores.row_stride);
    launch("column_lse_kernel<int16>", column_lse_kernel<int16_t, false>, shape, where, Chunks{p, aligned});
  } else {
    const bool aligned = is_aligned(static_cast<const float*>(p.scores.data), 0, p.scores.row_stride);
    const Chunks a = {p, aligned && is_aligned(p.fixed, 0, p.fixed_stride)};
    if (!p.shift) return launch("quantize_kernel", quantize_kernel, {blocks, kThreads, kBiasBytes}, where, a);
    if (p.fixed) launch("column_lse_kernel<float32, epilogue>", column_lse_kernel<float, true>, shape, where, a);
    else launch("column_lse_kernel<float32>", column_lse_kernel<float, false>, shape, where, a);
  }
  if (chunks != 1) merge(p, chunks, where);
}

}  // namespace bam::cuda
