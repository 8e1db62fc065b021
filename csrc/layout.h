// Index algebra shared by all kernels; bam_kernels/layout.py says what the letters mean. Internal linkage: see simd.h.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BAM_HOST_DEVICE __host__ __device__
#else
#define BAM_HOST_DEVICE
#endif

namespace bam {

// Column, in gathered order, of key view t of image i of rank r.
BAM_HOST_DEVICE static inline constexpr int64_t gathered_column(int64_t t, int64_t r, int64_t i, int64_t T, int64_t B) {
  return (r * T + t) * B + i;
}

}  // namespace bam
