// The part of CUDA that the kernels use, on the CPU: for tests. Every thread of a block is a fiber; the blocks of a
// cluster are alive together. See emulator.cpp.
//
// Stricter than a device where it can be: shared memory begins as NaN, a thread that ends while others of its block
// wait is an error, and a wait that nobody ends is an error that says how many threads wait where. So is a thread of a
// programmatic launch that ends, or copies from global memory, before it has followed the kernels before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

void* shared_memory();
void follow_earlier_kernels();
void sync_block();
// Those 4 bytes of lane `lane` of the warp.
uint32_t from_lane(uint32_t mine, int lane);
unsigned cluster_rank();
unsigned cluster_size();
void sync_cluster();
// A barrier of transactions, `mbarrier`; on the CPU it is kept beside the shared memory that it lies in. A programmatic
// launch is one of code for sm_90, which has these. Bulk copies come when they are waited for or, with threads
// backwards, so that the one that asks is the last to reach a barrier and the first to leave it, at once.
bool has_arrivals();
void begin_arrival(void* arrival);
void expect_bytes(void* arrival, unsigned bytes);
void arrive(void* arrival);
void wait_for_arrival(void* arrival, bool odd);
void copy_bulk(void* to, const void* from, unsigned bytes, void* arrival);
// To the places in block `rank` of the cluster where `to` and `arrival` are in this one.
void send_16_bytes(const float (&x)[4], float* to, void* arrival, unsigned rank);
void copy_16_bytes_later(void* to, const void* from);
void commit_copies();
void wait_for_copies(int groups_left);

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
  bool programmatic;
};
// cudaError_t of the launch. Throws a std::runtime_error where a kernel does what it may not, or waits for ever.
int run(const Launch& launch, const std::function<void()>& kernel);

}  // namespace emulator

// Of the fiber that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
};
using cudaStream_t = void*;
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  emulator::Launch launch = {config->gridDim, config->blockDim, config->dynamicSmemBytes, 1, false};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) launch.cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch.programmatic = attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  return static_cast<cudaError_t>(emulator::run(launch, [=] { kernel(arguments...); }));
}
