// Choice of the instruction set at run time, and the work too small to need one. Compiled for the oldest processor.
#include <cmath>
#include <cstring>

#include "../bam.h"
#include "../layout.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(BAM_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bam::cpu {

namespace plain {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

const Kernels* find_kernels(const char* isa) {
  const bool any = std::strcmp(isa, "auto") == 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && (any || std::strcmp(isa, "avx512") == 0)) return &avx512::table;
  if (has_avx2 && (any || std::strcmp(isa, "avx2") == 0)) return &avx2::table;
#endif
  if (any || std::strcmp(isa, "plain") == 0) return &plain::table;
  return nullptr;
}

#if defined(BAM_WITH_AMX)
namespace amx {
extern const SplitProducts split_products;
}

namespace {

// Linux lets a process use tiles after it has asked for them. The processor must multiply bf16 tiles, and convert
// float32 to bf16.
bool has_tiles() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
  return find_kernels("avx512") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const SplitProducts* find_split_products() {
  static const bool found = has_tiles();
  return found ? &amx::split_products : nullptr;
}
#else
const SplitProducts* find_split_products() {
  return nullptr;
}
#endif

void mask_positives(const MaskPositives& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.m; ++i) {
    const int64_t image = (p.first + i % p.period) % p.B;
    float* row = p.scores + i * p.row_stride + p.own_columns;
    for (int64_t t = 0; t < p.T; ++t) row[gathered_column(t, 0, image, p.T, p.B)] = kMaskedScore;
  }
}

namespace {

// Column j's potential 1 / (sum * 2^shift); 1 for an empty column.
template <class Number>
void set_column(Potential col, int64_t j, float shift, Number sum) {
  int power = 0;
  const float mantissa = sum == 0 ? 1.0f : (float)std::frexp(sum, &power);
  col.exponent[j] = sum == 0 ? 0.0f : -shift - (float)power;
  col.mantissa[j] = 1.0f / mantissa;
}

}  // namespace

void reciprocal_potential(Potential col, const float* shift, const float* sum, int64_t n) {
  for (int64_t j = 0; j < n; ++j) set_column(col, j, shift[j], sum[j]);
}

void column_totals(const float* shift, const float* sum, double common, double* total, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < n; ++j) total[j] = sum[j] * std::exp2(shift[j] - common);
}

void total_potential(Potential col, const double* total, float common, int64_t n) {
  for (int64_t j = 0; j < n; ++j) set_column(col, j, common, total[j]);
}

void divide_potential(Potential col, const float* c, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    if (!(c[j] > 0.0f)) continue;
    int power;
    col.mantissa[j] = std::frexp(col.mantissa[j] / c[j], &power);
    col.exponent[j] += (float)power;
  }
}

namespace {

// Sums are taken in this many lanes, so that as many additions are on their way at once. Lanes are added in order.
constexpr int64_t kSums = 8;

template <class Number>
double sum_of(const Number* x, int64_t n) {
  double lanes[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int64_t l = 0; l < kSums; ++l) lanes[l] += x[i + l];
  for (; i < n; ++i) lanes[i % kSums] += x[i];
  double total = 0.0;
  for (const double lane : lanes) total += lane;
  return total;
}

struct Extremes {
  float least, most;
};

// The least and the largest of x (n), NaN left out.
Extremes extremes_of(const float* x, int64_t n) {
  float least[kSums], most[kSums];
  for (int64_t l = 0; l < kSums; ++l) least[l] = INFINITY, most[l] = -INFINITY;
  const auto take = [&](int64_t l, float low, float high) {
    least[l] = low < least[l] ? low : least[l];
    most[l] = high > most[l] ? high : most[l];
  };
  int64_t j = 0;
  for (; j + kSums <= n; j += kSums)
    for (int64_t l = 0; l < kSums; ++l) take(l, x[j + l], x[j + l]);
  for (; j < n; ++j) take(0, x[j], x[j]);
  for (int64_t l = 1; l < kSums; ++l) take(0, least[l], most[l]);
  return {least[0], most[0]};
}

}  // namespace

void loss_and_stats(const LossAndStats& p) {
  const Extremes c = extremes_of(p.c, p.n);
  const double B = (double)p.B, mean = sum_of(p.c, p.n) / (double)p.n;  // NaN if a column sum is
  const double above = c.most / mean - 1.0, below = 1.0 - c.least / mean;
  const double spoilt = p.norm && count_not_finite(p.norm, p.m) ? (double)NAN : 0.0;
  const double loss = sum_of(p.images, p.count) / B + spoilt;
  const double target_entropy = sum_of(p.images + p.count, p.count) / (B * (double)p.L) + spoilt;
  const double source_entropy = sum_of(p.images + 2 * p.count, p.count) / (B * (double)p.V) + spoilt;
  p.loss[0] = (float)loss;
  p.stats[0] = (float)target_entropy;
  p.stats[1] = (float)source_entropy;
  p.stats[2] = (float)(loss - target_entropy);
  p.stats[3] = (float)(below > above ? below : above);
  p.stats[4] = (float)p.uniform_loss;
  p.stats[5] = (float)(p.uniform_loss - loss);
}

void use_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = 2 << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: may fail
#else
  (void)memory, (void)bytes;
#endif
}

int64_t count_not_finite(const double* norm, int64_t m) {
  int64_t count = 0;
  for (int64_t i = 0; i < m; ++i) count += norm[i] - norm[i] != 0.0;
  return count;
}

}  // namespace bam::cpu
