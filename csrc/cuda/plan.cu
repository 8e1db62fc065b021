// The plan E_ij = 2^(scale*s_ij) row_i col_j as an operator, the row half of a Sinkhorn iteration for rows too long for
// the chip, and G + transpose(G).
#include "launch.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace bam::cuda {
namespace {

constexpr int kRowThreads = 256, kColumnThreads = 128, kColumnRows = 4;
static_assert(kRowThreads <= kMostThreads, "the scratch of reductions has room for the most threads");
constexpr int kTile = 32, kTileRows = 8;

template <class Params>
struct Aligned {
  Params p;
  bool scores;
};

// sum_j 2^(scale*s_j + col.exponent_j + exponent) col.mantissa_j v_j of this thread's columns; v null: 1.
template <class Score>
__device__ float row_total(const Score* s, int64_t n, bool aligned, float scale, float exponent, const Potential& col,
                           const float* v) {
  float total = 0.0f;
  for (int64_t j = threadIdx.x * kOctet; j < n; j += blockDim.x * kOctet) {
    float x[kOctet];
    load_scores(x, s + j, n - j, aligned);
#pragma unroll
    for (int k = 0; k < kOctet; ++k)
      if (j + k < n) {
        const float weight = v ? col.mantissa[j + k] * v[j + k] : col.mantissa[j + k];
        total = fmaf(exp2_fast(fmaf(x[k], scale, col.exponent[j + k] + exponent)), weight, total);
      }
  }
  return total;
}

template <class Score>
__device__ float largest_term(const Score* s, int64_t n, bool aligned, float scale, const float* col_exponent) {
  float most = -INFINITY;
  for (int64_t j = threadIdx.x * kOctet; j < n; j += blockDim.x * kOctet) {
    float x[kOctet];
    load_scores(x, s + j, n - j, aligned);
#pragma unroll
    for (int k = 0; k < kOctet; ++k)
      if (j + k < n) most = fmaxf(most, fmaf(x[k], scale, col_exponent[j + k]));
  }
  return most;
}

// One block a row; row.exponent is a guess of the result.
template <class Score>
__global__ void __launch_bounds__(kRowThreads) row_step_kernel(const Aligned<RowStep> a) {
  follow_earlier_kernels();
  const RowStep& p = a.p;
  RowTeam<false> team(static_cast<float*>(shared_memory()));
  const int64_t i = blockIdx.x;
  const Score* s = static_cast<const Score*>(p.scores.data) + i * p.scores.row_stride;
  const float scale = number(p.scale);
  float exponent = p.row.exponent[i];
  float total[1] = {row_total(s, p.n, a.scores, scale, exponent, p.col, nullptr)};
  team.reduce(total, Sum());
  if (is_poor(total[0])) {
    float most[1] = {largest_term(s, p.n, a.scores, scale, p.col.exponent)};
    team.reduce(most, Max());
    exponent = exponent_of(most[0]);
    total[0] = row_total(s, p.n, a.scores, scale, exponent, p.col, nullptr);
    team.reduce(total, Sum());
  }
  if (threadIdx.x == 0) {
    const Power found = reciprocal(exponent, total[0]);
    p.row.exponent[i] = found.exponent;
    p.row.mantissa[i] = found.mantissa;
  }
}

// y_i = sum_j E_ij v_j, one block a row.
template <class Score>
__global__ void __launch_bounds__(kRowThreads) row_products_kernel(const Aligned<PlanProducts> a) {
  follow_earlier_kernels();
  const PlanProducts& p = a.p;
  RowTeam<false> team(static_cast<float*>(shared_memory()));
  const int64_t i = blockIdx.x;
  const Score* s = static_cast<const Score*>(p.scores.data) + i * p.scores.row_stride;
  float total[1] = {row_total(s, p.n, a.scores, number(p.scale), p.row.exponent[i], p.col, p.v)};
  team.reduce(total, Sum());
  if (threadIdx.x == 0) p.y[i] = total[0] * p.row.mantissa[i];
}

// Per chunk of rows sum_i E_ij u_i without the factor col.mantissa_j. A row with an infinite potential has no key left
// and adds nothing.
template <class Score>
__global__ void __launch_bounds__(kColumnThreads) column_products_kernel(const Aligned<PlanProducts> a) {
  follow_earlier_kernels();
  const PlanProducts& p = a.p;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x) * kOctet;
  if (j >= p.n) return;
  const int64_t first = blockIdx.y * p.rows, last = first + p.rows < p.m ? first + p.rows : p.m;
  const Score* s = static_cast<const Score*>(p.scores.data) + j;
  const float scale = number(p.scale);
  float col[kOctet], w[kOctet] = {};
#pragma unroll
  for (int k = 0; k < kOctet; ++k) col[k] = j + k < p.n ? p.col.exponent[j + k] : 0.0f;
  for (int64_t i = first; i < last; i += kColumnRows) {
    float x[kColumnRows][kOctet], exponent[kColumnRows], weight[kColumnRows];
#pragma unroll
    for (int r = 0; r < kColumnRows; ++r) {
      const int64_t left = i + r < last ? p.n - j : 0;
      load_scores(x[r], s + (i + r) * p.scores.row_stride, left, a.scores);
      exponent[r] = left ? p.row.exponent[i + r] : 0.0f;
      weight[r] = left && p.row.mantissa[i + r] != INFINITY ? p.row.mantissa[i + r] : 0.0f;
      if (left && p.u) weight[r] *= p.u[i + r];
    }
#pragma unroll
    for (int r = 0; r < kColumnRows; ++r)
#pragma unroll
      for (int k = 0; k < kOctet; ++k)
        w[k] = fmaf(exp2_fast(fmaf(x[r][k], scale, col[k] + exponent[r])), weight[r], w[k]);
  }
#pragma unroll
  for (int k = 0; k < kOctet; ++k)
    if (j + k < p.n) p.partial[blockIdx.y * p.n + j + k] = w[k];
}

// x_ij -= E_ij (u_i + v_j); u, v null: 0.
template <class Score>
__global__ void __launch_bounds__(kRowThreads) plan_subtract_kernel(const PlanSubtract p) {
  follow_earlier_kernels();
  const int64_t i = blockIdx.x;
  const Score* s = static_cast<const Score*>(p.scores.data) + i * p.scores.row_stride;
  float* x = p.x + i * p.x_stride;
  const float scale = number(p.scale), exponent = p.row.exponent[i], mantissa = p.row.mantissa[i];
  const float u = p.u ? p.u[i] : 0.0f;
  for (int64_t j = threadIdx.x; j < p.n; j += blockDim.x) {
    const float e = exp2_fast(fmaf(value_of(s[j]), scale, p.col.exponent[j] + exponent));
    x[j] -= e * (p.col.mantissa[j] * mantissa) * (p.v ? u + p.v[j] : u);
  }
}

// Tiles (I, J) and (J, I) of G <- G + transpose(G), I <= J, and partial[J, i] = sum over rows of tile J of G's column
// i, before.
template <class T>
__global__ void __launch_bounds__(kTile* kTileRows) symmetrize_kernel(const Symmetrize p) {
  follow_earlier_kernels();
  T* G = static_cast<T*>(p.G);
  const int64_t I = blockIdx.y, J = blockIdx.x;
  if (I > J) return;
  auto* upper = static_cast<float (*)[kTile + 1]>(shared_memory());
  auto* lower = upper + kTile;
  const int x = threadIdx.x % kTile, first = threadIdx.x / kTile;
  const int64_t i_of_x = I * kTile + x, j_of_x = J * kTile + x;
  for (int y = first; y < kTile; y += kTileRows) {
    const int64_t i = I * kTile + y, j = J * kTile + y;
    upper[y][x] = i < p.m && j_of_x < p.m ? as_float(G[i * p.stride + j_of_x]) : 0.0f;
    lower[y][x] = j < p.m && i_of_x < p.m ? as_float(G[j * p.stride + i_of_x]) : 0.0f;
  }
  sync_block();
  for (int y = first; y < kTile; y += kTileRows) {
    const int64_t i = I * kTile + y, j = J * kTile + y;
    if (i < p.m && j_of_x < p.m) G[i * p.stride + j_of_x] = from_float<T>(upper[y][x] + lower[x][y]);
    if (I < J && j < p.m && i_of_x < p.m) G[j * p.stride + i_of_x] = from_float<T>(lower[y][x] + upper[x][y]);
  }
  if (first == 0 && i_of_x < p.m) {
    float sum = 0.0f;
    for (int y = 0; y < kTile; ++y) sum += lower[y][x];
    p.partial[J * p.m + i_of_x] = sum;
  }
  if (first == 1 && I < J && j_of_x < p.m) {
    float sum = 0.0f;
    for (int y = 0; y < kTile; ++y) sum += upper[y][x];
    p.partial[I * p.m + j_of_x] = sum;
  }
}

template <class Score, class Params>
Aligned<Params> aligned(const Params& p) {
  return {p, is_aligned(static_cast<const Score*>(p.scores.data), 0, p.scores.row_stride)};
}

Shape row_shape(int64_t m) {
  return {dim3(static_cast<unsigned>(m)), kRowThreads, kScratchBytes};
}

template <class Score>
void launch_products(const PlanProducts& p, const Where& where) {
  if (p.y) launch("row_products_kernel", row_products_kernel<Score>, row_shape(p.m), where, aligned<Score>(p));
  if (!p.w) return;
  const unsigned chunks = blocks_for(p.m, p.rows);
  launch("column_products_kernel", column_products_kernel<Score>,
         {dim3(blocks_for(p.n, kColumnThreads * kOctet), chunks), kColumnThreads}, where, aligned<Score>(p));
  add_chunks({p.partial, chunks, p.n, p.col.mantissa, p.w, p.accumulate}, where);
}

}  // namespace

void row_step(const RowStep& p, const Where& where) {
  if (p.scores.type == ScoreType::kInt16)
    launch("row_step_kernel<int16>", row_step_kernel<int16_t>, row_shape(p.m), where, aligned<int16_t>(p));
  else launch("row_step_kernel<float32>", row_step_kernel<float>, row_shape(p.m), where, aligned<float>(p));
}

void plan_products(const PlanProducts& p, const Where& where) {
  if (p.scores.type == ScoreType::kInt16) launch_products<int16_t>(p, where);
  else launch_products<float>(p, where);
}

void plan_subtract(const PlanSubtract& p, const Where& where) {
  if (p.scores.type == ScoreType::kInt16)
    launch("plan_subtract_kernel<int16>", plan_subtract_kernel<int16_t>, row_shape(p.m), where, p);
  else launch("plan_subtract_kernel<float32>", plan_subtract_kernel<float>, row_shape(p.m), where, p);
}

void symmetrize(const Symmetrize& p, const Where& where) {
  const unsigned tiles = blocks_for(p.m, kTile);
  const Shape shape = {dim3(tiles, tiles), kTile * kTileRows,
                       2 * kTile * (kTile + 1) * static_cast<int64_t>(sizeof(float))};
  if (p.type == FloatType::kFloat32) launch("symmetrize_kernel<float32>", symmetrize_kernel<float>, shape, where, p);
  else launch("symmetrize_kernel<float16>", symmetrize_kernel<__half>, shape, where, p);
  add_chunks({p.partial, tiles, p.m, nullptr, p.column_sums, false}, where);
}

}  // namespace bam::cuda
