// Python bindings: addresses and sizes in, nothing torch. The caller keeps the tensors alive and checks shapes.
#include "bindings.h"

#include <stdexcept>
#include <string>

namespace {

using namespace bam::bindings;

template <class Params>
void call(void (*kernel)(const Params&), const Params& params) {
  py::gil_scoped_release release;
  kernel(params);
}

void bind_cpu(py::module_& m) {
  using bam::cpu::Kernels;
  py::class_<Kernels>(m, "CpuKernels")
      .def_property_readonly("isa", [](const Kernels& k) { return std::string(k.isa); })
      .def("column_lse",
           [](const Kernels& k, py::tuple s, int64_t rows, int64_t n, float scale, py::tuple row, Address shift,
              Address sum, bool accumulate, int threads) {
             call(k.column_lse, bam::ColumnLse{scores(s), rows, n, scale, potential(row), as<float>(shift),
                                               as<float>(sum), accumulate, threads});
           })
      .def("sinkhorn_pass",
           [](const Kernels& k, py::tuple s, int64_t rows, int64_t n, float scale, py::tuple row, py::tuple col,
              Address c, bool accumulate, int threads) {
             call(k.sinkhorn_pass, bam::SinkhornPass{scores(s), rows, n, scale, potential(row), potential(col),
                                                     as<float>(c), accumulate, threads});
           })
      .def("match",
           [](const Kernels& k, py::dict p, int threads) {
             bam::Match match{};
             match.target = scores(p["target"]);
             match.source = scores(p["source"]);
             match.L = p["L"].cast<int64_t>();
             match.V = p["V"].cast<int64_t>();
             match.b = p["b"].cast<int64_t>();
             match.n = p["n"].cast<int64_t>();
             match.W = p["W"].cast<int64_t>();
             match.T = p["T"].cast<int64_t>();
             match.B = p["B"].cast<int64_t>();
             match.top_k = p["top_k"].cast<int64_t>();
             match.target_scale = p["target_scale"].cast<float>();
             match.source_scale = p["source_scale"].cast<float>();
             match.source_step_over_tau = p["source_step_over_tau"].cast<float>();
             match.gradient_scale = p["gradient_scale"].cast<float>();
             match.row_exponent = as<const float>(p["row_exponent"].cast<Address>());
             match.row_view_stride = p["row_view_stride"].cast<int64_t>();
             match.col = potential(py::tuple(p["col"]));
             match.col_log2 = as<const float>(p["col_log2"].cast<Address>());
             match.loss = as<double>(p["loss"].cast<Address>());
             match.target_entropy = as<double>(p["target_entropy"].cast<Address>());
             match.source_entropy = as<double>(p["source_entropy"].cast<Address>());
             match.targets = as<float>(p["targets"].cast<Address>());
             match.targets_view_stride = p["targets_view_stride"].cast<int64_t>();
             match.row_out = potential(py::tuple(p["row_out"]));
             match.gradient = as<float>(p["gradient"].cast<Address>());
             match.gradient_view_stride = p["gradient_view_stride"].cast<int64_t>();
             match.gradient_row_stride = p["gradient_row_stride"].cast<int64_t>();
             match.threads = threads;
             call(k.match, match);
           })
      .def("plan_products",
           [](const Kernels& k, py::tuple s, int64_t rows, int64_t n, float scale, py::tuple row, py::tuple col,
              Address v, Address u, Address y, Address w, int threads) {
             call(k.plan_products,
                  bam::PlanProducts{scores(s), rows, n, scale, potential(row), potential(col), as<const float>(v),
                                    as<const float>(u), as<float>(y), as<float>(w), threads});
           })
      .def("plan_subtract",
           [](const Kernels& k, py::tuple s, int64_t rows, int64_t n, float scale, py::tuple row, py::tuple col,
              Address u, Address v, Address x, int threads) {
             call(k.plan_subtract, bam::PlanSubtract{scores(s), rows, n, scale, potential(row), potential(col),
                                                     as<const float>(u), as<const float>(v), as<float>(x), threads});
           })
      .def("normalize",
           [](const Kernels& k, Address x, int64_t rows, int64_t d, int64_t row_stride, Address unit, Address norm,
              int threads) {
             call(k.normalize,
                  bam::Normalize{as<const float>(x), rows, d, row_stride, as<float>(unit), as<double>(norm), threads});
           })
      .def("centre_potential",
           [](const Kernels& k, Address unit, Address centre, int64_t rows, int64_t d, double scale, py::tuple row,
              int threads) {
             call(k.centre_potential, bam::CentrePotential{as<const float>(unit), as<const float>(centre), rows, d,
                                                           scale, potential(row), threads});
           })
      .def("project",
           [](const Kernels& k, Address d, Address unit, Address norm, double factor, int64_t rows, int64_t features,
              int threads) {
             call(k.project, bam::Project{as<float>(d), as<const float>(unit), as<const double>(norm), factor, rows,
                                          features, threads});
           })
      .def("symmetrize",
           [](const Kernels& k, Address G, int64_t m, int64_t stride, Address row_sums, int threads) {
             call(k.symmetrize, bam::Symmetrize{as<float>(G), m, stride, as<float>(row_sums), threads});
           })
      .def("quantize",
           [](const Kernels& k, Address s, int64_t rows, int64_t n, float steps_per_unit, Address out, int threads) {
             call(k.quantize, bam::Quantize{as<const float>(s), rows, n, steps_per_unit, as<int16_t>(out), threads});
           });

  m.def(
      "cpu_kernels",
      [](const std::string& isa) {
        const Kernels* kernels = bam::cpu::find_kernels(isa.c_str());
        if (!kernels) throw py::value_error("this processor, or this build, cannot run the kernels for " + isa);
        return kernels;
      },
      py::arg("isa") = "auto", py::return_value_policy::reference,
      "The kernels for an instruction set (auto, avx512, avx2, plain); auto is the best this processor runs.");
  m.def(
      "cpu_kernels_at", [](Address table) { return as<const Kernels>(table); }, py::return_value_policy::reference,
      "Kernels of another build by the address of their table: for tests.");
  m.def("mask_positives", [](Address s, int64_t rows, int64_t row_stride, int64_t first, int64_t period, int64_t B,
                             int64_t T, int64_t own_columns, int threads) {
    call(bam::cpu::mask_positives,
         bam::MaskPositives{as<float>(s), rows, row_stride, first, period, B, T, own_columns, threads});
  });
  m.def("reciprocal_potential", [](py::tuple col, Address shift, Address sum, int64_t n) {
    bam::cpu::reciprocal_potential(potential(col), as<const float>(shift), as<const float>(sum), n);
  });
  m.def("divide_potential",
        [](py::tuple col, Address c, int64_t n) { bam::cpu::divide_potential(potential(col), as<const float>(c), n); });
}

}  // namespace

namespace bam {
extern const char* const built_from;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "bam_kernels: compiled kernels, called with addresses; see csrc/bam.h";
  // Hash of csrc/, equal on every machine; after a space the compiler of the CUDA kernels, if there are any.
  m.attr("built_from") = std::string(bam::built_from);
  bind_cpu(m);
  bam::bindings::bind_cuda(m);
}
