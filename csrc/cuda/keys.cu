// What the scores need of all keys: their centre, the mean of unit rows, and the step of fixed point.
#include "embed.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace bam::cuda {
namespace {

constexpr int kMeanThreads = 512, kMeanOctets = 2;  // of columns of a block
constexpr int kMeanColumns = kMeanOctets * kOctet, kMeanSlots = kMeanThreads / kMeanOctets;
constexpr int kRowsAtOnce = 2;  // reads on their way
static_assert(kMeanOctets == 2 && kOctet == 8, "4 bits of a lane are a row, of which 3 choose a column of an octet");

// 1 / max(norm, floor) in float32, of a norm that float32 may not hold.
__device__ __forceinline__ float inverse_norm(double norm) {
  constexpr double kDown = 0x1p-16;
  return static_cast<float>(kDown) / static_cast<float>((norm < kNormFloor ? kNormFloor : norm) * kDown);
}

// sums += the columns of this thread's octet over this thread's rows. kWhole: all rows have it whole, and aligned.
template <class T, bool kWhole>
__device__ __forceinline__ void add_rows(const MeanRow& p, float (&sums)[kOctet], int64_t first) {
  constexpr int kAtOnce = kWhole ? kRowsAtOnce : 1;
  for (int64_t from = threadIdx.x / kMeanOctets; from < p.m; from += kAtOnce * kMeanSlots) {
    T raw[kAtOnce][kOctet];
    double norms[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t i = from + r * kMeanSlots, read = i < p.m ? i : from;
      const Row<T> row(p.x, read);
      if (kWhole) load_octet(raw[r], row.data + first, kOctet, true, from_float<T>(0.0f));
      else row.load(raw[r], first, p.d);
      norms[r] = p.norm ? p.norm[read] : 1.0;
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const float factor = from + r * kMeanSlots < p.m ? inverse_norm(norms[r]) : 0.0f;
#pragma unroll
      for (int k = 0; k < kOctet; ++k) sums[k] += as_float(raw[r][k]) * factor;
    }
  }
}

// Over lanes whose numbers differ in the bits of kOffset and lower ones, down to 2. A lane hands half of its values
// to the lane that keeps those, until it has one.
template <int kOffset, int kValues>
__device__ __forceinline__ float scattered_sum(const float (&x)[kValues]) {
  if constexpr (kValues == 1) {
    static_assert(kOffset == kMeanOctets, "the lanes of an octet have been summed");
    return x[0] + exchange(x[0], kOffset);
  } else {
    const bool upper = threadIdx.x / kOffset % 2 != 0;
    float kept[kValues / 2];
#pragma unroll
    for (int v = 0; v < kValues / 2; ++v)
      kept[v] = (upper ? x[v + kValues / 2] : x[v]) + exchange(upper ? x[v] : x[v + kValues / 2], kOffset);
    return scattered_sum<kOffset / 2>(kept);
  }
}

// A block has 16 columns, and a row of them is two lanes'.
template <class T>
__global__ void __launch_bounds__(kMeanThreads) mean_row_kernel(const MeanRow p) {
  follow_earlier_kernels();
  const unsigned lane = threadIdx.x % kWarp, octet = lane % kMeanOctets;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kMeanColumns, first = begin + octet * kOctet;
  const Rows& x = p.x;
  const bool aligned = x.feature_stride == 1 && is_aligned(x.data) &&
                       (x.view_stride | x.row_stride) % (16 / static_cast<int64_t>(sizeof(T))) == 0;
  float sums[kOctet] = {};
  if (aligned && first + kOctet <= p.d) add_rows<T, true>(p, sums, first);
  else add_rows<T, false>(p, sums, first);
  const float sum = scattered_sum<kWarp / 2>(sums);
  auto* parts = static_cast<float*>(shared_memory());
  const unsigned column = octet * kOctet + lane / 16 % 2 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2;
  if (lane / 2 % 2 == 0) parts[threadIdx.x / kWarp * kMeanColumns + column] = sum;
  sync_block();
  if (threadIdx.x >= kMeanColumns || begin + threadIdx.x >= p.d) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kMeanThreads / kWarp; ++warp) total += parts[warp * kMeanColumns + threadIdx.x];
  p.mean[begin + threadIdx.x] = total / static_cast<float>(p.m * p.ranks);
}

constexpr int kStepThreads = 1024;      // of the one block between two products
constexpr double kLeastSquare = 1e-14;  // of a difference of unit rows, above a double's rounding of 1

struct Extremes {
  float least = INFINITY, most = -INFINITY;
  __device__ void add(float x) {
    least = fminf(least, x);
    most = fmaxf(most, x);
  }
};

// What product_step needs of its input: |centre|^2, and the extremes of the biases of keys and of rows.
struct StepParts {
  double squares = 0.0;
  Extremes keys, rows;
};
__device__ __forceinline__ StepParts exchange(const StepParts& x, int mask) {
  return {bam::cuda::exchange(x.squares, mask),
          {bam::cuda::exchange(x.keys.least, mask), bam::cuda::exchange(x.keys.most, mask)},
          {bam::cuda::exchange(x.rows.least, mask), INFINITY}};
}
struct CombineParts {
  __device__ __forceinline__ StepParts operator()(const StepParts& a, const StepParts& b) const {
    return {a.squares + b.squares,
            {fminf(a.keys.least, b.keys.least), fmaxf(a.keys.most, b.keys.most)},
            {fminf(a.rows.least, b.rows.least), INFINITY}};
  }
};

// Reads of all threads, several at once: one after another their time would be most of the kernel's.
constexpr int kPerVector = 4, kKeyReads = 8, kRowReads = 4, kCentreReads = 4;

// Floats of x (n), `past` after its end. kVector: 16 bytes at a time, of the whole ones.
template <bool kVector, int kReads>
__device__ __forceinline__ void load_some(float (&read)[kReads], const float* x, int64_t n, int64_t turn, float past) {
  constexpr int kPer = kVector ? kPerVector : 1, kAtOnce = kReads / kPer;
  const int64_t first = turn * kAtOnce * kStepThreads + threadIdx.x, left = n / kPer - first;
  const float* from = x + first * kPer;
#pragma unroll
  for (int k = 0; k < kReads; ++k) read[k] = past;
#pragma unroll
  for (int r = 0; r < kAtOnce; ++r) {
    if (r * kStepThreads >= left) continue;
    if (kVector) {
      const int4 bits = reinterpret_cast<const int4*>(from)[r * kStepThreads];
      memcpy(read + r * kPer, &bits, sizeof bits);
    } else {
      read[r] = from[r * kStepThreads];
    }
  }
}

// kVector: the biases are aligned and no fewer than a vector.
template <bool kVector>
__device__ __forceinline__ StepParts read_parts(const ProductStep& p) {
  StepParts found;
  // The biases that are not in whole vectors are among the last few.
  const int64_t back = kVector ? 1 + threadIdx.x % kPerVector : 1;
  const float last_key = p.key_bias[p.n - back], last_row = p.row_bias[p.m - back];
  const float last_other = p.other > 0 ? p.other_bias[p.other - back] : last_row;
  const int64_t rows_at_most = p.m > p.other ? p.m : p.other;
  for (int64_t turn = 0; turn * (kKeyReads * kStepThreads) < p.n || turn * (kRowReads * kStepThreads) < rows_at_most ||
                         turn * (kCentreReads * kStepThreads) < p.d;
       ++turn) {
    float keys[kKeyReads], rows[kRowReads], others[kRowReads], centre[kCentreReads];
    // Extremes leave out what is not a number.
    load_some<kVector>(keys, p.key_bias, p.n, turn, NAN);
    load_some<kVector>(rows, p.row_bias, p.m, turn, NAN);
    load_some<kVector>(others, p.other_bias, p.other, turn, NAN);
    load_some<false>(centre, p.centre, p.d, turn, 0.0f);
#pragma unroll
    for (int r = 0; r < kKeyReads; ++r) found.keys.add(keys[r]);
#pragma unroll
    for (int r = 0; r < kRowReads; ++r) {
      found.rows.add(rows[r]);
      found.rows.add(others[r]);
    }
#pragma unroll
    for (int r = 0; r < kCentreReads; ++r) found.squares += static_cast<double>(centre[r]) * centre[r];
  }
  found.keys.add(last_key);
  found.rows.add(last_row);
  found.rows.add(last_other);
  return found;
}

// One block. Where all keys are the centre every product is 0, of whatever steps. A centre that is not a number gives
// no step.
__global__ void __launch_bounds__(kStepThreads, 1) product_step_kernel(const ProductStep p) {
  follow_earlier_kernels();
  constexpr double kSquare = static_cast<double>(kUnitScale) * kUnitScale;
  const bool vectors = is_aligned(p.key_bias) && is_aligned(p.row_bias) && is_aligned(p.other_bias) &&
                       p.n >= kPerVector && p.m >= kPerVector && (p.other == 0 || p.other >= kPerVector);
  StepParts found[1] = {vectors ? read_parts<true>(p) : read_parts<false>(p)};
  over_block<kStepThreads / kWarp>(found, static_cast<StepParts*>(shared_memory()), CombineParts());
  if (threadIdx.x != 0) return;
  const double left = 1.0 - found[0].squares;
  const Extremes &keys = found[0].keys, &rows = found[0].rows;
  const double a = left == left ? sqrt(fmax(left - 2.0 / kSquare * keys.least, kLeastSquare)) : left;
  const double b = sqrt(fmax(left - 2.0 / kSquare * rows.least, kLeastSquare));
  const double bias = fmax(-static_cast<double>(keys.least), static_cast<double>(keys.most)) / kSquare;
  *p.step = static_cast<float>(fmin(a * b + bias, a) * (kSquare / kFixedSteps));
}

}  // namespace

void mean_row(const MeanRow& p, const Where& where) {
  launch("mean_row_kernel",
         of_type<MeanRow>(p.x.type, mean_row_kernel<float>, mean_row_kernel<__half>, mean_row_kernel<__nv_bfloat16>),
         {dim3(blocks_for(p.d, kMeanColumns)), kMeanThreads,
          kMeanThreads / kWarp * kMeanColumns * static_cast<int64_t>(sizeof(float))},
         where, p);
}

void product_step(const ProductStep& p, const Where& where) {
  launch("product_step_kernel", product_step_kernel,
         {dim3(1), kStepThreads, kStepThreads / kWarp * static_cast<int64_t>(sizeof(StepParts))}, where, p);
}

}  // namespace bam::cuda
