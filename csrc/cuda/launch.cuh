// Launching a kernel: the current device, the configuration, and an error that names both.
//
// Where the device can, kernels are launched programmatically: the blocks of the next one come on chip while the last
// blocks of this one run. That is safe because of one invariant: **every thread of every kernel calls
// follow_earlier_kernels() before it first reads or writes global memory**; before that it touches its parameters and
// shared memory alone. The call returns when the kernel before has ended and what it wrote can be seen. That kernel did
// the same before it ended, so by induction all that came earlier in the stream has ended too, and memory that
// was read by any of it may be written. What others launch in between (a library's product, a fill) waits for all of
// its predecessors without this. A kernel lets its successor in only after it was let in itself: no more than two are
// on chip at once, and all blocks of the first have begun, so that none can wait for room that the second has taken.
#pragma once

#include <algorithm>

#include "check.cuh"
#include "cuda.h"

namespace bam::cuda {

struct Shape {
  dim3 blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;  // blocks along x that are one cluster
};

// The most shared memory that a kernel may use without asking, and blocks of a cluster.
constexpr int64_t kUnaskedSharedBytes = 48 << 10;
constexpr int kUnaskedCluster = 8;

inline std::string described(const char* name, const Shape& shape) {
  return std::string(name) + " with " + std::to_string(shape.blocks.x) + " x " + std::to_string(shape.blocks.y) +
         " blocks of " + std::to_string(shape.threads) + " threads, " + std::to_string(shape.shared_bytes) +
         " bytes of shared memory, clusters of " + std::to_string(shape.cluster);
}

template <class Params>
cudaError_t start(void (*kernel)(Params), const Shape& shape, const Where& where, const Params& params) {
  if (shape.shared_bytes > kUnaskedSharedBytes) {
    // All there is, so that a thread which launches the kernel with less takes nothing from this one.
    const int64_t asked = std::max(where.shared_bytes, shape.shared_bytes);
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(asked));
    if (status != cudaSuccess) return status;
  }
  if (shape.cluster > kUnaskedCluster) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(where.stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  if (where.programmatic) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), const Shape& shape, const Where& where, const Params& params) {
  if (shape.blocks.x == 0 || shape.blocks.y == 0) return;
  DeviceGuard guard(where.device);
  const cudaError_t status = start(kernel, shape, where, params);
  if (status != cudaSuccess) fail(status, described(name, shape));
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace bam::cuda
