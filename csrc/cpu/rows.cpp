// Embedding rows: the L2 normalisation, its gradient, the mean row, and scores to fixed point.
#include <math.h>

#include "kernels.h"

namespace bam::cpu::BAM_ISA {
namespace {

constexpr double kNormFloor = 1e-12;

// <a, b> in double: float32 rows of any finite magnitude have a finite norm.
double dot(const float* a, const float* b, int64_t d) {
  constexpr int64_t kSums = 4;  // additions on their way at once
  vdouble sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums * kDoubles <= d; k += kSums * kDoubles)
    for (int64_t q = 0; q < kSums; ++q)
      sums[q] += load_doubles(a + k + q * kDoubles) * load_doubles(b + k + q * kDoubles);
  for (; k + kDoubles <= d; k += kDoubles) sums[0] += load_doubles(a + k) * load_doubles(b + k);
  double total = 0.0;
  for (; k < d; ++k) total += (double)a[k] * (double)b[k];
  const vdouble all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int64_t l = 0; l < kDoubles; ++l) total += all[l];
  return total;
}

// sums_k = sum of x_ik over the rows first <= i < last. Groups of four rows are added in float, the groups in double.
void add_rows(const MeanRow& p, int64_t first, int64_t last, double* __restrict__ sums) {
  for (int64_t k = 0; k < p.d; ++k) sums[k] = 0.0;
  int64_t i = first;
  for (; i + 4 <= last; i += 4) {
    const float *a = p.x + i * p.row_stride, *b = a + p.row_stride, *c = b + p.row_stride, *d = c + p.row_stride;
    for (int64_t k = 0; k < p.d; ++k) sums[k] += (double)((a[k] + b[k]) + (c[k] + d[k]));
  }
  for (; i < last; ++i) {
    const float* a = p.x + i * p.row_stride;
    for (int64_t k = 0; k < p.d; ++k) sums[k] += (double)a[k];
  }
}

}  // namespace

void normalize(const Normalize& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.m; ++i) {
    const float* x = p.x + i * p.row_stride;
    float* unit = p.unit + i * p.d;
    const double norm = sqrt(dot(x, x, p.d));
    p.norm[i] = norm;
    const double inverse = 1.0 / (norm > kNormFloor ? norm : kNormFloor);
    const float factor = (float)inverse;
    if (inverse > 1e-37) {  // a normal float32
      for (int64_t k = 0; k < p.d; ++k) unit[k] = x[k] * factor;
    } else {
      for (int64_t k = 0; k < p.d; ++k) unit[k] = (float)(x[k] * inverse);
    }
  }
}

void mean_row(const MeanRow& p) {
  const Chunks chunks(p.m);
  Buffer buffer(2 * chunks.count * p.d);
  double* partial = (double*)buffer.data;  // (chunks, d)
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t first = chunk * chunks.rows;
    const int64_t last = first + chunks.rows < p.m ? first + chunks.rows : p.m;
    add_rows(p, first, last, partial + chunk * p.d);
  }
  for (int64_t k = 0; k < p.d; ++k) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) total += partial[chunk * p.d + k];
    p.mean[k] = (float)(total / (double)p.m);
  }
}

void centre_potential(const CentrePotential& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.m; ++i) {
    const float* unit = p.unit + i * p.d;
    const double x = p.scale * dot(unit, p.centre, p.d);
    const double exponent = floor(x);
    p.row.exponent[i] = (float)exponent;
    p.row.mantissa[i] = (float)::exp2(x - exponent);
    if (i >= p.centred_rows) continue;
    float* centred = p.centred + i * p.d;
    for_columns(
        p.d, [&](int64_t k, auto part) { store(centred + k, load(unit + k, part) - load(p.centre + k, part), part); });
  }
}

void project(const Project& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.m; ++i) {
    float* d = p.d + i * p.d_features;
    const float* unit = p.unit + i * p.d_features;
    const double inverse = p.norm[i] < kNormFloor ? 0.0 : p.factor / p.norm[i];
    if (i < p.weights) {
      const vfloat weight = splat(p.common_factor * p.weight[i]);
      for_columns(p.d_features, [&](int64_t k, auto part) {
        store(d + k, fma(load(p.common + k, part), weight, load(d + k, part)), part);
      });
    }
    vfloat dots = splat(0.0f);
    for_columns(p.d_features, [&](int64_t k, auto part) { dots = fma(load(d + k, part), load(unit + k, part), dots); });
    const vfloat along = splat(-sum(dots)), factor = splat((float)inverse);
    for_columns(p.d_features, [&](int64_t k, auto part) {
      store(d + k, fma(load(unit + k, part), along, load(d + k, part)) * factor, part);
    });
  }
}

void quantize(const Quantize& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.m; ++i) {
    const float* s = p.scores + i * p.n;
    int16_t* q = p.out + i * p.n;
    for_columns(p.n, [&](int64_t j, auto part) {
      const vfloat x = load_scores(s + j, part);
      const vfloat clamped = min(max(round(x * splat(p.steps_per_unit)), splat(-32767.0f)), splat(32767.0f));
      const vfloat fixed = x <= splat(kMaskedScore) ? splat((float)kMaskedFixed) : clamped;
      const vshort steps = __builtin_convertvector(__builtin_convertvector(fixed, vint), vshort);
      memcpy(q + j, &steps, part.count * sizeof(int16_t));
    });
  }
}

}  // namespace bam::cpu::BAM_ISA
