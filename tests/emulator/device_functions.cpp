// The kernels' functions that run on the host as well, for tests to call one by one.
#include "../../csrc/cuda/row.cuh"

using namespace bam::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int to_fixed_point(float s, float steps_per_unit) {
  return to_fixed(s, steps_per_unit);
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
  const Threshold threshold = find_threshold(k, n, [&](int32_t least, int32_t before) {
    ++counted;
    int64_t found = 0;
    for (int64_t j = 0; j < n; ++j) found += bits_of(x[j]) > least || (bits_of(x[j]) == least && j < before);
    return found;
  });
  for (int64_t j = 0; j < n; ++j) kept[j] = threshold.keeps(bits_of(x[j]), static_cast<int32_t>(j));
  return counted;
}
