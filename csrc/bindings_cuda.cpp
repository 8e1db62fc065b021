// Bindings of the CUDA kernels' table. Without nvcc the class is there all the same, for a table that tests build.
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "cuda/cuda.h"

namespace bam::bindings {
namespace {

using namespace bam::cuda;

// As Python writes them.
using Pair = std::pair<Address, Address>;
using ScalarPair = std::pair<float, Address>;                        // factor, address of a device scalar or 0
using RowsTuple = std::tuple<Address, int, std::array<int64_t, 4>>;  // address, float type, rows of a view, strides
using PositivesTuple = std::tuple<bool, int64_t, int64_t, int64_t, int64_t, int64_t>;
using MessageTuple = std::tuple<Address, int64_t, int64_t>;        // address or 0, columns, rows
using TeamPair = std::pair<int, int>;                              // threads, cluster
using WhereTuple = std::tuple<int, Address, bool, int64_t>;        // device, stream, programmatic, shared_bytes
using GradientTuple = std::tuple<Address, int, int64_t, int64_t>;  // address, float type, view stride, row stride

Potential potential(const Pair& p) {
  return bindings::potential(p.first, p.second);
}
Scalar scalar(const ScalarPair& s) {
  return {s.first, as<const float>(s.second)};
}
Rows rows(const RowsTuple& r) {
  const auto [address, type, n] = r;
  return {as<const void>(address), static_cast<FloatType>(type), n[0], n[1], n[2], n[3]};
}
Positives positives(const PositivesTuple& p) {
  return {std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p), std::get<4>(p), std::get<5>(p)};
}
Team team(const TeamPair& t) {
  return {t.first, t.second};
}

template <class Params>
void call(void (*kernel)(const Params&, const Where&), const Params& params, const WhereTuple& where) {
  py::gil_scoped_release release;
  kernel(params, {std::get<0>(where), as<void>(std::get<1>(where)), std::get<2>(where), std::get<3>(where)});
}

void bind_scores(py::class_<Kernels>& c) {
  c.def("column_lse", [](const Kernels& k, py::tuple s, int64_t m, int64_t n, ScalarPair scale, Pair row, Address shift,
                         Address sum, bool accumulate, Address partial, int64_t chunk_rows, Address bias, Address fixed,
                         int64_t fixed_stride, ScalarPair step, PositivesTuple of, WhereTuple where) {
    call(k.column_lse,
         {scores(s), m, n, scalar(scale), potential(row), as<float>(shift), as<float>(sum), accumulate,
          as<float>(partial), chunk_rows, as<const float>(bias), as<int16_t>(fixed), fixed_stride, scalar(step),
          positives(of)},
         where);
  });
  c.def("mask_positives",
        [](const Kernels& k, Address s, int64_t m, int64_t row_stride, PositivesTuple of, WhereTuple where) {
          call(k.mask_positives, {as<float>(s), m, row_stride, positives(of)}, where);
        });
}

void bind_sinkhorn(py::class_<Kernels>& c) {
  c.def("sinkhorn_pass", [](const Kernels& k, py::tuple s, int64_t m, int64_t n, ScalarPair scale, Pair row, Pair col,
                            Address sums, bool accumulate, bool divide, Address partial, int64_t chunk_rows,
                            TeamPair of, int group, WhereTuple where) {
    call(k.sinkhorn_pass,
         {scores(s), m, n, scalar(scale), potential(row), potential(col), as<float>(sums), accumulate, divide,
          as<float>(partial), chunk_rows, team(of), group},
         where);
  });
  c.def("row_step", [](const Kernels& k, py::tuple s, int64_t m, int64_t n, ScalarPair scale, Pair row, Pair col,
                       WhereTuple where) {
    call(k.row_step, {scores(s), m, n, scalar(scale), potential(row), potential(col)}, where);
  });
  c.def("sinkhorn_on_chip",
        [](const Kernels& k, py::tuple s, int64_t m, int64_t n, ScalarPair scale, Pair row, Pair col, Address sums,
           int64_t block_rows, int cluster, int iterations, WhereTuple where) {
          call(k.sinkhorn_on_chip,
               {scores(s), m, n, scalar(scale), potential(row), potential(col), as<float>(sums), block_rows, cluster,
                iterations},
               where);
        });
  c.def("reciprocal_potential",
        [](const Kernels& k, Address shift, Address sum, Pair col, int64_t n, WhereTuple where) {
          call(k.reciprocal_potential, {as<const float>(shift), as<const float>(sum), potential(col), n}, where);
        });
  c.def("column_totals",
        [](const Kernels& k, Address shift, Address sum, float common, Address total, int64_t n, WhereTuple where) {
          call(k.column_totals, {as<const float>(shift), as<const float>(sum), common, as<double>(total), n}, where);
        });
  c.def("total_potential", [](const Kernels& k, Address total, float common, Pair col, int64_t n, WhereTuple where) {
    call(k.total_potential, {as<const double>(total), common, potential(col), n}, where);
  });
  c.def("divide_potential", [](const Kernels& k, Pair col, Address sums, int64_t n, WhereTuple where) {
    call(k.divide_potential, {potential(col), as<const float>(sums), n}, where);
  });
}

void bind_match(py::class_<Kernels>& c) {
  c.def("match", [](const Kernels& k, py::tuple target, py::tuple source, std::array<int64_t, 8> dimensions,
                    std::array<ScalarPair, 3> scales, float gradient_scale, float pair_weight, Address row_exponent,
                    int64_t row_view_stride, Pair col, Address sums, int64_t sums_stride, Address targets,
                    int64_t targets_view_stride, Pair row_out, GradientTuple gradient, TeamPair of, int stages,
                    Address means, WhereTuple where) {
    const auto [L, V, b, n, W, T, B, top_k] = dimensions;
    const auto [address, type, view_stride, row_stride] = gradient;
    call(k.match,
         {scores(target),
          scores(source),
          L,
          V,
          b,
          n,
          W,
          T,
          B,
          top_k,
          scalar(scales[0]),
          scalar(scales[1]),
          scalar(scales[2]),
          gradient_scale,
          pair_weight,
          as<const float>(row_exponent),
          row_view_stride,
          potential(col),
          as<float>(sums),
          sums_stride,
          as<float>(targets),
          targets_view_stride,
          potential(row_out),
          as<void>(address),
          static_cast<FloatType>(type),
          view_stride,
          row_stride,
          team(of),
          stages,
          as<float>(means)},
         where);
  });
}

void bind_plan(py::class_<Kernels>& c) {
  c.def("plan_products",
        [](const Kernels& k, py::tuple s, int64_t m, int64_t n, ScalarPair scale, Pair row, Pair col, Address v,
           Address u, Address y, Address w, bool accumulate, Address partial, int64_t chunk_rows, WhereTuple where) {
          call(k.plan_products,
               {scores(s), m, n, scalar(scale), potential(row), potential(col), as<const float>(v), as<const float>(u),
                as<float>(y), as<float>(w), accumulate, as<float>(partial), chunk_rows},
               where);
        });
  c.def("plan_subtract", [](const Kernels& k, py::tuple s, int64_t m, int64_t n, ScalarPair scale, Pair row, Pair col,
                            Address u, Address v, Address x, int64_t x_stride, WhereTuple where) {
    call(k.plan_subtract,
         {scores(s), m, n, scalar(scale), potential(row), potential(col), as<const float>(u), as<const float>(v),
          as<float>(x), x_stride},
         where);
  });
  c.def("symmetrize", [](const Kernels& k, Address G, int type, int64_t m, int64_t stride, Address row_sums,
                         Address partial, WhereTuple where) {
    call(k.symmetrize, {as<void>(G), static_cast<FloatType>(type), m, stride, as<float>(row_sums), as<float>(partial)},
         where);
  });
}

void bind_embeddings(py::class_<Kernels>& c) {
  c.def("normalize", [](const Kernels& k, RowsTuple x, int64_t m, int64_t d, Address centre, Address read, Address norm,
                        Address bias, double scale, Pair row, MessageTuple sent, WhereTuple where) {
    const auto [to, columns, sent_rows] = sent;
    call(k.normalize,
         {rows(x), m, d, as<const float>(centre), as<void>(read), as<double>(norm), as<float>(bias), scale,
          potential(row), as<void>(to), columns, sent_rows},
         where);
  });
  c.def("mean_row", [](const Kernels& k, RowsTuple x, Address norm, int64_t m, int64_t d, int64_t ranks, Address mean,
                       WhereTuple where) {
    call(k.mean_row, {rows(x), as<const double>(norm), m, d, ranks, as<float>(mean)}, where);
  });
  c.def("product_step", [](const Kernels& k, Address centre, int64_t d, Address key_bias, int64_t n, Address row_bias,
                           int64_t m, Address other_bias, int64_t other, Address step, WhereTuple where) {
    call(k.product_step,
         {as<const float>(centre), as<const float>(key_bias), as<const float>(row_bias), as<const float>(other_bias), d,
          n, m, other, as<float>(step)},
         where);
  });
  c.def("centre_potential", [](const Kernels& k, Address read, int64_t m, int64_t d, Address centre, double scale,
                               Pair row, WhereTuple where) {
    call(k.centre_potential, {as<const float>(read), m, d, as<const float>(centre), scale, potential(row)}, where);
  });
  c.def("project", [](const Kernels& k, Address d, RowsTuple x, Address norm, float factor, int64_t m, int64_t features,
                      WhereTuple where) {
    call(k.project, {as<float>(d), rows(x), as<const double>(norm), factor, m, features}, where);
  });
}

void bind_stats(py::class_<Kernels>& c) {
  c.def("loss_and_stats",
        [](const Kernels& k, Address images, int64_t count, Address sums, int64_t n, Address norm, int64_t m,
           std::array<int64_t, 3> dimensions, double uniform_loss, Address loss, Address stats, WhereTuple where) {
          const auto [B, L, V] = dimensions;
          call(k.loss_and_stats,
               {as<const float>(images), count, as<const float>(sums), n, as<const double>(norm), m, B, L, V,
                uniform_loss, as<float>(loss), as<float>(stats)},
               where);
        });
}

#ifdef BAM_WITH_CUDA
py::dict device(int index) {
  const Device d = describe(index);
  py::dict found;
  found["name"] = d.name;
  found["capability"] = py::make_tuple(d.major, d.minor);
  found["multiprocessors"] = d.multiprocessors;
  found["memory_bytes"] = d.memory_bytes;
  found["l2_bytes"] = d.l2_bytes;
  found["shared_bytes"] = d.shared_bytes;
  found["reserved_bytes"] = d.reserved_bytes;
  found["clusters"] = py::make_tuple(d.clusters[0], d.clusters[1], d.clusters[2], d.clusters[3]);
  found["programmatic"] = d.programmatic;
  found["fault"] = d.fault;
  return found;
}
#endif

}  // namespace

void bind_cuda(py::module_& m) {
  py::class_<Kernels> table(m, "CudaKernels");
  bind_scores(table);
  bind_sinkhorn(table);
  bind_match(table);
  bind_plan(table);
  bind_embeddings(table);
  bind_stats(table);
  m.def(
      "cuda_kernels_at", [](Address address) { return as<const Kernels>(address); }, py::return_value_policy::reference,
      "Kernels of another build by the address of their table: for tests.");
  py::dict constants;
  constants["owned"] = kOwned;
  constants["threads"] = kMostThreads;
  constants["register_threads"] = kRegisterThreads;
  constants["on_chip_threads"] = kOnChipThreads;
  constants["cluster"] = kMostCluster;
  constants["group_bytes"] = kGroupBytes;
  constants["groups"] = kGroups;
  constants["potential_bytes"] = kPotentialBytes;
  constants["stages"] = kStages;
  constants["few_stages"] = kFewStages;
  constants["scratch_bytes"] = kScratchBytes;
  m.attr("cuda_constants") = constants;
#ifdef BAM_BOUNDED_WAITS
  m.attr("bounded_waits") = true;
#else
  m.attr("bounded_waits") = false;
#endif
#ifdef BAM_WITH_CUDA
  m.attr("with_cuda") = true;
  m.def("cuda_kernels", [] { return &kernels; }, py::return_value_policy::reference);
  m.def("cuda_devices", [] {
    const Devices found = devices();
    return py::make_tuple(found.count, found.fault);
  });
  m.def("cuda_device", device);
  m.def("cuda_architectures", [] { return std::string(BAM_CUDA_ARCHITECTURES); });
#else
  m.attr("with_cuda") = false;
#endif
}

}  // namespace bam::bindings
