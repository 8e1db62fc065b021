// Every CUDA call and launch is checked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace bam::cuda {

[[noreturn]] inline void fail(cudaError_t status, const std::string& what) {
  throw std::runtime_error("bam_kernels: " + what + ": " + cudaGetErrorString(status));
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail(status, what);
}

// Makes a device current for the length of a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    device_ = device;
  }
  ~DeviceGuard() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0, device_ = 0;
};

}  // namespace bam::cuda
