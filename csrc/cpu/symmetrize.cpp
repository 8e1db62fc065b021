// G <- G + transpose(G) in place, and its row sums.
//
// Where the keys are the rows themselves, dz = G k + transpose(G) z is one product with the sum: a third of the
// gradient's and the score's arithmetic is saved for one pass over G.
#include "kernels.h"

namespace bam::cpu::BAM_ISA {
namespace {

constexpr int64_t kTile = 64;

struct Tile {
  float values[kTile][kTile];
};

void load_tile(const float* G, int64_t stride, int64_t rows, int64_t columns, Tile& tile) {
  for (int64_t r = 0; r < rows; ++r) memcpy(tile.values[r], G + r * stride, columns * sizeof(float));
}

void store_tile(float* G, int64_t stride, int64_t rows, int64_t columns, const Tile& tile) {
  for (int64_t r = 0; r < rows; ++r) memcpy(G + r * stride, tile.values[r], columns * sizeof(float));
}

void transpose(const Tile& from, Tile& to) {
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t c = 0; c < kTile; ++c) to.values[c][r] = from.values[r][c];
}

// sums[c] = sum over the tile's rows: a chain of vectors, where the sum of a row would be a chain of scalars.
void column_sums(const Tile& tile, int64_t columns, float* sums) {
  float totals[kTile] = {};
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t c = 0; c < kTile; ++c) totals[c] += tile.values[r][c];
  memcpy(sums, totals, columns * sizeof(float));
}

// The pair of tiles (I, J) and (J, I), or the diagonal tile. Entries beyond G are 0.
void add_transposed(const Symmetrize& p, int64_t I, int64_t J, int64_t tiles, float* partial) {
  const int64_t i = I * kTile, j = J * kTile;
  const int64_t rows = p.m - i < kTile ? p.m - i : kTile, columns = p.m - j < kTile ? p.m - j : kTile;
  float* upper = p.G + i * p.stride + j;
  float* lower = p.G + j * p.stride + i;
  Tile a{}, b{}, b_transposed;
  load_tile(upper, p.stride, rows, columns, a);
  load_tile(lower, p.stride, columns, rows, b);
  transpose(b, b_transposed);
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t c = 0; c < kTile; ++c) a.values[r][c] += b_transposed.values[r][c];
  transpose(a, b);
  store_tile(upper, p.stride, rows, columns, a);
  if (I != J) store_tile(lower, p.stride, columns, rows, b);
  column_sums(b, rows, partial + (I * tiles + J) * kTile);
  column_sums(a, columns, partial + (J * tiles + I) * kTile);
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
      for (int64_t J = pair[q]; J < tiles; ++J) add_transposed(p, pair[q], J, tiles, partial.data);
  }
  for (int64_t i = 0; i < p.m; ++i) {
    const float* of_row = partial.data + (i / kTile) * tiles * kTile + i % kTile;
    float total = 0.0f;
    for (int64_t J = 0; J < tiles; ++J) total += of_row[J * kTile];
    p.row_sums[i] = total;
  }
}

}  // namespace bam::cpu::BAM_ISA
