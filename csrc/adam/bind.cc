// The Python module `offload._adam`: checks buffers and settings, releases the GIL, computes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

#include "adam/adamw.h"
#include "adam/dispatch.h"
#include "adam/moments8.h"
#include "adam/norm.h"
#include "adam/parallel.h"
#include "adam/pool.h"

namespace py = pybind11;

namespace offload::adam {
namespace {

enum class Access { kRead, kWrite };

// A contiguous export of a Python object's memory, held until destruction (with the GIL).
class BufferView {
 public:
  // `formats`: the struct characters accepted besides bytes, as "f" or "hH".
  BufferView(std::string_view function, const char* name, const py::object& object,
             std::size_t itemsize, std::string_view formats, Access access)
      : label_(std::string(function) + ": " + name), itemsize_(itemsize) {
    const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT |
                      (access == Access::kWrite ? PyBUF_WRITABLE : PyBUF_SIMPLE);
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
      const py::error_already_set cause;
      throw py::value_error(label_ + " must be a contiguous " +
                            (access == Access::kWrite ? "writable " : "") +
                            "buffer (a numpy array, a memoryview): " + cause.what());
    }
    // From here on the destructor does not run if the constructor throws.
    try {
      CheckFormat(formats);
      CheckAlignment();
    } catch (...) {
      PyBuffer_Release(&view_);
      throw;
    }
  }
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;

  void* data() const { return view_.buf; }

  std::size_t numel() const { return static_cast<std::size_t>(view_.len) / itemsize_; }

  // `from`: where that number comes from, for the message.
  void CheckNumel(std::size_t numel, const char* from = "exp_avg has") const {
    if (static_cast<std::size_t>(view_.len) == numel * itemsize_) return;
    throw py::value_error(label_ + " holds " + std::to_string(view_.len) + " bytes, but " +
                          std::to_string(numel) + " elements (as " + from + ") of " +
                          std::to_string(itemsize_) + " bytes are " +
                          std::to_string(numel * itemsize_));
  }

  void CheckWholeElements() const {
    if (static_cast<std::size_t>(view_.len) % itemsize_ == 0) return;
    throw py::value_error(label_ + " holds " + std::to_string(view_.len) +
                          " bytes, not a multiple of " + std::to_string(itemsize_));
  }

 private:
  void CheckFormat(std::string_view formats) const {
    std::string_view format = view_.format == nullptr ? "B" : view_.format;
    if (format.size() == 2 && std::string_view("@=<").find(format[0]) != std::string_view::npos) {
      format.remove_prefix(1);
    }
    const bool accepted =
        format.size() == 1 && (std::string_view("Bbc").find(format[0]) != std::string_view::npos ||
                               formats.find(format[0]) != std::string_view::npos);
    if (accepted) return;
    throw py::value_error(label_ + " has elements of format '" + std::string(format) +
                          "', wanted bytes or one of '" + std::string(formats) + "' (" +
                          std::to_string(itemsize_) + "-byte elements)");
  }

  void CheckAlignment() const {
    if (reinterpret_cast<std::uintptr_t>(view_.buf) % itemsize_ == 0 || view_.len == 0) return;
    throw py::value_error(label_ + " does not begin at a multiple of " + std::to_string(itemsize_) +
                          " bytes");
  }

  std::string label_;
  std::size_t itemsize_;
  Py_buffer view_;
};

ElementType ParseGradientType(std::string_view function, std::string_view dtype) {
  if (dtype == "float32") return ElementType::kFloat32;
  if (dtype == "bfloat16") return ElementType::kBFloat16;
  if (dtype == "float16") return ElementType::kFloat16;
  throw py::value_error(std::string(function) +
                        ": gradient_dtype must be 'float32', 'bfloat16' or 'float16', got '" +
                        std::string(dtype) + "'");
}

BufferView GradientView(std::string_view function, const py::object& gradient, ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return BufferView(function, "gradient", gradient, 4, "f", Access::kRead);
    case ElementType::kBFloat16:
      return BufferView(function, "gradient", gradient, 2, "hH", Access::kRead);
    case ElementType::kFloat16:
      return BufferView(function, "gradient", gradient, 2, "ehH", Access::kRead);
  }
  throw std::logic_error("a gradient has one of three types");
}

void CheckNumThreads(std::string_view function, int num_threads) {
  if (num_threads >= 1 && num_threads <= 1024) return;
  throw py::value_error(std::string(function) + ": num_threads must be in [1, 1024], got " +
                        std::to_string(num_threads));
}

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

// The master weights of an update, whole or split, held until destruction.
class WeightsView {
 public:
  WeightsView(std::string_view function, const py::object& weights, const py::object& residual,
              std::size_t numel)
      : weights_(residual.is_none()
                     ? BufferView(function, "weights", weights, 4, "f", Access::kWrite)
                     : BufferView(function, "weights", weights, 2, "hH", Access::kWrite)) {
    weights_.CheckNumel(numel);
    if (residual.is_none()) return;
    residual_ =
        std::make_unique<BufferView>(function, "residual", residual, 2, "h", Access::kWrite);
    residual_->CheckNumel(numel);
  }

  void* weights() const { return weights_.data(); }
  std::int16_t* residual() const {
    return residual_ == nullptr ? nullptr : static_cast<std::int16_t*>(residual_->data());
  }

 private:
  BufferView weights_;
  std::unique_ptr<BufferView> residual_;
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
  const py::gil_scoped_release unlocked;
  ForEachBlock(module.pool, numel, how.num_threads,
               [&](std::size_t, std::size_t begin, std::size_t end) {
                 kernels.adamw(coefficients, arrays, begin, end);
               });
}

// The codes and scales of an 8-bit moment, held until destruction.
class MomentView {
 public:
  MomentView(std::string_view function, const std::string& name, const py::tuple& moment,
             Access access)
      : codes_(function, (name + " codes").c_str(), Part(function, name, moment, 0), 1, "B",
               access),
        scales_(function, (name + " scales").c_str(), Part(function, name, moment, 1), 2, "hH",
                access) {
    scales_.CheckNumel(NumScales(codes_.numel()), "one for each 128 of the codes");
  }

  std::size_t numel() const { return codes_.numel(); }
  void CheckNumel(std::size_t numel) const { codes_.CheckNumel(numel); }
  Moment8 arrays() const {
    return {static_cast<std::uint8_t*>(codes_.data()), static_cast<std::uint16_t*>(scales_.data())};
  }

 private:
  static py::object Part(std::string_view function, const std::string& name,
                         const py::tuple& moment, std::size_t index) {
    if (moment.size() == 2) return moment[index];
    throw py::value_error(std::string(function) + ": " + name +
                          " must be (codes, scales), got a tuple of " +
                          std::to_string(moment.size()));
  }

  BufferView codes_;
  BufferView scales_;
};

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
  const py::gil_scoped_release unlocked;
  ForEachBlock(module.pool, numel, how.num_threads,
               [&](std::size_t, std::size_t begin, std::size_t end) {
                 kernels.adamw8(coefficients, arrays, noise, begin, end);
               });
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
  const py::gil_scoped_release unlocked;
  Encode8(moment, static_cast<const float*>(from.data()), to.arrays(), 0, to.numel());
}

void Decode(const std::string& which, const py::object& codes, const py::object& scales,
            const py::object& values) {
  const Moment moment = ParseMoment("decode_8bit", which);
  const MomentView from("decode_8bit", which, py::make_tuple(codes, scales), Access::kRead);
  const BufferView to("decode_8bit", "values", values, 4, "f", Access::kWrite);
  to.CheckNumel(from.numel(), "there are codes");
  const py::gil_scoped_release unlocked;
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
    const py::gil_scoped_release unlocked;
    sum = SquaredNorm(module.pool, kernels.norm, g.data(), type, g.numel(), how.num_threads);
  }
  return py::make_tuple(sum, std::isfinite(sum));
}

}  // namespace
}  // namespace offload::adam

PYBIND11_MODULE(_adam, m) {
  using namespace offload::adam;
  m.doc() = "The optimizer kernels over the buffer protocol; see offload/optim/kernel.py.";

  // Chosen once, at load; an instruction set that is not there makes the import fail.
  const std::string active = ChooseIsa(std::getenv("OFFLOAD_ADAM_ISA"));
  const auto module = std::make_shared<Module>();
  module->chosen = KernelsFor(active);
  // Joined while the interpreter is whole: what is left to the end of the process may find its
  // memory gone.
  py::module_::import("atexit").attr("register")(py::cpp_function([module] {
    const py::gil_scoped_release unlocked;
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
