// Choice of the instruction set at run time, and the work too small to need one. Compiled for the oldest processor.
#include <cmath>
#include <cstring>

#include "../bam.h"
#include "../layout.h"

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

void mask_positives(const MaskPositives& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.m; ++i) {
    const int64_t image = (p.first + i % p.period) % p.B;
    float* row = p.scores + i * p.row_stride + p.own_columns;
    for (int64_t t = 0; t < p.T; ++t) row[gathered_column(t, 0, image, p.T, p.B)] = kMaskedScore;
  }
}

void reciprocal_potential(Potential col, const float* shift, const float* sum, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    int power = 0;
    const float mantissa = sum[j] > 0.0f ? std::frexp(sum[j], &power) : 1.0f;
    col.exponent[j] = sum[j] > 0.0f ? -shift[j] - (float)power : 0.0f;
    col.mantissa[j] = 1.0f / mantissa;
  }
}

void divide_potential(Potential col, const float* c, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    if (!(c[j] > 0.0f)) continue;
    int power;
    col.mantissa[j] = std::frexp(col.mantissa[j] / c[j], &power);
    col.exponent[j] += (float)power;
  }
}

}  // namespace bam::cpu
