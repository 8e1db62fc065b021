// Python bindings: addresses and sizes in, nothing torch. The caller keeps the tensors alive and checks shapes.
#include "bindings.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace bam::bindings;
using bam::Address;
using bam::Memory;

using bam::cpu::Kernels;
using KernelTable = Table<Kernels>;

// Arguments in braces, because these are evaluated in order.
struct Arguments {
  bam::Potential col;
  const float *first, *second;
};

using FactorTuple = std::tuple<Address, int64_t, int64_t>;  // address, strides of rows and depth

bam::Factor factor(const Memory& at, const FactorTuple& x) {
  return {at.as<const float>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
}

struct NotFinite : std::domain_error {
  using std::domain_error::domain_error;
};

// Launch a kernel; params(at) makes its parameters with the addresses of memory `at`.
template <class Params, class MakeParams>
void call(const KernelTable& table, void (*kernel)(const Params&), MakeParams params) {
  table.run([=](const Memory& at, void*) { kernel(params(at)); }, nullptr);
}

void bind_scores(py::class_<KernelTable>& c) {
  c.def("mask_positives", [](const KernelTable& k, Address s, int64_t rows, int64_t row_stride, int64_t first,
                             int64_t period, int64_t B, int64_t T, int64_t own_columns, int threads) {
    call(k, bam::cpu::mask_positives, [=](const Memory& at) {
      return bam::MaskPositives{at.as<float>(s), rows, row_stride, first, period, B, T, own_columns, threads};
    });
  });
  c.def("quantize",
        [](const KernelTable& k, Address s, int64_t rows, int64_t n, float steps_per_unit, Address out, int threads) {
          call(k, k.kernels->quantize, [=](const Memory& at) {
            return bam::Quantize{at.as<const float>(s), rows, n, steps_per_unit, at.as<int16_t>(out), threads};
          });
        });
  c.def("column_lse", [](const KernelTable& k, ScoresTuple s, int64_t rows, int64_t n, float scale, Pair row,
                         Address shift, Address sum, bool accumulate, int threads) {
    call(k, k.kernels->column_lse, [=](const Memory& at) {
      return bam::ColumnLse{scores(at, s),     rows,       n,      scale, potential(at, row), at.as<float>(shift),
                            at.as<float>(sum), accumulate, threads};
    });
  });
}

void bind_sinkhorn(py::class_<KernelTable>& c) {
  c.def("sinkhorn_pass", [](const KernelTable& k, ScoresTuple s, int64_t rows, int64_t n, float scale, Pair row,
                            Pair col, Address sums, bool accumulate, int threads) {
    call(k, k.kernels->sinkhorn_pass, [=](const Memory& at) {
      return bam::SinkhornPass{scores(at, s),      rows,       n,      scale, potential(at, row), potential(at, col),
                               at.as<float>(sums), accumulate, threads};
    });
  });
  c.def("reciprocal_potential", [](const KernelTable& k, Pair col, Address shift, Address sum, int64_t n) {
    k.run(
        [=](const Memory& at, void*) {
          const Arguments given{potential(at, col), at.as<const float>(shift), at.as<const float>(sum)};
          bam::cpu::reciprocal_potential(given.col, given.first, given.second, n);
        },
        nullptr);
  });
  c.def("column_totals",
        [](const KernelTable& k, Address shift, Address sum, double common, Address total, int64_t n, int threads) {
          k.run(
              [=](const Memory& at, void*) {
                const auto* from = at.as<const float>(shift);
                const auto* sums = at.as<const float>(sum);
                bam::cpu::column_totals(from, sums, common, at.as<double>(total), n, threads);
              },
              nullptr);
        });
  c.def("total_potential", [](const KernelTable& k, Pair col, Address total, float common, int64_t n) {
    k.run(
        [=](const Memory& at, void*) {
          const bam::Potential written = potential(at, col);
          bam::cpu::total_potential(written, at.as<const double>(total), common, n);
        },
        nullptr);
  });
  c.def("divide_potential", [](const KernelTable& k, Pair col, Address sums, int64_t n) {
    k.run(
        [=](const Memory& at, void*) {
          const Arguments given{potential(at, col), at.as<const float>(sums), nullptr};
          bam::cpu::divide_potential(given.col, given.first, n);
        },
        nullptr);
  });
}

void bind_match(py::class_<KernelTable>& c) {
  c.def("match",
        [](const KernelTable& k, ScoresTuple target, ScoresTuple source, std::array<int64_t, 8> dimensions,
           std::array<float, 4> scales, Address row_exponent, int64_t row_view_stride, Pair col, Address sums,
           Address targets, int64_t targets_view_stride, Pair row_out, std::array<int64_t, 3> gradient, int threads) {
          call(k, k.kernels->match, [=](const Memory& at) {
            const auto [L, V, b, n, W, T, B, top_k] = dimensions;
            bam::Match match{};
            match.target = scores(at, target);
            match.source = scores(at, source);
            match.L = L;
            match.V = V;
            match.b = b;
            match.n = n;
            match.W = W;
            match.T = T;
            match.B = B;
            match.top_k = top_k;
            match.target_scale = scales[0];
            match.source_scale = scales[1];
            match.source_step_over_tau = scales[2];
            match.gradient_scale = scales[3];
            match.row_exponent = at.as<const float>(row_exponent);
            match.row_view_stride = row_view_stride;
            match.col = potential(at, col);
            match.loss = at.as<double>(sums);
            match.target_entropy = match.loss + b;
            match.source_entropy = match.loss + 2 * b;
            match.targets = at.as<float>(targets);
            match.targets_view_stride = targets_view_stride;
            match.row_out = potential(at, row_out);
            match.gradient = at.as<float>(gradient[0]);
            match.gradient_view_stride = gradient[1];
            match.gradient_row_stride = gradient[2];
            match.threads = threads;
            return match;
          });
        });
}

void bind_plan(py::class_<KernelTable>& c) {
  c.def("plan_products", [](const KernelTable& k, ScoresTuple s, int64_t rows, int64_t n, float scale, Pair row,
                            Pair col, Address v, Address u, Address y, Address w, int threads) {
    call(k, k.kernels->plan_products, [=](const Memory& at) {
      return bam::PlanProducts{scores(at, s),
                               rows,
                               n,
                               scale,
                               potential(at, row),
                               potential(at, col),
                               at.as<const float>(v),
                               at.as<const float>(u),
                               at.as<float>(y),
                               at.as<float>(w),
                               threads};
    });
  });
  c.def("plan_subtract", [](const KernelTable& k, ScoresTuple s, int64_t rows, int64_t n, float scale, Pair row,
                            Pair col, Address u, Address v, Address x, int threads) {
    call(k, k.kernels->plan_subtract, [=](const Memory& at) {
      return bam::PlanSubtract{scores(at, s),
                               rows,
                               n,
                               scale,
                               potential(at, row),
                               potential(at, col),
                               at.as<const float>(u),
                               at.as<const float>(v),
                               at.as<float>(x),
                               threads};
    });
  });
  c.def("symmetrize", [](const KernelTable& k, Address G, int64_t m, int64_t stride, Address column_sums, int threads) {
    call(k, k.kernels->symmetrize, [=](const Memory& at) {
      return bam::Symmetrize{at.as<float>(G), m, stride, at.as<float>(column_sums), threads};
    });
  });
}

void bind_embeddings(py::class_<KernelTable>& c) {
  c.def("normalize", [](const KernelTable& k, Address x, int64_t rows, int64_t d, int64_t row_stride, Address unit,
                        Address norm, int threads) {
    call(k, k.kernels->normalize, [=](const Memory& at) {
      return bam::Normalize{at.as<const float>(x), rows,   d, row_stride, at.as<float>(unit),
                            at.as<double>(norm),   threads};
    });
  });
  c.def("require_finite", [](const KernelTable& k, Address norm, int64_t rows) {
    k.run(
        [=](const Memory& at, void*) {
          if (bam::cpu::count_not_finite(at.as<const double>(norm), rows))
            throw NotFinite("a row has values that are not finite");
        },
        nullptr);
  });
  c.def("mean_row",
        [](const KernelTable& k, Address x, int64_t rows, int64_t d, int64_t row_stride, Address mean, int threads) {
          call(k, k.kernels->mean_row, [=](const Memory& at) {
            return bam::MeanRow{at.as<const float>(x), rows, d, row_stride, at.as<float>(mean), threads};
          });
        });
  c.def("centre_potential", [](const KernelTable& k, Address unit, Address centre, int64_t rows, int64_t d,
                               double scale, Pair row, Address centred, int64_t centred_rows, int threads) {
    call(k, k.kernels->centre_potential, [=](const Memory& at) {
      return bam::CentrePotential{at.as<const float>(unit), at.as<const float>(centre), rows,         d,      scale,
                                  potential(at, row),       at.as<float>(centred),      centred_rows, threads};
    });
  });
  c.def("project",
        [](const KernelTable& k, Address d, Address unit, Address norm, double factor, Address weight, Address common,
           float common_factor, int64_t weights, int64_t rows, int64_t features, int threads) {
          call(k, k.kernels->project, [=](const Memory& at) {
            return bam::Project{at.as<float>(d),
                                at.as<const float>(unit),
                                at.as<const double>(norm),
                                factor,
                                at.as<const float>(weight),
                                at.as<const float>(common),
                                common_factor,
                                weights,
                                rows,
                                features,
                                threads};
          });
        });
}

void bind_stats(py::class_<KernelTable>& c) {
  c.def("loss_and_stats",
        [](const KernelTable& k, Address images, int64_t count, Address sums, int64_t n, Address norm, int64_t m,
           std::array<int64_t, 3> dimensions, double uniform_loss, Address loss, Address stats) {
          call(k, bam::cpu::loss_and_stats, [=](const Memory& at) {
            const auto [B, L, V] = dimensions;
            return bam::LossAndStats{at.as<const double>(images),
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

void bind_products(py::class_<KernelTable>& c) {
  c.def_static("has_split_products", [] { return bam::cpu::find_split_products() != nullptr; });
  c.def_static("split_product_bytes", [](int64_t m, int64_t n, int64_t depth, int threads) {
    return bam::cpu::find_split_products()->bytes(m, n, depth, threads);
  });
  c.def("split_product", [](const KernelTable& k, FactorTuple a, FactorTuple b, Address out, int64_t out_stride,
                            std::array<int64_t, 3> dimensions, bool add, Address workspace, int threads) {
    call(k, bam::cpu::find_split_products()->product, [=](const Memory& at) {
      const auto [m, n, depth] = dimensions;
      return bam::Product{factor(at, a), factor(at, b), at.as<float>(out),      m,      n, depth,
                          out_stride,    add,           at.as<void>(workspace), threads};
    });
  });
}

void bind_launch_list(py::module_& m) {
  py::class_<bam::LaunchList, std::shared_ptr<bam::LaunchList>>(
      m, "LaunchList", "Launches that were recorded as they ran, to be run again on other memory.")
      .def(py::init<>())
      .def("__len__", &bam::LaunchList::size)
      .def("addresses", &bam::LaunchList::addresses, "Addresses that launch i used.")
      .def(
          "place",
          [](bam::LaunchList& list, std::size_t i, const std::vector<std::pair<std::size_t, Address>>& places) {
            std::vector<bam::Place> placed;
            for (const auto& [base, offset] : places) placed.push_back({base, offset});
            list.place(i, std::move(placed));
          },
          "Say once where each address of launch i will be: bytes after a base of `run`.")
      .def(
          "run",
          [](const bam::LaunchList& list, std::size_t first, std::size_t last, const std::vector<Address>& bases,
             Address stream) {
            py::gil_scoped_release release;
            list.run(first, last, bases, reinterpret_cast<void*>(stream));
          },
          "Run launches first .. last - 1 on memory at these bases.");
}

void bind_cpu(py::module_& m) {
  py::class_<KernelTable> table(m, "CpuKernels");
  table.def_property_readonly("isa", [](const KernelTable& k) { return std::string(k.kernels->isa); });
  bind_recorded(table);
  bind_scores(table);
  bind_sinkhorn(table);
  bind_match(table);
  bind_plan(table);
  bind_embeddings(table);
  bind_stats(table);
  bind_products(table);
  m.def(
      "cpu_kernels",
      [](const std::string& isa) {
        const Kernels* kernels = bam::cpu::find_kernels(isa.c_str());
        if (!kernels) throw py::value_error("this processor, or this build, cannot run the kernels for " + isa);
        return KernelTable{kernels};
      },
      py::arg("isa") = "auto",
      "The kernels for an instruction set (auto, avx512, avx2, plain); auto is the best this processor runs.");
  m.def("use_huge_pages",
        [](Address memory, int64_t bytes) { bam::cpu::use_huge_pages(reinterpret_cast<void*>(memory), bytes); });
  m.def(
      "cpu_kernels_at", [](Address table) { return KernelTable{reinterpret_cast<const Kernels*>(table)}; },
      "Kernels of another build by the address of their table: for tests.");
}

}  // namespace

namespace bam {
extern const char* const built_from;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "bam_kernels: compiled kernels, called with addresses; see csrc/bam.h";
  // Hash of csrc/, equal on every machine; after a space the compiler of the CUDA kernels, if there are any.
  m.attr("built_from") = std::string(bam::built_from);
  py::register_exception<NotFinite>(m, "NotFinite", PyExc_ValueError);
  bind_launch_list(m);
  bind_cpu(m);
  bam::bindings::bind_cuda(m);
}
