// What the devices of this process are, and what these kernels can do there.
#include "check.cuh"
#include "cuda.h"

namespace bam::cuda {

// Of the current device, whether it runs code for sm_90 or newer, and if so Device::clusters of blocks with this much
// shared memory. An error where no code runs here.
cudaError_t find_forms(int shared_bytes, bool* is_hopper_code, int (&clusters)[4]);

namespace {

// 13.0 of 13000
std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

Devices devices() {
  int count = 0, driver = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return {count, ""};
  cudaGetLastError();
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return {0, "no driver"};
  return {0, std::string(cudaGetErrorString(status)) + " (the driver is for CUDA " + version(driver) +
                 ", the kernels were compiled by CUDA " + version(CUDART_VERSION) + ")"};
}

Device describe(int index) {
  cudaDeviceProp prop;
  check(cudaGetDeviceProperties(&prop, index), "cudaGetDeviceProperties");
  Device d = {prop.name,
              prop.major,
              prop.minor,
              prop.multiProcessorCount,
              static_cast<int64_t>(prop.totalGlobalMem),
              prop.l2CacheSize,
              static_cast<int64_t>(prop.sharedMemPerBlockOptin),
              static_cast<int64_t>(prop.reservedSharedMemPerBlock),
              {},
              false,
              ""};
  DeviceGuard guard(index);
  const cudaError_t status = find_forms(static_cast<int>(d.shared_bytes), &d.programmatic, d.clusters);
  if (status != cudaSuccess) {
    cudaGetLastError();
    d.fault = cudaGetErrorString(status);
  }
  return d;
}

}  // namespace bam::cuda
