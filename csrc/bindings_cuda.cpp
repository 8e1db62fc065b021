// Bindings of the CUDA kernels' table. Without nvcc the class is there all the same, for a table that tests build.
#include <string>
#include <utility>

#include "bindings.h"
#include "cuda/cuda.h"

namespace bam::bindings {
namespace {

using namespace bam::cuda;

using KernelTable = Table<Kernels>;

// Arguments as Python writes them.
using ScalarPair = std::pair<float, Address>;                        // factor, address of a device scalar or 0
using RowsTuple = std::tuple<Address, int, std::array<int64_t, 4>>;  // address, float type, rows of a view, strides
using PositivesTuple = std::tuple<bool, int64_t, int64_t, int64_t, int64_t, int64_t>;
using MessageTuple = std::tuple<Address, int64_t, int64_t>;        // address or 0, columns, rows
using TeamPair = std::pair<int, int>;                              // threads, cluster
using WhereTuple = std::tuple<int, Address, bool, int64_t>;        // device, stream, programmatic, shared_bytes
using GradientTuple = std::tuple<Address, int, int64_t, int64_t>;  // address, float type, view stride, row stride

Scalar scalar(const Memory& at, const ScalarPair& s) {
  return {s.first, at.as<const float>(s.second)};
}
Rows rows(const Memory& at, const RowsTuple& r) {
  const auto& n = std::get<2>(r);
  return {at.as<const void>(std::get<0>(r)), static_cast<FloatType>(std::get<1>(r)), n[0], n[1], n[2], n[3]};
}
Positives positives(const PositivesTuple& p) {
  return {std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p), std::get<4>(p), std::get<5>(p)};
}
Team team(const TeamPair& t) {
  return {t.first, t.second};
}

// Launch a kernel; params(at) makes its parameters with the addresses of memory `at`.
template <class Params, class MakeParams>
void call(const KernelTable& table, void (*Kernels::*kernel)(const Params&, const Where&), const WhereTuple& w,
          MakeParams params) {
  const Where where{std::get<0>(w), nullptr, std::get<2>(w), std::get<3>(w)};
  table.run(
      [=, function = table.kernels->*kernel](const Memory& at, void* stream) {
        Where now = where;
        now.stream = stream;
        function(params(at), now);
      },
      reinterpret_cast<void*>(std::get<1>(w)));
}

void bind_scores(py::class_<KernelTable>& c) {
  c.def("column_lse", [](const KernelTable& k, ScoresTuple s, int64_t m, int64_t n, ScalarPair scale, Pair row,
                         Address shift, Address sum, bool accumulate, Address partial, int64_t chunk_rows, Address bias,
                         Address fixed, int64_t fixed_stride, ScalarPair step, PositivesTuple of, WhereTuple where) {
    call(k, &Kernels::column_lse, where, [=](const Memory& at) {
      return cuda::ColumnLse{scores(at, s),
                             m,
                             n,
                             scalar(at, scale),
                             potential(at, row),
                             at.as<float>(shift),
                             at.as<float>(sum),
                             accumulate,
                             at.as<float>(partial),
                             chunk_rows,
                             at.as<const float>(bias),
                             at.as<int16_t>(fixed),
                             fixed_stride,
                             scalar(at, step),
                             positives(of)};
    });
  });
  c.def("mask_positives",
        [](const KernelTable& k, Address s, int64_t m, int64_t row_stride, PositivesTuple of, WhereTuple where) {
          call(k, &Kernels::mask_positives, where,
               [=](const Memory& at) { return cuda::MaskPositives{at.as<float>(s), m, row_stride, positives(of)}; });
        });
}

void bind_sinkhorn(py::class_<KernelTable>& c) {
  c.def("sinkhorn_pass", [](const KernelTable& k, ScoresTuple s, int64_t m, int64_t n, ScalarPair scale, Pair row,
                            Pair col, Address sums, bool accumulate, bool divide, Address partial, int64_t chunk_rows,
                            TeamPair of, int group, WhereTuple where) {
    call(k, &Kernels::sinkhorn_pass, where, [=](const Memory& at) {
      return cuda::SinkhornPass{scores(at, s),
                                m,
                                n,
                                scalar(at, scale),
                                potential(at, row),
                                potential(at, col),
                                at.as<float>(sums),
                                accumulate,
                                divide,
                                at.as<float>(partial),
                                chunk_rows,
                                team(of),
                                group};
    });
  });
  c.def("row_step", [](const KernelTable& k, ScoresTuple s, int64_t m, int64_t n, ScalarPair scale, Pair row, Pair col,
                       WhereTuple where) {
    call(k, &Kernels::row_step, where, [=](const Memory& at) {
      return cuda::RowStep{scores(at, s), m, n, scalar(at, scale), potential(at, row), potential(at, col)};
    });
  });
  c.def("sinkhorn_on_chip",
        [](const KernelTable& k, ScoresTuple s, int64_t m, int64_t n, ScalarPair scale, Pair row, Pair col,
           Address sums, int64_t block_rows, int cluster, int iterations, WhereTuple where) {
          call(k, &Kernels::sinkhorn_on_chip, where, [=](const Memory& at) {
            return cuda::SinkhornOnChip{
                scores(at, s),      m,          n,       scalar(at, scale), potential(at, row), potential(at, col),
                at.as<float>(sums), block_rows, cluster, iterations};
          });
        });
  c.def("reciprocal_potential",
        [](const KernelTable& k, Address shift, Address sum, Pair col, int64_t n, WhereTuple where) {
          call(k, &Kernels::reciprocal_potential, where, [=](const Memory& at) {
            return cuda::ReciprocalPotential{at.as<const float>(shift), at.as<const float>(sum), potential(at, col), n};
          });
        });
  c.def("column_totals", [](const KernelTable& k, Address shift, Address sum, float common, Address total, int64_t n,
                            WhereTuple where) {
    call(k, &Kernels::column_totals, where, [=](const Memory& at) {
      return cuda::ColumnTotals{at.as<const float>(shift), at.as<const float>(sum), common, at.as<double>(total), n};
    });
  });
  c.def("total_potential",
        [](const KernelTable& k, Address total, float common, Pair col, int64_t n, WhereTuple where) {
          call(k, &Kernels::total_potential, where, [=](const Memory& at) {
            return cuda::TotalPotential{at.as<const double>(total), common, potential(at, col), n};
          });
        });
  c.def("divide_potential", [](const KernelTable& k, Pair col, Address sums, int64_t n, WhereTuple where) {
    call(k, &Kernels::divide_potential, where,
         [=](const Memory& at) { return cuda::DividePotential{potential(at, col), at.as<const float>(sums), n}; });
  });
}

void bind_match(py::class_<KernelTable>& c) {
  c.def("match", [](const KernelTable& k, ScoresTuple target, ScoresTuple source, std::array<int64_t, 8> dimensions,
                    std::array<ScalarPair, 3> scales, float gradient_scale, float pair_weight, Address row_exponent,
                    int64_t row_view_stride, Pair col, Address sums, int64_t sums_stride, Address targets,
                    int64_t targets_view_stride, Pair row_out, GradientTuple gradient, TeamPair of, int stages,
                    Address means, WhereTuple where) {
    call(k, &Kernels::match, where, [=](const Memory& at) {
      const auto [L, V, b, n, W, T, B, top_k] = dimensions;
      const auto [address, type, view_stride, row_stride] = gradient;
      return cuda::Match{scores(at, target),
                         scores(at, source),
                         L,
                         V,
                         b,
                         n,
                         W,
                         T,
                         B,
                         top_k,
                         scalar(at, scales[0]),
                         scalar(at, scales[1]),
                         scalar(at, scales[2]),
                         gradient_scale,
                         pair_weight,
                         at.as<const float>(row_exponent),
                         row_view_stride,
                         potential(at, col),
                         at.as<float>(sums),
                         sums_stride,
                         at.as<float>(targets),
                         targets_view_stride,
                         potential(at, row_out),
                         at.as<void>(address),
                         static_cast<FloatType>(type),
                         view_stride,
                         row_stride,
                         team(of),
                         stages,
                         at.as<float>(means)};
    });
  });
}

void bind_plan(py::class_<KernelTable>& c) {
  c.def("plan_products",
        [](const KernelTable& k, ScoresTuple s, int64_t m, int64_t n, ScalarPair scale, Pair row, Pair col, Address v,
           Address u, Address y, Address w, bool accumulate, Address partial, int64_t chunk_rows, WhereTuple where) {
          call(k, &Kernels::plan_products, where, [=](const Memory& at) {
            return cuda::PlanProducts{scores(at, s),
                                      m,
                                      n,
                                      scalar(at, scale),
                                      potential(at, row),
                                      potential(at, col),
                                      at.as<const float>(v),
                                      at.as<const float>(u),
                                      at.as<float>(y),
                                      at.as<float>(w),
                                      accumulate,
                                      at.as<float>(partial),
                                      chunk_rows};
          });
        });
  c.def("plan_subtract", [](const KernelTable& k, ScoresTuple s, int64_t m, int64_t n, ScalarPair scale, Pair row,
                            Pair col, Address u, Address v, Address x, int64_t x_stride, WhereTuple where) {
    call(k, &Kernels::plan_subtract, where, [=](const Memory& at) {
      return cuda::PlanSubtract{scores(at, s),
                                m,
                                n,
                                scalar(at, scale),
                                potential(at, row),
                                potential(at, col),
                                at.as<const float>(u),
                                at.as<const float>(v),
                                at.as<float>(x),
                                x_stride};
    });
  });
  c.def("symmetrize", [](const KernelTable& k, Address G, int type, int64_t m, int64_t stride, Address column_sums,
                         Address partial, WhereTuple where) {
    call(k, &Kernels::symmetrize, where, [=](const Memory& at) {
      return cuda::Symmetrize{at.as<void>(G), static_cast<FloatType>(type), m,
                              stride,         at.as<float>(column_sums),    at.as<float>(partial)};
    });
  });
}

void bind_embeddings(py::class_<KernelTable>& c) {
  c.def("normalize", [](const KernelTable& k, RowsTuple x, int64_t m, int64_t d, Address centre, Address read,
                        Address norm, Address bias, double scale, Pair row, MessageTuple sent, WhereTuple where) {
    call(k, &Kernels::normalize, where, [=](const Memory& at) {
      const auto [to, columns, sent_rows] = sent;
      return cuda::Normalize{rows(at, x),
                             m,
                             d,
                             at.as<const float>(centre),
                             at.as<void>(read),
                             at.as<double>(norm),
                             at.as<float>(bias),
                             scale,
                             potential(at, row),
                             at.as<void>(to),
                             columns,
                             sent_rows};
    });
  });
  c.def("mean_row", [](const KernelTable& k, RowsTuple x, Address norm, int64_t m, int64_t d, int64_t ranks,
                       Address mean, WhereTuple where) {
    call(k, &Kernels::mean_row, where, [=](const Memory& at) {
      return cuda::MeanRow{rows(at, x), at.as<const double>(norm), m, d, ranks, at.as<float>(mean)};
    });
  });
  c.def("product_step",
        [](const KernelTable& k, Address centre, int64_t d, Address key_bias, int64_t n, Address row_bias, int64_t m,
           Address other_bias, int64_t other, Address step, WhereTuple where) {
          call(k, &Kernels::product_step, where, [=](const Memory& at) {
            return cuda::ProductStep{at.as<const float>(centre),
                                     at.as<const float>(key_bias),
                                     at.as<const float>(row_bias),
                                     at.as<const float>(other_bias),
                                     d,
                                     n,
                                     m,
                                     other,
                                     at.as<float>(step)};
          });
        });
  c.def("centre_potential", [](const KernelTable& k, Address read, int64_t m, int64_t d, Address centre, double scale,
                               Pair row, WhereTuple where) {
    call(k, &Kernels::centre_potential, where, [=](const Memory& at) {
      return cuda::CentrePotential{at.as<const float>(read),   m,     d,
                                   at.as<const float>(centre), scale, potential(at, row)};
    });
  });
  c.def("project", [](const KernelTable& k, Address d, RowsTuple x, Address norm, float factor, int64_t m,
                      int64_t features, WhereTuple where) {
    call(k, &Kernels::project, where, [=](const Memory& at) {
      return cuda::Project{at.as<float>(d), rows(at, x), at.as<const double>(norm), factor, m, features};
    });
  });
}

void bind_stats(py::class_<KernelTable>& c) {
  c.def("loss_and_stats",
        [](const KernelTable& k, Address images, int64_t count, Address sums, int64_t n, Address norm, int64_t m,
           std::array<int64_t, 3> dimensions, double uniform_loss, Address loss, Address stats, WhereTuple where) {
          call(k, &Kernels::loss_and_stats, where, [=](const Memory& at) {
            const auto [B, L, V] = dimensions;
            return cuda::LossAndStats{at.as<const float>(images),
                                      count,
                                      at.as<const float>(sums),
                                      n,
                                      at.as<const double>(norm),
                                      m,
                                      B,
                                      L,
                                      V,
                                      uniform_loss,
                                      at.as<float>(loss),
                                      at.as<float>(stats)};
          });
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
  py::class_<KernelTable> table(m, "CudaKernels");
  bind_recorded(table);
  bind_scores(table);
  bind_sinkhorn(table);
  bind_match(table);
  bind_plan(table);
  bind_embeddings(table);
  bind_stats(table);
  m.def(
      "cuda_kernels_at", [](Address address) { return KernelTable{reinterpret_cast<const Kernels*>(address)}; },
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
  m.def("cuda_kernels", [] { return KernelTable{&kernels}; });
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
