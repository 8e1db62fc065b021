// The plan E_ij = 2^(scale*s_ij) * row_i * col_j as an operator, for the gradient of sinkhorn_attention.
#include "kernels.h"
#include "row.h"

namespace bam::cpu::BAM_ISA {
namespace {

// e_j = E_ij
template <class Score>
BAM_INLINE void plan_row(const Score* __restrict__ s, int64_t n, float scale, const Potential& col, float exponent,
                         float mantissa, float* __restrict__ e) {
  for_columns(n, [&](int64_t j, auto part) {
    const vfloat x = fma(load_scores(s + j, part), splat(scale), load(col.exponent + j, part) + splat(exponent));
    store(e + j, exp2(x) * (load(col.mantissa + j, part) * splat(mantissa)), part);
  });
}

template <class Score>
void run_products(const PlanProducts& p) {
  const Chunks chunks(p.m);
  const int64_t stride = padded(p.n);
  Buffer partial(p.u ? chunks.count * stride : 0);
#pragma omp parallel num_threads(p.threads)
  {
    const FlushSubnormals flush;
    Buffer e(stride);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      float* w = partial.data + chunk * stride;
      if (p.u) memset(w, 0, p.n * sizeof(float));
      const int64_t first = chunk * chunks.rows;
      const int64_t last = first + chunks.rows < p.m ? first + chunks.rows : p.m;
      for (int64_t i = first; i < last; ++i) {
        plan_row(row_of(p.scores, Score{}, 0, i), p.n, p.scale, p.col, p.row.exponent[i], p.row.mantissa[i], e.data);
        vfloat y = splat(0.0f);
        for_columns(p.n, [&](int64_t j, auto part) {
          const vfloat ej = load(e.data + j, part);
          if (p.v) y = fma(ej, load(p.v + j, part), y);
          if (p.u) store(w + j, fma(ej, splat(p.u[i]), load(w + j, part)), part);
        });
        if (p.v) p.y[i] = sum(y);
      }
    }
  }
  if (p.u) add_chunks(partial.data, stride, chunks.count, p.n, nullptr, false, p.w, p.threads);
}

template <class Score>
void run_subtract(const PlanSubtract& p) {
#pragma omp parallel num_threads(p.threads)
  {
    const FlushSubnormals flush;
    Buffer e(padded(p.n));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.m; ++i) {
      plan_row(row_of(p.scores, Score{}, 0, i), p.n, p.scale, p.col, p.row.exponent[i], p.row.mantissa[i], e.data);
      float* x = p.x + i * p.n;
      const vfloat u = splat(p.u ? p.u[i] : 0.0f);
      for_columns(p.n, [&](int64_t j, auto part) {
        const vfloat factor = p.v ? u + load(p.v + j, part) : u;
        store(x + j, load(x + j, part) - load(e.data + j, part) * factor, part);
      });
    }
  }
}

}  // namespace

void plan_products(const PlanProducts& p) {
  p.scores.type == ScoreType::kInt16 ? run_products<int16_t>(p) : run_products<float>(p);
}

void plan_subtract(const PlanSubtract& p) {
  p.scores.type == ScoreType::kInt16 ? run_subtract<int16_t>(p) : run_subtract<float>(p);
}

}  // namespace bam::cpu::BAM_ISA
