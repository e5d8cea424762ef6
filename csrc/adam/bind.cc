// The Python module `offload._adam`: checks arguments and settings, releases the GIL, computes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

#include "adam/adamw.h"
#include "adam/bind_gil.h"
#include "adam/bind_tensors.h"
#include "adam/bind_views.h"
#include "adam/dispatch.h"
#include "adam/moments8.h"
#include "adam/norm.h"
#include "adam/parallel.h"
#include "adam/pool.h"
#include "adam/tensors.h"

namespace offload::adam {
namespace {

// What the module has: the kernels that "auto" means, and the threads.
struct Module {
  Kernels chosen;
  Pool pool;

  Kernels KernelsOf(const std::string& isa) const {
    return isa == "auto" ? chosen : KernelsFor(isa);
  }
};

// How a call computes, apart from its arrays.
struct How {
  std::string gradient_dtype;
  int num_threads;
  std::string isa;
};

void AdamW(Module& module, const py::object& gradient, const py::object& weights,
           const py::object& residual, const py::object& exp_avg, const py::object& exp_avg_sq,
           const AdamWSettings& settings, const How& how) {
  const Kernels kernels = module.KernelsOf(how.isa);
  const AdamWCoefficients coefficients = MakeCoefficients(settings);
  const ElementType gradient_type = ParseGradientType("adamw", how.gradient_dtype);
  CheckNumThreads("adamw", how.num_threads);

  const BufferView m("adamw", "exp_avg", exp_avg, 4, "f", Access::kWrite);
  const BufferView v("adamw", "exp_avg_sq", exp_avg_sq, 4, "f", Access::kWrite);
  m.CheckWholeElements();
  const std::size_t numel = m.numel();
  v.CheckNumel(numel);
  const BufferView g = GradientView("adamw", gradient, gradient_type);
  g.CheckNumel(numel);
  const WeightsView p("adamw", weights, residual, numel);

  const AdamWArrays arrays{g.data(),
                           gradient_type,
                           p.weights(),
                           p.residual(),
                           static_cast<float*>(m.data()),
                           static_cast<float*>(v.data())};
  const GilReleased unlocked;
  ForEachBlock(module.pool, numel, how.num_threads,
               [&](std::size_t, std::size_t begin, std::size_t end) {
                 kernels.adamw(coefficients, arrays, begin, end);
               });
}

void AdamW8(Module& module, const py::object& gradient, const py::object& weights,
            const py::object& residual, const py::tuple& exp_avg, const py::tuple& exp_avg_sq,
            const AdamWSettings& settings, std::uint64_t seed, std::uint64_t first_element,
            const How& how) {
  const Kernels kernels = module.KernelsOf(how.isa);
  const AdamWCoefficients coefficients = MakeCoefficients(settings);
  const ElementType gradient_type = ParseGradientType("adamw_8bit", how.gradient_dtype);
  CheckNumThreads("adamw_8bit", how.num_threads);
  if (first_element % kScaleNumel != 0) {
    throw py::value_error("adamw_8bit: first_element must be a multiple of 128, got " +
                          std::to_string(first_element));
  }

  const MomentView m("adamw_8bit", "exp_avg", exp_avg, Access::kWrite);
  const MomentView v("adamw_8bit", "exp_avg_sq", exp_avg_sq, Access::kWrite);
  const std::size_t numel = m.numel();
  v.CheckNumel(numel);
  const BufferView g = GradientView("adamw_8bit", gradient, gradient_type);
  g.CheckNumel(numel);
  const WeightsView p("adamw_8bit", weights, residual, numel);

  const AdamW8Arrays arrays{g.data(),     gradient_type, p.weights(),
                            p.residual(), m.arrays(),    v.arrays()};
  const Noise noise = MakeNoise(seed, settings.step, first_element);
  const GilReleased unlocked;
  ForEachBlock(module.pool, numel, how.num_threads,
               [&](std::size_t, std::size_t begin, std::size_t end) {
                 kernels.adamw8(coefficients, arrays, noise, begin, end);
               });
}

void AdamWTensors(Module& module, const py::list& groups, int num_threads, const std::string& isa) {
  const Kernels kernels = module.KernelsOf(isa);
  CheckNumThreads("adamw_tensors", num_threads);
  const TensorRows rows(groups);
  const GilReleased unlocked;
  UpdateTensors(module.pool, kernels, rows.updates(), num_threads);
  rows.CountStep();
}

Moment ParseMoment(std::string_view function, std::string_view which) {
  if (which == "exp_avg") return Moment::kFirst;
  if (which == "exp_avg_sq") return Moment::kSecond;
  throw py::value_error(std::string(function) + ": which must be 'exp_avg' or 'exp_avg_sq', got '" +
                        std::string(which) + "'");
}

void Encode(const std::string& which, const py::object& values, const py::object& codes,
            const py::object& scales) {
  const Moment moment = ParseMoment("encode_8bit", which);
  const MomentView to("encode_8bit", which, py::make_tuple(codes, scales), Access::kWrite);
  const BufferView from("encode_8bit", "values", values, 4, "f", Access::kRead);
  from.CheckNumel(to.numel(), "there are codes");
  const GilReleased unlocked;
  Encode8(moment, static_cast<const float*>(from.data()), to.arrays(), 0, to.numel());
}

void Decode(const std::string& which, const py::object& codes, const py::object& scales,
            const py::object& values) {
  const Moment moment = ParseMoment("decode_8bit", which);
  const MomentView from("decode_8bit", which, py::make_tuple(codes, scales), Access::kRead);
  const BufferView to("decode_8bit", "values", values, 4, "f", Access::kWrite);
  to.CheckNumel(from.numel(), "there are codes");
  const GilReleased unlocked;
  Decode8(moment, from.arrays(), static_cast<float*>(to.data()), 0, from.numel());
}

py::tuple SquaredNormOf(Module& module, const py::object& gradient, const How& how) {
  const Kernels kernels = module.KernelsOf(how.isa);
  const ElementType type = ParseGradientType("squared_norm", how.gradient_dtype);
  CheckNumThreads("squared_norm", how.num_threads);
  const BufferView g = GradientView("squared_norm", gradient, type);
  g.CheckWholeElements();
  double sum = 0;
  {
    const GilReleased unlocked;
    sum = SquaredNorm(module.pool, kernels.norm, g.data(), type, g.numel(), how.num_threads);
  }
  return py::make_tuple(sum, std::isfinite(sum));
}

}  // namespace
}  // namespace offload::adam

PYBIND11_MODULE(_adam, m) {
  using namespace offload::adam;
  m.doc() = "The optimizer kernels; see offload/_adam.pyi.";

  // Chosen once, at load; an instruction set that is not there makes the import fail.
  const std::string active = ChooseIsa(std::getenv("OFFLOAD_ADAM_ISA"));
  const auto module = std::make_shared<Module>();
  module->chosen = KernelsFor(active);
  // Joined while the interpreter is whole: what is left to the end of the process may find its
  // memory gone.
  py::module_::import("atexit").attr("register")(py::cpp_function([module] {
    const GilReleased unlocked;
    module->pool.Close();
  }));

  m.def("active_isa", [active] { return active; });
  m.def("supported_isas", [] { return py::tuple(py::cast(SupportedIsas())); });
  m.def(
      "adamw",
      [module](const py::object& gradient, const py::object& weights, const py::object& residual,
               const py::object& exp_avg, const py::object& exp_avg_sq, double lr, double beta1,
               double beta2, double eps, double weight_decay, std::int64_t step, double grad_scale,
               const std::string& gradient_dtype, int num_threads, const std::string& isa) {
        AdamW(*module, gradient, weights, residual, exp_avg, exp_avg_sq,
              {lr, beta1, beta2, eps, weight_decay, step, grad_scale},
              {gradient_dtype, num_threads, isa});
      },
      py::arg("gradient"), py::arg("weights"), py::arg("residual"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
      py::arg("eps"), py::arg("weight_decay"), py::arg("step"), py::arg("grad_scale") = 1.0,
      py::arg("gradient_dtype") = "float32", py::arg("num_threads") = 1, py::arg("isa") = "auto");
  m.def(
      "adamw_8bit",
      [module](const py::object& gradient, const py::object& weights, const py::object& residual,
               const py::tuple& exp_avg, const py::tuple& exp_avg_sq, double lr, double beta1,
               double beta2, double eps, double weight_decay, std::int64_t step, double grad_scale,
               std::uint64_t seed, std::uint64_t first_element, const std::string& gradient_dtype,
               int num_threads, const std::string& isa) {
        AdamW8(*module, gradient, weights, residual, exp_avg, exp_avg_sq,
               {lr, beta1, beta2, eps, weight_decay, step, grad_scale}, seed, first_element,
               {gradient_dtype, num_threads, isa});
      },
      py::arg("gradient"), py::arg("weights"), py::arg("residual"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
      py::arg("eps"), py::arg("weight_decay"), py::arg("step"), py::arg("grad_scale") = 1.0,
      py::arg("seed") = 0, py::arg("first_element") = 0, py::arg("gradient_dtype") = "float32",
      py::arg("num_threads") = 1, py::arg("isa") = "auto");
  m.def(
      "adamw_tensors",
      [module](const py::list& groups, int num_threads, const std::string& isa) {
        AdamWTensors(*module, groups, num_threads, isa);
      },
      py::arg("groups"), py::kw_only(), py::arg("num_threads") = 1, py::arg("isa") = "auto");
  m.def("encode_8bit", Encode, py::arg("which"), py::arg("values"), py::arg("codes"),
        py::arg("scales"));
  m.def("decode_8bit", Decode, py::arg("which"), py::arg("codes"), py::arg("scales"),
        py::arg("values"));
  m.def(
      "squared_norm",
      [module](const py::object& gradient, const std::string& gradient_dtype, int num_threads,
               const std::string& isa) {
        return SquaredNormOf(*module, gradient, {gradient_dtype, num_threads, isa});
      },
      py::arg("gradient"), py::kw_only(), py::arg("gradient_dtype") = "float32",
      py::arg("num_threads") = 1, py::arg("isa") = "auto");
}
