// What both files of bindings do with addresses. Nothing torch: the caller keeps the tensors alive and checks shapes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bam.h"

namespace bam::bindings {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Potential potential(Address exponent, Address mantissa) {
  return {as<float>(exponent), as<float>(mantissa)};
}

inline Potential potential(const py::tuple& pair) {
  return potential(pair[0].cast<Address>(), pair[1].cast<Address>());
}

// (address, is_int16, view_stride, row_stride)
inline Scores scores(const py::tuple& s) {
  return {as<void>(s[0].cast<Address>()), s[1].cast<bool>() ? ScoreType::kInt16 : ScoreType::kFloat32,
          s[2].cast<int64_t>(), s[3].cast<int64_t>()};
}

void bind_cuda(py::module_& m);

}  // namespace bam::bindings
