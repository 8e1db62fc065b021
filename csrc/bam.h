// The contract between Python and the kernels: plain pointers, sizes and strides. No torch, no Python.
//
// B images on this rank, V student views, L target views, T key views, W ranks; rows are view-major (v*B + i).
// m, n: rows and columns of the scores at hand; columns are in gathered order, rank*(T*B) + t*B + i.
// Strides are in elements. All scores of one call share a type.
#pragma once

#include <cstdint>

namespace bam {

// A float32 score that may not be attended to. Finite, so that 0 * score is 0; 2^(score * scale) is exactly 0.
constexpr float kMaskedScore = -1e30f;
// The same for int16 scores, whose attended values lie in [-32767, 32767].
constexpr int16_t kMaskedFixed = -32768;

enum class ScoreType : int { kFloat32 = 0, kInt16 = 1 };

// Row (v, i) of the scores is at data + v*view_stride + i*row_stride; its columns are contiguous.
struct Scores {
  const void* data;
  ScoreType type;
  int64_t view_stride;
  int64_t row_stride;
};

// 2^exponent * mantissa, exponent an integer held in a float: fma(score, scale, exponent) then rounds once, at the
// size of its result. A plain float32 potential at eps = 1e-3 would lose 7e-6 of every entry of P.
struct Potential {
  float* exponent;
  float* mantissa;
};

// Per column j: sum_i 2^(scale*s_ij) * row_i = sum[j] * 2^shift[j]. An empty column has sum 0.
struct ColumnLse {
  Scores scores;
  int64_t m, n;
  float scale;      // log2(e)/eps * (value of one score step)
  Potential row;    // (m) starting row potential
  float* shift;     // (n) integers in floats
  float* sum;       // (n)
  bool accumulate;  // add to what shift and sum hold: slab after slab
  int threads;
};

// row_i = 1 / sum_j 2^(scale*s_ij) * col_j, and column sums c_j += sum_i 2^(scale*s_ij) * row_i * col_j.
// On entry row.exponent is a guess of the result; a bad one costs time, never accuracy.
struct SinkhornPass {
  Scores scores;
  int64_t m, n;
  float scale;
  Potential row;    // (m) in, out
  Potential col;    // (n)
  float* c;         // (n) out
  bool accumulate;  // add to what c holds: slab after slab
  int threads;
};

// Targets P of b images from their L rows; with `top_k`, over the k columns of the largest mean over the L rows,
// ties to the lower public column. Then, where sources are given, the loss of their V source rows and its gradient.
struct Match {
  Scores target;  // rows t < L
  Scores source;  // rows v < V; data null: targets only
  int64_t L, V, b, n;
  int64_t W, T, B;     // n = W*T*B where top_k > 0: the public order of the columns
  int64_t top_k;       // 0: keep all
  float target_scale;  // log2(e)/eps * step
  float source_scale;  // log2(e)/tau * step
  float source_step_over_tau;
  float gradient_scale;       // 1/(B*tau)
  const float* row_exponent;  // guess for target row (t, i), at t*row_view_stride + i
  int64_t row_view_stride;
  Potential col;           // (n)
  double* loss;            // (b) sum_v a_v*lse_v - <Pbar_v, s_v>/tau, natural log; 0 without sources
  double* target_entropy;  // (b) sum_t H(P_t)
  double* source_entropy;  // (b) sum_v H(A_v); 0 without sources
  float* targets;          // row (t, i) at t*targets_view_stride + i*n; null: not wanted
  int64_t targets_view_stride;
  Potential row_out;  // (b) potential of target row 0; null: not wanted
  float* gradient;    // row (v, i) at v*gradient_view_stride + i*gradient_row_stride; null: not wanted.
  int64_t gradient_view_stride, gradient_row_stride;  // may be source.data itself where that is float32
  int threads;
};

// With E_ij = 2^(scale*s_ij) * row_i * col_j: y_i = sum_j E_ij v_j, w_j = sum_i E_ij u_i; v or u may be null.
struct PlanProducts {
  Scores scores;
  int64_t m, n;
  float scale;
  Potential row, col;
  const float* v;  // (n)
  const float* u;  // (m)
  float* y;        // (m) out
  float* w;        // (n) out
  int threads;
};

// x_ij -= E_ij * (u_i + v_j)
struct PlanSubtract {
  Scores scores;
  int64_t m, n;
  float scale;
  Potential row, col;
  const float* u;  // (m), or null: 0
  const float* v;  // (n), or null: 0
  float* x;        // (m, n)
  int threads;
};

// unit = x / max(|x|, 1e-12), and |x|.
struct Normalize {
  const float* x;
  int64_t m, d, row_stride;
  float* unit;   // (m, d)
  double* norm;  // (m)
  int threads;
};

// Mean of rows. Groups of four rows are added in float, and the groups in double.
struct MeanRow {
  const float* x;
  int64_t m, d, row_stride;
  float* mean;  // (d)
  int threads;
};

// The row potential 2^(scale * <unit_i, centre>) of scores taken against centred keys, the product in double. Where
// rows are keys: also unit_i - centre of the first rows.
struct CentrePotential {
  const float* unit;    // (m, d)
  const float* centre;  // (d)
  int64_t m, d;
  double scale;
  Potential row;   // (m) out
  float* centred;  // (centred_rows, d) out
  int64_t centred_rows;
  int threads;
};

// d_i <- factor * (d_i - unit_i <unit_i, d_i>) / norm_i, and 0 where norm_i < 1e-12: the way back through the L2
// normalisation. Before that, common_factor * weight_i * common is added to the first rows.
struct Project {
  float* d;  // (m, d) in, out
  const float* unit;
  const double* norm;
  double factor;
  const float* weight;  // (weights)
  const float* common;  // (d_features)
  float common_factor;
  int64_t weights, m, d_features;
  int threads;
};

// G <- G + transpose(G) of a square G, and the column sums that G had.
struct Symmetrize {
  float* G;  // (m, m)
  int64_t m, stride;
  float* column_sums;  // (m)
  int threads;
};

// Fixed-point scores: rint(s * steps_per_unit) clamped to +-32767, masked scores to kMaskedFixed.
struct Quantize {
  const float* scores;
  int64_t m, n;
  float steps_per_unit;
  int16_t* out;
  int threads;
};

// Write the masked score over the positives; row i of the slab shows image (first + i % period) % B.
struct MaskPositives {
  float* scores;
  int64_t m, row_stride;
  int64_t first, period, B, T, own_columns;
  int threads;
};

// The loss and its statistics in the order of BAMStats, from the sums of images and columns, added up in double.
struct LossAndStats {
  const double* images;  // (3, count) losses, target entropies and source entropies of images
  int64_t count;
  const float* c;  // (n) the column sums before the last column step
  int64_t n;
  const double* norm;  // (m) norms of rows, or null; one that is not finite makes the loss NaN
  int64_t m;
  int64_t B, L, V;
  double uniform_loss;
  float* loss;   // (1)
  float* stats;  // (6)
};

// Number k of row i at data + i*row_stride + k*depth_stride; one of the strides is 1.
struct Factor {
  const float* data;
  int64_t row_stride, depth_stride;
};

// out (m, n) <- a b, or out + a b with `add`; rows of the Factor b are columns of the matrix b.
struct Product {
  Factor a, b;
  float* out;
  int64_t m, n, depth, out_stride;
  bool add;
  void* workspace;  // SplitProducts::bytes
  int threads;
};

namespace cpu {

struct Kernels {
  const char* isa;
  void (*column_lse)(const ColumnLse&);
  void (*sinkhorn_pass)(const SinkhornPass&);
  void (*match)(const Match&);
  void (*plan_products)(const PlanProducts&);
  void (*plan_subtract)(const PlanSubtract&);
  void (*normalize)(const Normalize&);
  void (*mean_row)(const MeanRow&);
  void (*centre_potential)(const CentrePotential&);
  void (*project)(const Project&);
  void (*quantize)(const Quantize&);
  void (*symmetrize)(const Symmetrize&);
};

// The best set of kernels this processor can run, or the named one; null where it cannot run here.
const Kernels* find_kernels(const char* isa);

// Products of two bf16 parts of each number, on tile units.
struct SplitProducts {
  int64_t (*bytes)(int64_t m, int64_t n, int64_t depth, int threads);  // of the workspace
  void (*product)(const Product&);
};

// Null where the processor, its operating system or this build has none.
const SplitProducts* find_split_products();

void mask_positives(const MaskPositives&);
// col = 1 / (sum * 2^shift), of the column sums of ColumnLse; 1 for an empty column, which has no entry to scale.
void reciprocal_potential(Potential col, const float* shift, const float* sum, int64_t n);
// total = sum * 2^(shift - common): column sums of ColumnLse as numbers that ranks can add up.
void column_totals(const float* shift, const float* sum, double common, double* total, int64_t n, int threads);
// col = 1 / (total * 2^common); 1 for an empty column.
void total_potential(Potential col, const double* total, float common, int64_t n);
// col <- col / c; a column with c = 0 keeps its potential.
void divide_potential(Potential col, const float* c, int64_t n);
void loss_and_stats(const LossAndStats&);
// Ask the system for pages of 2 MB within memory that has not been written yet: first writes to them take less time.
void use_huge_pages(void* memory, int64_t bytes);
// Number of infinite and NaN entries of norm (m).
int64_t count_not_finite(const double* norm, int64_t m);

}  // namespace cpu
}  // namespace bam
