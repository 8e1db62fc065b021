// Products of float32 matrices on the tile units (AMX) of a processor: each number is cut into two bf16 parts,
// x = high + low, and a product is high*high + high*low + low*high, summed in float32. What is left out is at most
// 2^-15 |a||b| for a row of a and a column of b: low*low, and the rest of each number beyond both parts.
//
// Numbers must be below 3.38e38, the largest bf16 number. Tiles take numbers below 2^-126 as 0, so products of size
// 1e-36 lose their low parts.
//
// Compiled for AMX and AVX-512 with BF16; dispatch.cpp offers it where a processor has them.
#include <omp.h>

#include "simd.h"

namespace bam::cpu::BAM_ISA {

namespace {

constexpr int64_t kRows = 16;               // rows of a tile
constexpr int64_t kDepth = 32;              // bf16 numbers in a row of a tile
constexpr int64_t kTile = kRows * kDepth;   // bf16 numbers of a tile
constexpr int64_t kBand = 2 * kRows;        // rows of two tiles, whose products with two tiles are summed at once
constexpr int64_t kStep = 4 * kTile;        // a band's numbers of one depth: two tiles of high parts, two of low
constexpr int64_t kBlockDepth = 512;        // depth of sums in tiles; such sums are added in memory, in order
constexpr int64_t kBlockRows = 256;         // most rows of `a` that a thread packs at once
constexpr int64_t kBlockBytes = 512 << 10;  // and most memory for them: they stay in the L2 cache
constexpr int64_t kBlockColumns = 1024;     // least columns for which it is worth packing rows of `a` again
constexpr int64_t kPackedBytes = 16 << 20;  // most memory for packed columns of `b`
constexpr int64_t kPackedDepth = 2048;      // most depth of such columns
static_assert(kRows == kLanes, "a row of a tile fills a vector");
static_assert(kPackedDepth % kBlockDepth == 0 && kBlockDepth % kDepth == 0, "blocks are whole steps");

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// What every tile register holds: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// x rounded to bf16, as a float.
BAM_INLINE __m512 rounded(__m512 x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

// Two vectors as bf16, the first in the lower half.
BAM_INLINE vfloat joined(__m512 first, __m512 second) {
  return (vfloat)_mm512_cvtne2ps_pbh(second, first);
}

// A number of each half in turn.
BAM_INLINE vfloat interleaved(vfloat halves) {
  alignas(64) static const int16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vfloat)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)halves);
}

BAM_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : count > 0 ? (__mmask16)((1 << count) - 1) : 0;
}

// The high and the low parts of up to 16 rows and 32 numbers of each, from row i and number k on, zeros beyond them.
// Rows of `a` are rows of a tile; rows of `b` are columns, whose numbers go through a tile in pairs.
template <bool is_b>
BAM_INLINE void pack_tile(const Factor& x, int64_t i, int64_t rows, int64_t k, int64_t depth, uint16_t* out) {
  vfloat high[kRows], low[kRows];
  const float* from = x.data + i * x.row_stride + k * x.depth_stride;
  const bool by_rows = x.depth_stride == 1;
  for (int64_t r = 0; r < kRows; ++r) {
    __m512 first = _mm512_setzero_ps(), second = first;
    if (by_rows && r < rows) {
      first = _mm512_maskz_loadu_ps(first_lanes(depth), from + r * x.row_stride);
      second = _mm512_maskz_loadu_ps(first_lanes(depth - kLanes), from + r * x.row_stride + kLanes);
    } else if (!by_rows) {
      if (2 * r < depth) first = _mm512_maskz_loadu_ps(first_lanes(rows), from + 2 * r * x.depth_stride);
      if (2 * r + 1 < depth) second = _mm512_maskz_loadu_ps(first_lanes(rows), from + (2 * r + 1) * x.depth_stride);
    }
    high[r] = joined(first, second);
    low[r] = joined(_mm512_sub_ps(first, rounded(first)), _mm512_sub_ps(second, rounded(second)));
    if (!by_rows) high[r] = interleaved(high[r]), low[r] = interleaved(low[r]);
  }
  if (by_rows == is_b) transpose(high), transpose(low);
  for (int64_t r = 0; r < kRows; ++r) {
    memcpy(out + r * kDepth, &high[r], sizeof high[r]);
    memcpy(out + 2 * kTile + r * kDepth, &low[r], sizeof low[r]);
  }
}

// Bands of rows i .. i + rows - 1, for numbers k .. k + depth - 1: step by step of 32 numbers.
template <bool is_b>
void pack(const Factor& x, int64_t i, int64_t rows, int64_t k, int64_t depth, uint16_t* out, int64_t band) {
  for (int64_t d = 0; d < depth; d += kDepth)
    for (int64_t r = 0; r < divide_up(rows, kBand) * kBand; r += kRows)
      pack_tile<is_b>(x, i + r, rows - r, k + d, depth - d,
                      out + r / kBand * band + d / kDepth * kStep + r % kBand * kDepth);
}

// Pieces in which rows are packed so that memory is read line after line: bands of rows, or steps of the depth.
int64_t pieces_of(const Factor& x, int64_t rows, int64_t depth) {
  return x.depth_stride == 1 ? divide_up(rows, kBand) : divide_up(depth, kDepth);
}

template <bool is_b>
void pack_piece(const Factor& x, int64_t i, int64_t rows, int64_t k, int64_t depth, uint16_t* out, int64_t band,
                int64_t piece) {
  if (x.depth_stride == 1) {
    const int64_t r = piece * kBand;
    pack<is_b>(x, i + r, least(rows - r, kBand), k, depth, out + piece * band, band);
  } else {
    const int64_t d = piece * kDepth;
    pack<is_b>(x, i, rows, k + d, least(depth - d, kDepth), out + piece * kStep, band);
  }
}

// Tiles 0 to 3 += tiles 4 and 5 (rows of a band of `a`) times tiles 6 and 7 (columns of a band of `b`).
BAM_INLINE void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Tiles 0 to 3 += a band of `a` times a band of `b`. Each product keeps the tiles of one factor of the last product.
BAM_INLINE void multiply_bands(const uint16_t* a, const uint16_t* b, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s, a += kStep, b += kStep) {
    _tile_loadd(4, a + 2 * kTile, 64);
    _tile_loadd(5, a + 3 * kTile, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTile, 64);
    multiply_tiles();  // low * high
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + kTile, 64);
    multiply_tiles();  // high * high
    _tile_loadd(6, b + 2 * kTile, 64);
    _tile_loadd(7, b + 3 * kTile, 64);
    multiply_tiles();  // high * low
  }
}

// Copy a square of up to 32 x 32 floats.
BAM_INLINE void copy(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                     int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) memcpy(to + r * to_stride, from + r * from_stride, columns * sizeof(float));
}

// A whole square of 32 x 32 floats to memory, past the caches, which need not read what is overwritten.
BAM_INLINE void stream(const float* square, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < kBand; ++r)
    for (int64_t c = 0; c < kBand; c += kLanes)
      _mm512_stream_ps(to + r * to_stride + c, _mm512_load_ps(square + r * kBand + c));
}

BAM_INLINE bool is_aligned(const float* p, int64_t stride) {
  return (uintptr_t)p % 64 == 0 && stride % kLanes == 0;
}

// A square of the result, up to 32 x 32, from bands of `steps` steps. is_last: nothing will be added to it.
BAM_INLINE void write_square(const uint16_t* a, const uint16_t* b, int64_t steps, float* out, int64_t stride,
                             int64_t rows, int64_t columns, bool add, bool is_last) {
  alignas(64) float square[kBand * kBand];
  const bool is_whole = rows == kBand && columns == kBand;
  const bool streams = is_whole && is_last && !add && is_aligned(out, stride);
  float* to = is_whole && !streams ? out : square;
  const int64_t to_stride = to == out ? stride : kBand, bytes = to_stride * (int64_t)sizeof(float);
  if (add) {
    if (!is_whole) copy(out, stride, square, kBand, rows, columns);
    _tile_loadd(0, to, bytes);
    _tile_loadd(1, to + kRows, bytes);
    _tile_loadd(2, to + kRows * to_stride, bytes);
    _tile_loadd(3, to + kRows * to_stride + kRows, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  multiply_bands(a, b, steps);
  _tile_stored(0, to, bytes);
  _tile_stored(1, to + kRows, bytes);
  _tile_stored(2, to + kRows * to_stride, bytes);
  _tile_stored(3, to + kRows * to_stride + kRows, bytes);
  if (streams) stream(square, out, stride);
  else if (!is_whole) copy(square, kBand, out, stride, rows, columns);
}

// How a product is cut into blocks. Every number of the result is summed in one order, whatever the blocks are.
struct Blocks {
  Blocks(int64_t m, int64_t n, int64_t depth, int threads) {
    this->depth = least(depth, kPackedDepth);
    steps = divide_up(this->depth, kDepth);
    const int64_t band_bytes = steps * kStep * (int64_t)sizeof(uint16_t);
    const int64_t bands = least(divide_up(n, kBand), kPackedBytes / band_bytes);
    columns = bands * kBand;
    packed_b = bands * steps * kStep;

    const int64_t wanted = 2 * threads;  // tasks, so that threads end together
    rows = kBlockRows;
    const int64_t steps_of_block = least(steps, kBlockDepth / kDepth);
    const int64_t row_bytes = steps_of_block * kStep / kBand * (int64_t)sizeof(uint16_t);
    while (rows > kBand && (divide_up(m, rows) < wanted || rows * row_bytes > kBlockBytes)) rows /= 2;
    packed_a = rows / kBand * steps_of_block * kStep;
    const int64_t groups = least(divide_up(wanted, divide_up(m, rows)), divide_up(columns, kBlockColumns));
    task_columns = divide_up(divide_up(columns, groups), kBand) * kBand;
  }
  int64_t depth, columns;      // of `b` that are packed at once
  int64_t steps;               // of that depth
  int64_t rows, task_columns;  // of the result that one thread computes at once
  int64_t packed_a, packed_b;  // bf16 numbers of a task's rows and of the packed columns
};

// Rows i .. and columns j .. of the result, from the numbers k .. k + depth - 1 of rows of `a` and the bands of `b`.
void write_block(const Product& p, int64_t i, int64_t rows, int64_t j, int64_t columns, int64_t k, int64_t depth,
                 const uint16_t* b, int64_t band_of_b, uint16_t* a) {
  for (int64_t d = 0; d < depth; d += kBlockDepth, b += kBlockDepth / kDepth * kStep) {
    const int64_t block = least(depth - d, kBlockDepth), steps = divide_up(block, kDepth);
    for (int64_t piece = 0; piece < pieces_of(p.a, rows, block); ++piece)
      pack_piece<false>(p.a, i, rows, k + d, block, a, steps * kStep, piece);
    for (int64_t c = 0; c < columns; c += kBand)
      for (int64_t r = 0; r < rows; r += kBand)
        write_square(a + r / kBand * steps * kStep, b + c / kBand * band_of_b, steps,
                     p.out + (i + r) * p.out_stride + j + c, p.out_stride, least(rows - r, kBand),
                     least(columns - c, kBand), p.add || k + d > 0, k + d + block == p.depth);
  }
}

int64_t product_bytes(int64_t m, int64_t n, int64_t depth, int threads) {
  const Blocks blocks(m, n, depth, threads);
  return (blocks.packed_b + threads * blocks.packed_a) * (int64_t)sizeof(uint16_t);
}

void product(const Product& p) {
  const Blocks blocks(p.m, p.n, p.depth, p.threads);
  const int64_t band_of_b = blocks.steps * kStep;
  uint16_t* b = (uint16_t*)p.workspace;
#pragma omp parallel num_threads(p.threads)
  {
    const TileConfig config;
    _tile_loadconfig(&config);
    uint16_t* a = b + blocks.packed_b + omp_get_thread_num() * blocks.packed_a;
    for (int64_t j = 0; j < p.n; j += blocks.columns) {
      const int64_t columns = least(p.n - j, blocks.columns);
      for (int64_t k = 0; k < p.depth; k += blocks.depth) {
        const int64_t depth = least(p.depth - k, blocks.depth);
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces_of(p.b, columns, depth); ++piece)
          pack_piece<true>(p.b, j, columns, k, depth, b, band_of_b, piece);
#pragma omp for schedule(static) collapse(2)
        for (int64_t i = 0; i < p.m; i += blocks.rows)
          for (int64_t c = 0; c < columns; c += blocks.task_columns)
            write_block(p, i, least(p.m - i, blocks.rows), j + c, least(columns - c, blocks.task_columns), k, depth,
                        b + c / kBand * band_of_b, band_of_b, a);
      }
    }
    _tile_release();
    _mm_sfence();  // streamed numbers, before other threads read them
  }
}

}  // namespace

extern const SplitProducts split_products;
const SplitProducts split_products = {product_bytes, product};

}  // namespace bam::cpu::BAM_ISA
