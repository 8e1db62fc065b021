// What every kernel does with scores, exponentials and potentials, also on the host, where tests call it.
// csrc/cpu/row.h and the Triton backend's row.py compute the same. Exponentials are of base 2.
#pragma once

#include <cmath>
#include <cstring>

#include "../bam.h"
#include "../layout.h"

namespace bam::cuda {

constexpr float kEmpty = -1e20f;          // a largest exponent below this comes from masked scores alone
constexpr float kNoShift = -16777216.0f;  // the shift of an empty column
constexpr float kLeastNormal = 0x1p-126f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int32_t kInfinityBits = 0x7f800000;
// A row sum outside these bounds was taken with a poor exponent.
constexpr float kLeastSum = 0x1p-20f, kMostSum = 0x1p20f;

BAM_HOST_DEVICE static inline int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
BAM_HOST_DEVICE static inline float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// int16 and float32 are turned into each other by the bits of a float whose unit in the last place is 1: conversion
// instructions take the pipe of the exponentials, which is the one that these kernels fill.
constexpr int32_t kTwo23Bits = 0x4b000000;  // of 2^23
constexpr float kThreeTimes2To22 = 0x1.8p23f;

// The value of a fixed-point score from the bits of 2^23 + (score + 2^15); the plain one is a number for masked scores.
BAM_HOST_DEVICE static inline float plain_value_of_bits(int32_t bits) {
  return float_of(bits) - (0x1p23f + 0x1p15f);
}
BAM_HOST_DEVICE static inline float value_of_bits(int32_t bits) {
  const float x = plain_value_of_bits(bits);
  return x == static_cast<float>(kMaskedFixed) ? kMaskedScore : x;
}

BAM_HOST_DEVICE static inline float value_of(float score) {
  return score;
}
BAM_HOST_DEVICE static inline float value_of(int16_t score) {
  return value_of_bits(kTwo23Bits | (static_cast<uint16_t>(score) ^ 0x8000));
}
template <class Score>
BAM_HOST_DEVICE static inline Score masked_score();
template <>
BAM_HOST_DEVICE inline float masked_score<float>() {
  return kMaskedScore;
}
template <>
BAM_HOST_DEVICE inline int16_t masked_score<int16_t>() {
  return kMaskedFixed;
}

// Where a row sum was taken with a poor exponent; NaN too.
BAM_HOST_DEVICE static inline bool is_poor(float total) {
  return !(total > kLeastSum && total < kMostSum);
}

// The exponent that brings the largest term of a row, 2^most, to about 1; 0 for a row with no key left.
BAM_HOST_DEVICE static inline float exponent_of(float most) {
  return most < kEmpty ? 0.0f : -ceilf(most);
}

struct Power {
  float exponent, mantissa;  // 2^exponent * mantissa
};

// x with mantissa in [1/2, 1), of a normal positive x.
BAM_HOST_DEVICE static inline Power split(float x) {
  const int32_t bits = bits_of(x);
  return {static_cast<float>((bits >> 23 & 255) - 126), float_of((bits & 0x007fffff) | 0x3f000000)};
}

// 2^exponent / total, mantissa in (1, 2]; infinite where total is 0, NaN where it is NaN.
BAM_HOST_DEVICE static inline Power reciprocal(float exponent, float total) {
  if (!(total > 0.0f)) return {0.0f, total == 0.0f ? INFINITY : total};
  const Power parts = split(total);
  return {exponent - parts.exponent, 1.0f / parts.mantissa};
}

// 1 / (sum * 2^shift); 1 for an empty column, which has no entry to scale.
BAM_HOST_DEVICE static inline Power column_potential(float shift, float sum) {
  return sum == 0.0f ? Power{0.0f, 1.0f} : reciprocal(-shift, sum);
}

// potential / c; a column with c = 0 keeps its own, one with NaN gets NaN.
BAM_HOST_DEVICE static inline Power divided(Power potential, float c) {
  if (c == 0.0f) return potential;
  if (!(c > 0.0f)) return {potential.exponent, c};
  const Power parts = split(potential.mantissa / c);
  return {potential.exponent + parts.exponent, parts.mantissa};
}

BAM_HOST_DEVICE static inline float inverse_or_zero(float total) {
  return total == 0.0f ? 0.0f : 1.0f / total;
}

// H(p) in nats of p_j = e_j / total from total = sum e_j and dot = sum e_j log2(e_j); 0 where total is 0.
BAM_HOST_DEVICE static inline float entropy_of(float total, float dot) {
  return total == 0.0f ? 0.0f : (log2f(total) - dot / total) * kLn2;
}

// rint(s * steps_per_unit) clamped to +-kMostFixed; kMaskedFixed for masked scores.
constexpr float kMostFixed = 32767.0f;
BAM_HOST_DEVICE static inline int16_t to_fixed(float s, float steps_per_unit) {
  const float clamped = fminf(fmaxf(s * steps_per_unit, -kMostFixed), kMostFixed);
  return static_cast<int16_t>(
      bits_of((s <= kMaskedScore ? static_cast<float>(kMaskedFixed) : clamped) + kThreeTimes2To22));
}

// The image of this rank whose key is column j, in gathered order; -1 for another rank's key.
BAM_HOST_DEVICE static inline int32_t own_image(int64_t j, int64_t own_columns, int64_t T, int64_t B) {
  return j >= own_columns && j < own_columns + T * B ? static_cast<int32_t>((j - own_columns) % B) : -1;
}

// Public order (view, rank, image) of a column in gathered order (rank, view, image). A row has fewer than 2^31.
BAM_HOST_DEVICE static inline int32_t public_column(uint32_t j, int64_t W, int64_t T, int64_t B) {
  const auto w = static_cast<uint32_t>(W), t = static_cast<uint32_t>(T), b = static_cast<uint32_t>(B);
  return static_cast<int32_t>((j / b % t * w + j / (t * b)) * b + j % b);
}

// Whether an entry is among the k largest: above the threshold, or at it and before the cut in public order. The bits
// of non-negative floats are ordered as they are.
struct Threshold {
  int32_t low, cut;
  BAM_HOST_DEVICE bool keeps(int32_t bits, int32_t column) const { return bits > low || (bits == low && column < cut); }
};

// The threshold that keeps exactly k entries of n, 0 < k < n. count(threshold) is how many it keeps; every thread calls
// it alike.
template <class Count>
BAM_HOST_DEVICE inline Threshold find_threshold(int64_t k, int64_t n, Count count) {
  int32_t low = 0, high = kInfinityBits;
  const int32_t all = static_cast<int32_t>(n);
  int64_t found = n;
  while (high - low > 1 && found != k) {
    const int32_t middle = low + (high - low) / 2;
    found = count(Threshold{middle, all});
    if (found >= k) low = middle;
    else high = middle;
  }
  if (found == k) return {low, all};
  int32_t before = 0, cut = all;
  while (cut - before > 1) {
    const int32_t middle = before + (cut - before) / 2;
    if (count(Threshold{low, middle}) >= k) cut = middle;
    else before = middle;
  }
  return {low, cut};
}

}  // namespace bam::cuda
