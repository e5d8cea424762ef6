// The Python module `offload._adam`: checks buffers and settings, releases the GIL, computes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "adam/adamw.h"
#include "adam/dispatch.h"
#include "adam/norm.h"
#include "adam/parallel.h"

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

  void CheckNumel(std::size_t numel) const {
    if (static_cast<std::size_t>(view_.len) == numel * itemsize_) return;
    throw py::value_error(label_ + " holds " + std::to_string(view_.len) + " bytes, but " +
                          std::to_string(numel) + " elements (as exp_avg has) of " +
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
  throw py::value_error(std::string(function) +
                        ": gradient_dtype must be 'float32' or 'bfloat16', got '" +
                        std::string(dtype) + "'");
}

BufferView GradientView(std::string_view function, const py::object& gradient, ElementType type) {
  return type == ElementType::kFloat32
             ? BufferView(function, "gradient", gradient, 4, "f", Access::kRead)
             : BufferView(function, "gradient", gradient, 2, "hH", Access::kRead);
}

void CheckNumThreads(std::string_view function, int num_threads) {
  if (num_threads >= 1 && num_threads <= 1024) return;
  throw py::value_error(std::string(function) + ": num_threads must be in [1, 1024], got " +
                        std::to_string(num_threads));
}

Kernels KernelsOrDefault(std::string_view isa, const Kernels& chosen) {
  return isa == "auto" ? chosen : KernelsFor(isa);
}

void AdamW(const Kernels& chosen, const py::object& gradient, const py::object& weights,
           const py::object& residual, const py::object& exp_avg, const py::object& exp_avg_sq,
           const std::string& gradient_dtype, const AdamWSettings& settings, int num_threads,
           const std::string& isa) {
  const Kernels kernels = KernelsOrDefault(isa, chosen);
  const AdamWCoefficients coefficients = MakeCoefficients(settings);
  const ElementType gradient_type = ParseGradientType("adamw", gradient_dtype);
  CheckNumThreads("adamw", num_threads);

  const BufferView m("adamw", "exp_avg", exp_avg, 4, "f", Access::kWrite);
  const BufferView v("adamw", "exp_avg_sq", exp_avg_sq, 4, "f", Access::kWrite);
  m.CheckWholeElements();
  const std::size_t numel = m.numel();
  v.CheckNumel(numel);
  const BufferView g = GradientView("adamw", gradient, gradient_type);
  g.CheckNumel(numel);

  AdamWArrays arrays{g.data(),
                     gradient_type,
                     nullptr,
                     nullptr,
                     static_cast<float*>(m.data()),
                     static_cast<float*>(v.data())};
  const auto compute = [&] {
    const py::gil_scoped_release unlocked;
    ForEachBlock(numel, num_threads, [&](std::size_t, std::size_t begin, std::size_t end) {
      kernels.adamw(coefficients, arrays, begin, end);
    });
  };

  if (residual.is_none()) {
    const BufferView master("adamw", "weights", weights, 4, "f", Access::kWrite);
    master.CheckNumel(numel);
    arrays.weights = master.data();
    compute();
  } else {
    const BufferView high("adamw", "weights", weights, 2, "hH", Access::kWrite);
    const BufferView low("adamw", "residual", residual, 2, "h", Access::kWrite);
    high.CheckNumel(numel);
    low.CheckNumel(numel);
    arrays.weights = high.data();
    arrays.residual = static_cast<std::int16_t*>(low.data());
    compute();
  }
}

py::tuple SquaredNormOf(const Kernels& chosen, const py::object& gradient,
                        const std::string& gradient_dtype, int num_threads,
                        const std::string& isa) {
  const Kernels kernels = KernelsOrDefault(isa, chosen);
  const ElementType type = ParseGradientType("squared_norm", gradient_dtype);
  CheckNumThreads("squared_norm", num_threads);
  const BufferView g = GradientView("squared_norm", gradient, type);
  g.CheckWholeElements();
  double sum = 0;
  {
    const py::gil_scoped_release unlocked;
    sum = SquaredNorm(kernels.norm, g.data(), type, g.numel(), num_threads);
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
  const Kernels chosen = KernelsFor(active);

  m.def("active_isa", [active] { return active; });
  m.def("supported_isas", [] { return py::tuple(py::cast(SupportedIsas())); });
  m.def(
      "adamw",
      [chosen](const py::object& gradient, const py::object& weights, const py::object& residual,
               const py::object& exp_avg, const py::object& exp_avg_sq, double lr, double beta1,
               double beta2, double eps, double weight_decay, std::int64_t step, double grad_scale,
               const std::string& gradient_dtype, int num_threads, const std::string& isa) {
        AdamW(chosen, gradient, weights, residual, exp_avg, exp_avg_sq, gradient_dtype,
              {lr, beta1, beta2, eps, weight_decay, step, grad_scale}, num_threads, isa);
      },
      py::arg("gradient"), py::arg("weights"), py::arg("residual"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
      py::arg("eps"), py::arg("weight_decay"), py::arg("step"), py::arg("grad_scale") = 1.0,
      py::arg("gradient_dtype") = "float32", py::arg("num_threads") = 1, py::arg("isa") = "auto");
  m.def(
      "squared_norm",
      [chosen](const py::object& gradient, const std::string& gradient_dtype, int num_threads,
               const std::string& isa) {
        return SquaredNormOf(chosen, gradient, gradient_dtype, num_threads, isa);
      },
      py::arg("gradient"), py::kw_only(), py::arg("gradient_dtype") = "float32",
      py::arg("num_threads") = 1, py::arg("isa") = "auto");
}
