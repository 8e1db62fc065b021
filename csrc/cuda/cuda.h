// The contract of the CUDA kernels: plain pointers, sizes and a stream; every failure is a std::runtime_error that
// names the kernel and its launch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bam::cuda {

struct Device {
  std::string name;
  int major, minor;
  int multiprocessors;
  int64_t memory_bytes, l2_bytes, shared_bytes_per_block;
};

// The devices of this process; empty where there is no driver or no device.
std::vector<Device> devices();

enum class InputType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Unit rows times 64 sit in the middle of fp16's range: the smallest entry that matters stays normal.
constexpr float kUnitScale = 64.0f;

// unit_i = 64 * (x_i / max(|x_i|, 1e-12) - centre) in fp16 and inverse_norm_i = 1/|x_i|, 0 where |x_i| < 1e-12.
struct UnitRows {
  const void* x;  // (m, d), rows row_stride elements apart
  InputType type;
  int64_t m, d, row_stride;
  const float* centre;  // (d), or null: 0
  void* unit;           // (m, d) fp16
  float* inverse_norm;  // (m)
};
void unit_rows(const UnitRows&, int device, void* stream);

}  // namespace bam::cuda
