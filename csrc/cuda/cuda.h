// The contract of the CUDA kernels: plain pointers, sizes and a stream; letters and strides are those of bam.h. Every
// failure is a std::runtime_error that names the kernel and its launch. Nothing is allocated and nothing waits.
//
// Shapes of launches come from the caller, who knows the device: bam_kernels/backends/cuda/shapes.py.
#pragma once

#include <cstdint>
#include <string>

#include "../bam.h"

namespace bam::cuda {

struct Device {
  std::string name;
  int major, minor;
  int multiprocessors;
  int64_t memory_bytes, l2_bytes;
  int64_t shared_bytes, reserved_bytes;  // of a block: at most, and what it takes besides
  // How many clusters of 2, 4, 8 and 16 blocks run at once with the most threads and shared memory; 0: none can. The
  // blocks of a cluster are in one part of the chip, and these differ in size.
  int clusters[4];
  bool programmatic;  // whether a kernel's blocks can come on chip while the one before it ends
  std::string fault;  // why none of these kernels can run here; empty: they can
};

// How many devices this process sees, or why it sees none.
struct Devices {
  int count;
  std::string fault;
};
Devices devices();
// Makes a context on the device, which takes memory there: not for devices that are not used.
Device describe(int index);

struct Where {
  int device;
  void* stream;
  bool programmatic;     // Device::programmatic
  int64_t shared_bytes;  // Device::shared_bytes
};

// A factor, times a number on the device where there is one.
struct Scalar {
  float factor;
  const float* pointer;
};

enum class FloatType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A float matrix of any strides, rows of several views: row v*per_view + i is at data + v*view_stride + i*row_stride.
struct Rows {
  const void* data;
  FloatType type;
  int64_t per_view, view_stride, row_stride, feature_stride;
};

// What a build may set to find out what is fastest on a GPU: BAM_KERNELS_DEFINES of setup.py.
#ifndef BAM_OCTETS
#define BAM_OCTETS 2
#endif
#ifndef BAM_THREADS
#define BAM_THREADS 512
#endif
#ifndef BAM_REGISTER_THREADS
#define BAM_REGISTER_THREADS 512
#endif
#ifndef BAM_GROUPS
#define BAM_GROUPS 2
#endif
#ifndef BAM_STAGES
#define BAM_STAGES 6
#endif

// How a thread's columns lie: it owns kOwned, in octets that are neighbours' neighbours.
constexpr int kOctet = 8, kOctets = BAM_OCTETS, kOwned = kOctet * kOctets;
constexpr int kMostThreads = BAM_THREADS, kMostCluster = 16;
static_assert(kOctets >= 1, "a thread owns columns");
static_assert(kMostThreads % 32 == 0 && kMostThreads <= 1024, "whole warps, as many as a block may have");
// Threads of the kernels with whole rows on chip for whose registers a multiprocessor has room.
constexpr int kRegisterThreads = BAM_REGISTER_THREADS;
static_assert(kRegisterThreads % kMostThreads == 0, "whole blocks of the most threads");
static_assert(kRegisterThreads >= kMostThreads && kRegisterThreads <= 2048, "a block at least, and what runs at once");
// Threads of a block of the one-launch Sinkhorn. With so few a multiprocessor's registers hold all that threads need.
constexpr int kOnChipThreads = 256;
// The rows of a Sinkhorn pass that share a reduction are a group: kGroupBytes of scores a column, or half of that where
// the chip has no room for more. kGroups are on chip or on their way, beside the potentials of the columns.
constexpr int kGroupBytes = 8, kGroups = BAM_GROUPS, kPotentialBytes = 2 * sizeof(float);
static_assert(kGroups >= 2, "the next group comes while one is summed");
template <class Score>
constexpr int kMostRows = kGroupBytes / static_cast<int>(sizeof(Score));
// Rows of an image that are on chip or on their way: of int16 scores in one block that has room for them; else fewer.
constexpr int kStages = BAM_STAGES, kFewStages = 4;
static_assert(kFewStages <= kStages, "the scratch has an arrival for each stage");
static_assert(kGroups <= kStages, "the scratch has an arrival for each stage, which groups use too");
static_assert(kStages <= 32, "each arrival is begun by one thread, and a block may be one warp");
// Of the reductions of a row: two sets of what warps and blocks have, and of arrivals; then arrivals of the stages.
constexpr int kPartsBytes = (2 * kMostThreads / 32 + 2 * kMostCluster) * 4 * 4;
constexpr int kArrivals = 2 + kStages, kScratchBytes = kPartsBytes + (kArrivals + 1) / 2 * 16;

// Which columns are positives: row i is of image (first + i % period) % B.
struct Positives {
  bool masked;
  int64_t first, period, B, T, own_columns;
};

// bam::ColumnLse in chunks of `rows` rows. Several go into partial[0] and [1] (chunks, n), which are then merged. As
// the epilogue of a product (fixed not null) the scores are float32, bias (n) is added where it is not null, positives
// are masked, and int16 scores are written, whose values are the ones summed. shift null: no sums.
struct ColumnLse {
  Scores scores;
  int64_t m, n;
  Scalar scale;
  Potential row;
  float* shift;
  float* sum;
  bool accumulate;
  float* partial;
  int64_t rows;
  const float* bias;
  int16_t* fixed;
  int64_t fixed_stride;
  Scalar step;
  Positives positives;
};

// How whole rows are spread over blocks: `cluster` blocks of `threads` threads hold a row, whose n columns are no more
// than kOwned * threads * cluster.
struct Team {
  int threads, cluster;
};

// bam::SinkhornPass in one read of rows that fit on chip, in chunks of `rows` rows, whole groups, each into
// partial (chunks, n), which is then added up; with `divide`, then col <- col / c.
struct SinkhornPass {
  Scores scores;
  int64_t m, n;
  Scalar scale;
  Potential row, col;
  float* c;
  bool accumulate, divide;
  float* partial;
  int64_t rows;
  Team team;
  int group;  // rows: kMostRows, or half of them
};

// The row half of it for rows of any length: row_i = 1 / sum_j 2^(scale*s_ij) * col_j.
struct RowStep {
  Scores scores;
  int64_t m, n;
  Scalar scale;
  Potential row, col;
};

// All iterations of small problems in one launch of one cluster, the scores in its shared memory: the first column step
// from `row`, then iterations - 1 passes, each followed by col <- col / c. `rows` rows a block, a multiple of 4; no
// more than 1024 columns.
struct SinkhornOnChip {
  Scores scores;
  int64_t m, n;
  Scalar scale;
  Potential row, col;
  float* c;
  int64_t rows;
  int cluster;
  int iterations;
};

// bam::Match with the sums of image i at sums[i], sums[sums_stride + i] and sums[2*sums_stride + i]: loss, target
// entropy, source entropy. The gradient may be of any float type, and in place of scores of its size.
struct Match {
  Scores target, source;
  int64_t L, V, b, n, W, T, B, top_k;
  Scalar target_scale, source_scale, score_over_tau;
  float gradient_scale, pair_weight;
  const float* row_exponent;
  int64_t row_view_stride;
  Potential col;
  float* sums;
  int64_t sums_stride;
  float* targets;
  int64_t targets_view_stride;
  Potential row_out;
  void* gradient;
  FloatType gradient_type;
  int64_t gradient_view_stride, gradient_row_stride;
  Team team;     // rows on chip; threads 0: rows of any length, which are read once for every sum
  int stages;    // kStages, which int16 scores in one block may have, or kFewStages
  float* means;  // (b, n) workspace of long rows with top_k
};

struct PlanProducts {
  Scores scores;
  int64_t m, n;
  Scalar scale;
  Potential row, col;
  const float* v;
  const float* u;
  float* y;
  float* w;
  bool accumulate;  // w is added to; with u null and w given, u is 1
  float* partial;   // (chunks, n)
  int64_t rows;     // of a chunk
};

struct PlanSubtract {
  Scores scores;
  int64_t m, n;
  Scalar scale;
  Potential row, col;
  const float* u;
  const float* v;
  float* x;
  int64_t x_stride;
};

// Unit rows times 64 sit in the middle of fp16's range: the smallest entry that matters stays normal.
constexpr float kUnitScale = 64.0f;

// read_i = u_i = x_i / max(|x_i|, 1e-12) in float32, norm_i = |x_i|. With a centre read_i = 64 (u_i - centre) in fp16,
// bias_i = 64^2 <u_i - centre, centre>, and the row potential is 2^(scale * <u_i, centre>). read null: the norms alone.
// With a centre the first sent_rows rows are also written as a message to other ranks: read_i, zeros, and bias_i in the
// last kBiasColumns of sent_columns.
constexpr int64_t kBiasColumns = 2;
struct Normalize {
  Rows x;
  int64_t m, d;
  const float* centre;
  void* read;  // (m, d)
  double* norm;
  float* bias;
  double scale;
  Potential row;
  void* sent;
  int64_t sent_columns, sent_rows;
};

// mean_k = the mean over i of x_ik / max(norm_i, 1e-12), in float32, divided by `ranks`: what this rank adds to the
// mean of all ranks' rows.
struct MeanRow {
  Rows x;
  const double* norm;  // (m), or null: 1
  int64_t m, d, ranks;
  float* mean;  // (d)
};

// The product of rows and keys, bias added, that is one step of fixed point: kFixedSteps of them hold every one. With
// a = max_j |k'_j| and b = max_i |z'_i| both |s| <= a and |s| <= a b + max_j |bias_j| hold; unit rows have
// |u_i - centre|^2 = 1 - |centre|^2 - 2 bias_i / 64^2.
struct ProductStep {
  const float* centre;      // (d)
  const float* key_bias;    // (n)
  const float* row_bias;    // (m)
  const float* other_bias;  // (other) of further rows, or null: there are none
  int64_t d, n, m, other;
  float* step;
};
constexpr double kFixedSteps = 32000.0;

// The row potential 2^(scale * <read_i, centre>) of float32 rows.
struct CentrePotential {
  const float* read;  // (m, d)
  int64_t m, d;
  const float* centre;
  double scale;
  Potential row;
};

// d_i <- factor * (d_i - u_i <u_i, d_i>) / norm_i with u_i = x_i / norm_i, and 0 where norm_i < 1e-12.
struct Project {
  float* d;
  Rows x;
  const double* norm;
  float factor;
  int64_t m, d_features;
};

struct Symmetrize {
  void* G;         // (m, m)
  FloatType type;  // float32 or fp16
  int64_t m, stride;
  float* column_sums;  // (m), of G before
  float* partial;      // (ceil(m/32), m)
};

struct MaskPositives {
  float* scores;
  int64_t m, row_stride;
  Positives positives;
};

struct ReciprocalPotential {
  const float* shift;
  const float* sum;
  Potential col;
  int64_t n;
};

// total_j = sum_j * 2^(shift_j - common): column sums that can be added up over ranks.
struct ColumnTotals {
  const float* shift;
  const float* sum;
  float common;
  double* total;  // (n)
  int64_t n;
};

// The column potential 1 / (total_j * 2^common); 1 for an empty column.
struct TotalPotential {
  const double* total;
  float common;
  Potential col;
  int64_t n;
};

struct DividePotential {
  Potential col;
  const float* c;
  int64_t n;
};

// The loss and its statistics in the order of BAMStats, from what images, columns and rows have.
struct LossAndStats {
  const float* images;  // (3, images) of one slab or several: their loss, target entropy and source entropy
  int64_t count;        // of them
  const float* c;       // (n) the column sums before the last column step
  int64_t n;
  const double* norm;  // (m) of rows, or null: one that is not finite spoils all
  int64_t m;
  int64_t B, L, V;
  double uniform_loss;
  float* loss;   // (1)
  float* stats;  // (6)
};

struct Kernels {
  void (*column_lse)(const ColumnLse&, const Where&);
  void (*sinkhorn_pass)(const SinkhornPass&, const Where&);
  void (*row_step)(const RowStep&, const Where&);
  void (*sinkhorn_on_chip)(const SinkhornOnChip&, const Where&);
  void (*match)(const Match&, const Where&);
  void (*plan_products)(const PlanProducts&, const Where&);
  void (*plan_subtract)(const PlanSubtract&, const Where&);
  void (*normalize)(const Normalize&, const Where&);
  void (*mean_row)(const MeanRow&, const Where&);
  void (*product_step)(const ProductStep&, const Where&);
  void (*centre_potential)(const CentrePotential&, const Where&);
  void (*project)(const Project&, const Where&);
  void (*symmetrize)(const Symmetrize&, const Where&);
  void (*mask_positives)(const MaskPositives&, const Where&);
  void (*reciprocal_potential)(const ReciprocalPotential&, const Where&);
  void (*column_totals)(const ColumnTotals&, const Where&);
  void (*total_potential)(const TotalPotential&, const Where&);
  void (*divide_potential)(const DividePotential&, const Where&);
  void (*loss_and_stats)(const LossAndStats&, const Where&);
};

extern const Kernels kernels;

}  // namespace bam::cuda
