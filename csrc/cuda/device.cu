// What the devices of this process are.
#include "check.cuh"
#include "cuda.h"

namespace bam::cuda {

std::vector<Device> devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    return {};
  }
  check(status, "cudaGetDeviceCount");
  std::vector<Device> found;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp prop;
    check(cudaGetDeviceProperties(&prop, i), "cudaGetDeviceProperties(" + std::to_string(i) + ")");
    found.push_back({prop.name, prop.major, prop.minor, prop.multiProcessorCount,
                     static_cast<int64_t>(prop.totalGlobalMem), prop.l2CacheSize,
                     static_cast<int64_t>(prop.sharedMemPerBlockOptin)});
  }
  return found;
}

}  // namespace bam::cuda
