// The kernels of one instruction set as a table. Compiled once per instruction set, like every kernel file here.
#include "kernels.h"

#define BAM_STRING_OF(x) #x
#define BAM_STRING(x) BAM_STRING_OF(x)

namespace bam::cpu::BAM_ISA {

extern const Kernels table;
const Kernels table = {BAM_STRING(BAM_ISA), column_lse, sinkhorn_pass,    match,   plan_products, plan_subtract,
                       normalize,           mean_row,   centre_potential, project, quantize,      symmetrize};

}  // namespace bam::cpu::BAM_ISA
