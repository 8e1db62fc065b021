// One vector of BAM_LANES floats and the operations the kernels need. Included once per instruction set, into a
// namespace of its own: objects of different instruction sets must not share an inline function, because the linker
// keeps one copy of it, and nothing here may use the standard library for the same reason.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../bam.h"

#define BAM_INLINE static inline __attribute__((always_inline))

namespace bam::cpu::BAM_ISA {

constexpr int64_t kLanes = BAM_LANES;
typedef float vfloat __attribute__((vector_size(4 * BAM_LANES)));
typedef int32_t vint __attribute__((vector_size(4 * BAM_LANES)));
typedef int16_t vshort __attribute__((vector_size(2 * BAM_LANES)));

BAM_INLINE vfloat splat(float x) {
  return x - vfloat{};
}

BAM_INLINE vint bits(vfloat x) {
  return (vint)x;
}

#if defined(__AVX512F__) && BAM_LANES == 16
BAM_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
BAM_INLINE vfloat max(vfloat a, vfloat b) {
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
}
BAM_INLINE vfloat min(vfloat a, vfloat b) {
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
}
#elif defined(__FMA__) && BAM_LANES == 8
BAM_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
BAM_INLINE vfloat max(vfloat a, vfloat b) {
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
}
BAM_INLINE vfloat min(vfloat a, vfloat b) {
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
}
#elif defined(__aarch64__) && BAM_LANES == 4
BAM_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
BAM_INLINE vfloat max(vfloat a, vfloat b) {
  return (vfloat)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
}
BAM_INLINE vfloat min(vfloat a, vfloat b) {
  return (vfloat)vminq_f32((float32x4_t)a, (float32x4_t)b);
}
#else
// Without a fused instruction: the product in two halves of 12 bits, so that score * scale + exponent still rounds
// at the size of the sum. Callers rely on that, see Potential in bam.h.
BAM_INLINE vfloat upper_half(vfloat x) {
  return (vfloat)(bits(x) & (int32_t)0xfffff000);
}
BAM_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  const vfloat a1 = upper_half(a), b1 = upper_half(b);
  const vfloat a2 = a - a1, b2 = b - b1;
  return ((a1 * b1 + c) + (a1 * b2 + a2 * b1)) + a2 * b2;
}
BAM_INLINE vfloat max(vfloat a, vfloat b) {
  return a > b ? a : b;
}
BAM_INLINE vfloat min(vfloat a, vfloat b) {
  return a < b ? a : b;
}
#endif

// Columns j .. j + count - 1, a full vector or the tail of a row.
struct Full {
  static constexpr int64_t count = kLanes;
};
struct Tail {
  int64_t count;
};

BAM_INLINE vfloat load(const float* p, Full) {
  vfloat x;
  memcpy(&x, p, sizeof x);
  return x;
}
BAM_INLINE vfloat load(const float* p, Tail tail, float fill = 0.0f) {
  vfloat x = splat(fill);
  memcpy(&x, p, tail.count * sizeof(float));
  return x;
}
BAM_INLINE void store(float* p, vfloat x, Full) {
  memcpy(p, &x, sizeof x);
}
BAM_INLINE void store(float* p, vfloat x, Tail tail) {
  memcpy(p, &x, tail.count * sizeof(float));
}

// Bring what is at p into the second-level cache, wherever it points.
BAM_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

// In its scope, results of this thread below 2^-126 are 0. Subnormal numbers, common where scores spread widely, take
// x86 processors a hundred cycles each.
struct FlushSubnormals {
#if defined(__x86_64__)
  FlushSubnormals() : before(_mm_getcsr()) { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before); }
  unsigned before;
#else
  FlushSubnormals() {}  // not trivial, so that no compiler finds the variable unused
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// kDoubles floats as doubles. gcc 12 converts a vector two lanes at a time where no instruction is named.
constexpr int64_t kDoubles = kLanes / 2;
typedef double vdouble __attribute__((vector_size(4 * BAM_LANES)));
BAM_INLINE vdouble load_doubles(const float* p) {
#if defined(__AVX512F__) && BAM_LANES == 16
  return (vdouble)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX__) && BAM_LANES == 8
  return (vdouble)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  typedef float vhalf __attribute__((vector_size(2 * BAM_LANES)));
  vhalf x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vdouble);
#endif
}

// Scores as floats; masked ones, and the lanes beyond a tail, as kMaskedScore.
BAM_INLINE vfloat load_scores(const float* p, Full full) {
  return load(p, full);
}
BAM_INLINE vfloat load_scores(const float* p, Tail tail) {
  return load(p, tail, kMaskedScore);
}
BAM_INLINE vfloat from_fixed(vshort q) {
#if defined(__AVX512BW__) && defined(__AVX512VL__) && BAM_LANES == 16
  const __mmask16 attended = _mm256_cmpneq_epi16_mask((__m256i)q, _mm256_set1_epi16(kMaskedFixed));
  return (vfloat)_mm512_mask_cvtepi32_ps((__m512)splat(kMaskedScore), attended, _mm512_cvtepi16_epi32((__m256i)q));
#else
  const vfloat x = __builtin_convertvector(__builtin_convertvector(q, vint), vfloat);
  return x == splat(kMaskedFixed) ? splat(kMaskedScore) : x;
#endif
}
BAM_INLINE vfloat load_scores(const int16_t* p, Full) {
  vshort q;
  memcpy(&q, p, sizeof q);
  return from_fixed(q);
}
BAM_INLINE vfloat load_scores(const int16_t* p, Tail tail) {
  vshort q = kMaskedFixed - vshort{};
  memcpy(&q, p, tail.count * sizeof(int16_t));
  return from_fixed(q);
}

// body(j, part) for every vector of columns first <= j < last.
template <class Body>
BAM_INLINE void for_columns(int64_t first, int64_t last, Body body) {
  int64_t j = first;
  for (; j + kLanes <= last; j += kLanes) body(j, Full{});
  if (j < last) body(j, Tail{last - j});
}
template <class Body>
BAM_INLINE void for_columns(int64_t n, Body body) {
  for_columns(0, n, body);
}

// Row sums are taken panel by panel in float and the panels added in double: the error does not grow with the row.
constexpr int64_t kPanel = 1024;
BAM_INLINE int64_t panel_end(int64_t first, int64_t n) {
  return first + kPanel < n ? first + kPanel : n;
}

// 2^x for `count` vectors, relative error below 2e-7, with AVX-512 below 9e-8; 0 below -127 with FlushSubnormals, 0
// below -150 without; 2^127 or infinity above. The vectors go side by side: each is a chain of dependent instructions.
#if defined(__AVX512DQ__) && BAM_LANES == 16
// 2^x = 2^floor(x) * 2^r with r = x - floor(x) in [0, 1]: one instruction gives r, another scales. The polynomial is
// the minimax fit on [0, 1] among float coefficients with value 1 at 0.
template <int count>
BAM_INLINE void exp2(vfloat (&x)[count]) {
  constexpr float kCoefficients[] = {0x1.47373ap-10f, 0x1.3cfd82p-7f, 0x1.c68af6p-5f,
                                     0x1.ebfd3ap-3f,  0x1.62e42cp-1f, 1.0f};
  vfloat r[count], p[count];
  for (int q = 0; q < count; ++q) r[q] = (vfloat)_mm512_reduce_ps((__m512)x[q], _MM_FROUND_TO_NEG_INF);
  for (int q = 0; q < count; ++q) p[q] = splat(0x1.c4456ep-13f);
  for (const float coefficient : kCoefficients)
    for (int q = 0; q < count; ++q) p[q] = fma(p[q], r[q], splat(coefficient));
  for (int q = 0; q < count; ++q) x[q] = (vfloat)_mm512_scalef_ps((__m512)p[q], (__m512)x[q]);
}
#else
// Adding the magic number leaves round(x) + 127 in the low bits, which shifted up are the float 2^round(x), and the
// float 0 for -127. The polynomial is the minimax fit on [-1/2, 1/2] among float coefficients.
template <int count>
BAM_INLINE void exp2(vfloat (&xs)[count]) {
  const vfloat magic = splat(12582912.0f + 127.0f);
  for (int q = 0; q < count; ++q) {
    const vfloat x = min(max(xs[q], splat(-127.0f)), splat(127.0f));
    const vfloat rounded = x + magic;
    const vfloat r = x - (rounded - magic);
    const vfloat r2 = r * r;
    const vfloat p01 = fma(splat(0x1.62e42cp-1f), r, splat(1.0f));
    const vfloat p23 = fma(splat(0x1.c6b5e6p-5f), r, splat(0x1.ebf9b8p-3f));
    const vfloat p45 = fma(splat(0x1.5c1480p-10f), r, splat(0x1.3ceb68p-7f));
    const vfloat p = fma(fma(p45, r2, p23), r2, p01);
    xs[q] = p * (vfloat)(bits(rounded) << 23);
  }
}
#endif
BAM_INLINE vfloat exp2(vfloat x) {
  vfloat one[1] = {x};
  exp2(one);
  return one[0];
}

// log2 of normal x > 0, absolute error below 1e-7 for x in [1/2, 2]; an infinite or NaN x gives no meaningful number.
// With x = 2^e m, m in [sqrt(1/2), sqrt(2)), and r = (m - 1) / (m + 1): log2(m) = 2/ln2 * (r + r^3/3 + r^5/5 + ...).
BAM_INLINE vfloat log2(vfloat x) {
  const vint e = (bits(x) - 0x3f3504f3) >> 23;
  const vfloat m = (vfloat)(bits(x) - (e << 23));
  const vfloat r = (m - 1.0f) / (m + 1.0f), r2 = r * r;
  vfloat p = fma(splat(0x1.484b14p-2f), r2, splat(0x1.a61762p-2f));
  p = fma(p, r2, splat(0x1.2776c6p-1f));
  p = fma(p, r2, splat(0x1.ec709ep-1f));
  return fma(p * r2, r, fma(splat(0x1.715476p+1f), r, __builtin_convertvector(e, vfloat)));
}

// x to the nearest integer where |x| < 2^22; beyond, x itself.
BAM_INLINE vfloat round(vfloat x) {
  const vfloat magic = splat(12582912.0f);
  return max(x, -x) < splat(4194304.0f) ? (x + magic) - magic : x;
}

// Indices of the lanes of a vector.
template <int... lane>
struct LaneIndices {};
#if BAM_LANES == 16
typedef LaneIndices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#elif BAM_LANES == 8
typedef LaneIndices<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#else
typedef LaneIndices<0, 1, 2, 3> AllLanes;
#endif

template <int step, int... lane>
BAM_INLINE vfloat with_lanes_at_distance(vfloat x, LaneIndices<lane...>) {
  return vfloat{x[lane ^ step]...};
}

// Sum of the lanes, by halves: a chain of 4 additions, where adding lane by lane is a chain of 16.
template <int step = BAM_LANES / 2>
BAM_INLINE float sum(vfloat x) {
  x += with_lanes_at_distance<step>(x, AllLanes{});
  if constexpr (step > 1) return sum<step / 2>(x);
  else return x[0];
}

BAM_INLINE float max(vfloat x) {
  float most = x[0];
  for (int64_t l = 1; l < kLanes; ++l) most = x[l] > most ? x[l] : most;
  return most;
}

// Whether a < b fails in a lane; it fails for NaN.
BAM_INLINE bool any_not_below(vfloat a, vfloat b) {
#if defined(__AVX512F__) && BAM_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ) != 0;
#elif defined(__AVX__) && BAM_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)) != 0;
#else
  const vint below = a < b;
  int32_t all = -1;
  for (int64_t l = 0; l < kLanes; ++l) all &= below[l];
  return all == 0;
#endif
}

// Exchange the lanes of `upper` whose index has the bit `step` with the lanes of `lower` whose index has it not.
template <int step, int... lane>
BAM_INLINE void exchange_lanes(vfloat& upper, vfloat& lower, LaneIndices<lane...>) {
  const vfloat a = upper, b = lower;
  upper = vfloat{(lane & step ? b[lane & ~step] : a[lane])...};
  lower = vfloat{(lane & step ? b[lane] : a[lane | step])...};
}

// Transpose a square of kLanes rows: each step exchanges the off-diagonal squares of `step` rows, the next does so
// within all squares.
template <int step = BAM_LANES / 2>
BAM_INLINE void transpose(vfloat (&rows)[BAM_LANES]) {
  for (int r = 0; r < BAM_LANES; ++r)
    if (!(r & step)) exchange_lanes<step>(rows[r], rows[r + step], AllLanes{});
  if constexpr (step > 1) transpose<step / 2>(rows);
}

// Floats aligned to a cache line, freed at the end of the scope. Rows are padded to whole lines, so that neighbours
// share none.
struct Buffer {
  explicit Buffer(int64_t count) : data(nullptr) {
    if (posix_memalign((void**)&data, 64, (size_t)(count > 0 ? count : 1) * sizeof(float))) abort();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data;
};

BAM_INLINE int64_t padded(int64_t n) {
  return (n + 15) / 16 * 16;
}

// Rows are summed chunk by chunk and the chunks in order, so that results do not depend on the number of threads.
struct Chunks {
  explicit Chunks(int64_t m) {
    rows = (m + 63) / 64;
    rows = rows < 32 ? 32 : (rows + 3) / 4 * 4;
    count = (m + rows - 1) / rows;
  }
  int64_t rows, count;
};

BAM_INLINE const float* row_of(const Scores& s, float, int64_t v, int64_t i) {
  return (const float*)s.data + v * s.view_stride + i * s.row_stride;
}
BAM_INLINE const int16_t* row_of(const Scores& s, int16_t, int64_t v, int64_t i) {
  return (const int16_t*)s.data + v * s.view_stride + i * s.row_stride;
}

}  // namespace bam::cpu::BAM_ISA
