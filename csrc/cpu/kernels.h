// The kernels of one instruction set, before they are put into its table.
#pragma once

#include "simd.h"

namespace bam::cpu::BAM_ISA {

void column_lse(const ColumnLse&);
void sinkhorn_pass(const SinkhornPass&);
void match(const Match&);
void plan_products(const PlanProducts&);
void plan_subtract(const PlanSubtract&);
void normalize(const Normalize&);
void mean_row(const MeanRow&);
void centre_potential(const CentrePotential&);
void project(const Project&);
void quantize(const Quantize&);
void symmetrize(const Symmetrize&);

}  // namespace bam::cpu::BAM_ISA
