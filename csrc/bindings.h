// Addresses and launches for both files of bindings. Nothing here depends on torch: the caller keeps the tensors alive
// and checks shapes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bam.h"
#include "launch_list.h"

namespace bam::bindings {

namespace py = pybind11;

using Pair = std::pair<Address, Address>;                         // a potential's exponent and mantissa
using ScoresTuple = std::tuple<Address, bool, int64_t, int64_t>;  // address, is int16, strides of views and rows

inline Potential potential(const Memory& at, const Pair& p) {
  return {at.as<float>(p.first), at.as<float>(p.second)};
}

inline Scores scores(const Memory& at, const ScoresTuple& s) {
  return {at.as<void>(std::get<0>(s)), std::get<1>(s) ? ScoreType::kInt16 : ScoreType::kFloat32, std::get<2>(s),
          std::get<3>(s)};
}

// A table of kernels. Launches run at once, and are added to `list` where there is one.
template <class Kernels>
struct Table {
  const Kernels* kernels;
  std::shared_ptr<LaunchList> list = nullptr;

  template <class Launch>
  void run(Launch launch, void* stream) const {
    std::vector<Address> addresses;
    {
      py::gil_scoped_release release;
      launch(Memory(list ? &addresses : nullptr), stream);
    }
    if (list) list->add(std::move(launch), std::move(addresses));
  }
};

template <class Kernels>
void bind_recorded(py::class_<Table<Kernels>>& table) {
  table.def(
      "recorded",
      [](const Table<Kernels>& t, std::shared_ptr<LaunchList> list) { return Table<Kernels>{t.kernels, list}; },
      "The same kernels, whose launches are also added to a list.");
}

void bind_cuda(py::module_& m);

}  // namespace bam::bindings
