// G <- G + transpose(G) in place, and the column sums that G had.
//
// Where the keys are the rows themselves, dz = G k + transpose(G) z is one product with the sum, for one pass over G.
// On one rank whose views are all keys, this saves a third of the gradient's and the scores' arithmetic.
#include "kernels.h"

namespace bam::cpu::BAM_ISA {
namespace {

constexpr int64_t kTile = 64;
static_assert(kTile % kLanes == 0, "tiles are whole squares of kLanes rows");

// The rows of a square of G, up to kLanes of them; entries beyond `rows` and `columns` are 0.
BAM_INLINE void load_square(const float* G, int64_t stride, int64_t rows, int64_t columns, vfloat (&square)[kLanes]) {
  if (rows == kLanes && columns == kLanes) {
    for (int64_t r = 0; r < kLanes; ++r) square[r] = load(G + r * stride, Full{});
  } else {
    for (int64_t r = 0; r < kLanes; ++r) square[r] = r < rows ? load(G + r * stride, Tail{columns}) : splat(0.0f);
  }
}

BAM_INLINE void store_square(float* G, int64_t stride, int64_t rows, int64_t columns, const vfloat (&square)[kLanes]) {
  if (rows == kLanes && columns == kLanes) {
    for (int64_t r = 0; r < kLanes; ++r) store(G + r * stride, square[r], Full{});
  } else {
    for (int64_t r = 0; r < rows; ++r) store(G + r * stride, square[r], Tail{columns});
  }
}

BAM_INLINE vfloat column_sums(const vfloat (&square)[kLanes]) {
  vfloat total = square[0];
  for (int64_t r = 1; r < kLanes; ++r) total += square[r];
  return total;
}

BAM_INLINE void add_to(float* sums, vfloat x) {
  store(sums, load(sums, Full{}) + x, Full{});
}

// The squares at (i, j) and (j, i), or the one on the diagonal.
void add_transposed(const Symmetrize& p, int64_t i, int64_t j, float* sums_i, float* sums_j) {
  const int64_t rows = p.m - i < kLanes ? p.m - i : kLanes, columns = p.m - j < kLanes ? p.m - j : kLanes;
  float* upper = p.G + i * p.stride + j;
  float* lower = p.G + j * p.stride + i;
  vfloat a[kLanes], b[kLanes];
  load_square(upper, p.stride, rows, columns, a);
  load_square(lower, p.stride, columns, rows, b);
  add_to(sums_i, column_sums(b));
  if (i != j) add_to(sums_j, column_sums(a));
  transpose(b);
  for (int64_t r = 0; r < kLanes; ++r) a[r] += b[r];
  store_square(upper, p.stride, rows, columns, a);
  if (i == j) return;
  transpose(a);
  store_square(lower, p.stride, columns, rows, a);
}

// The pair of tiles (I, J) and (J, I), or the tile on the diagonal, and the sums of their columns.
void add_transposed_tiles(const Symmetrize& p, int64_t I, int64_t J, int64_t tiles, float* partial) {
  const int64_t first_i = I * kTile, first_j = J * kTile;
  float* sums_i = partial + (I * tiles + J) * kTile;
  float* sums_j = partial + (J * tiles + I) * kTile;
  memset(sums_i, 0, kTile * sizeof(float));
  memset(sums_j, 0, kTile * sizeof(float));
  for (int64_t i = 0; i < kTile && first_i + i < p.m; i += kLanes)
    for (int64_t j = I == J ? i : 0; j < kTile && first_j + j < p.m; j += kLanes)
      add_transposed(p, first_i + i, first_j + j, sums_i + i, sums_j + j);
}

}  // namespace

void symmetrize(const Symmetrize& p) {
  const int64_t tiles = (p.m + kTile - 1) / kTile;
  Buffer partial(tiles * tiles * kTile);
  // Row I of the upper triangle has tiles - I tiles; rows I and tiles - 1 - I together always the same number.
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t half = 0; half < (tiles + 1) / 2; ++half) {
    const int64_t pair[2] = {half, tiles - 1 - half};
    for (int q = 0; q < (pair[0] == pair[1] ? 1 : 2); ++q)
      for (int64_t J = pair[q]; J < tiles; ++J) add_transposed_tiles(p, pair[q], J, tiles, partial.data);
  }
  for_columns(p.m, [&](int64_t i, auto part) {
    const float* of_tiles = partial.data + (i / kTile) * tiles * kTile + i % kTile;
    vfloat total = splat(0.0f);
    for (int64_t J = 0; J < tiles; ++J) total += load(of_tiles + J * kTile, Full{});
    store(p.column_sums + i, total, part);
  });
}

}  // namespace bam::cpu::BAM_ISA
