// The kernels' table, as the bindings and tests take it.
#include "cuda.h"

namespace bam::cuda {

void column_lse(const ColumnLse&, const Where&);
void sinkhorn_pass(const SinkhornPass&, const Where&);
void row_step(const RowStep&, const Where&);
void sinkhorn_on_chip(const SinkhornOnChip&, const Where&);
void match(const Match&, const Where&);
void plan_products(const PlanProducts&, const Where&);
void plan_subtract(const PlanSubtract&, const Where&);
void normalize(const Normalize&, const Where&);
void mean_row(const MeanRow&, const Where&);
void product_step(const ProductStep&, const Where&);
void centre_potential(const CentrePotential&, const Where&);
void project(const Project&, const Where&);
void symmetrize(const Symmetrize&, const Where&);
void mask_positives(const MaskPositives&, const Where&);
void reciprocal_potential(const ReciprocalPotential&, const Where&);
void column_totals(const ColumnTotals&, const Where&);
void total_potential(const TotalPotential&, const Where&);
void divide_potential(const DividePotential&, const Where&);
void loss_and_stats(const LossAndStats&, const Where&);

const Kernels kernels = {column_lse,       sinkhorn_pass,   row_step,         sinkhorn_on_chip, match,
                         plan_products,    plan_subtract,   normalize,        mean_row,         product_step,
                         centre_potential, project,         symmetrize,       mask_positives,   reciprocal_potential,
                         column_totals,    total_potential, divide_potential, loss_and_stats};

}  // namespace bam::cuda
