// The kernels' functions that run on the host as well, for tests to call one by one, and kernels that are broken.
#include <string>

#include "../../csrc/cuda/intrinsics.cuh"
#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/row.cuh"

using namespace bam::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int to_fixed_point(float s, float steps_per_unit) {
  return to_fixed(s, steps_per_unit);
}
EXPORT float value_of_fixed_point(int score) {
  return value_of(static_cast<int16_t>(score));
}
EXPORT void split_float(float x, float* out) {
  const Power parts = split(x);
  out[0] = parts.exponent;
  out[1] = parts.mantissa;
}
EXPORT void reciprocal_of(float exponent, float total, float* out) {
  const Power found = reciprocal(exponent, total);
  out[0] = found.exponent;
  out[1] = found.mantissa;
}
EXPORT int public_column_of(int64_t column, int64_t W, int64_t T, int64_t B) {
  return public_column(column, W, T, B);
}
EXPORT int own_image_of(int64_t column, int64_t own_columns, int64_t T, int64_t B) {
  return own_image(column, own_columns, T, B);
}
// Which of n non-negative entries are the k largest, ties to the lower column; returns how often entries were counted.
EXPORT int keep_largest(const float* x, int64_t n, int64_t k, unsigned char* kept) {
  int counted = 0;
  const Threshold threshold = find_threshold(k, n, [&](const Threshold& trial) {
    ++counted;
    int64_t found = 0;
    for (int64_t j = 0; j < n; ++j) found += trial.keeps(bits_of(x[j]), static_cast<int32_t>(j));
    return found;
  });
  for (int64_t j = 0; j < n; ++j) kept[j] = threshold.keeps(bits_of(x[j]), static_cast<int32_t>(j));
  return counted;
}

namespace {

// What a kernel may not do, one of five kinds.
void broken_kernel(int kind) {
  auto* shared = static_cast<unsigned char*>(shared_memory());
  if (kind != 4) follow_earlier_kernels();
  if (kind == 0 && threadIdx.x == 0) return;
  if (kind == 1 && threadIdx.x < 32) sync_cluster();
  auto* arrival = reinterpret_cast<Arrival*>(shared);
  if (kind == 2) send_16_bytes({}, reinterpret_cast<float*>(shared) + 4, arrival, 1 - cluster_rank());
  if (kind == 3 && threadIdx.x == 0) shared[64] = 0;
  sync_block();
}

}  // namespace

EXPORT const char* fault_of_broken_kernel(int kind) {
  static std::string fault;
  try {
    launch("broken_kernel", broken_kernel, {dim3(2), 64, 64, 2}, {0, nullptr, true, 64}, kind);
    fault = "";
  } catch (const std::runtime_error& error) {
    fault = error.what();
  }
  return fault.c_str();
}
