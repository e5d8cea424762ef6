#include "adam/bind_views.h"

#include <stdexcept>

namespace offload::adam {
namespace {

// One of the two parts of an 8-bit moment.
py::object PartOf(std::string_view function, const std::string& name, const py::tuple& moment,
                  std::size_t index) {
  if (moment.size() == 2) return moment[index];
  throw py::value_error(std::string(function) + ": " + name +
                        " must be (codes, scales), got a tuple of " +
                        std::to_string(moment.size()));
}

}  // namespace

BufferView::BufferView(std::string_view function, const char* name, const py::object& object,
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

BufferView::~BufferView() { PyBuffer_Release(&view_); }

void BufferView::CheckNumel(std::size_t numel, const char* from) const {
  if (static_cast<std::size_t>(view_.len) == numel * itemsize_) return;
  throw py::value_error(label_ + " holds " + std::to_string(view_.len) + " bytes, but " +
                        std::to_string(numel) + " elements (as " + from + ") of " +
                        std::to_string(itemsize_) + " bytes are " +
                        std::to_string(numel * itemsize_));
}

void BufferView::CheckWholeElements() const {
  if (static_cast<std::size_t>(view_.len) % itemsize_ == 0) return;
  throw py::value_error(label_ + " holds " + std::to_string(view_.len) +
                        " bytes, not a multiple of " + std::to_string(itemsize_));
}

void BufferView::CheckFormat(std::string_view formats) const {
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

void BufferView::CheckAlignment() const {
  if (reinterpret_cast<std::uintptr_t>(view_.buf) % itemsize_ == 0 || view_.len == 0) return;
  throw py::value_error(label_ + " does not begin at a multiple of " + std::to_string(itemsize_) +
                        " bytes");
}

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

WeightsView::WeightsView(std::string_view function, const py::object& weights,
                         const py::object& residual, std::size_t numel)
    : weights_(residual.is_none()
                   ? BufferView(function, "weights", weights, 4, "f", Access::kWrite)
                   : BufferView(function, "weights", weights, 2, "hH", Access::kWrite)) {
  weights_.CheckNumel(numel);
  if (residual.is_none()) return;
  residual_ = std::make_unique<BufferView>(function, "residual", residual, 2, "h", Access::kWrite);
  residual_->CheckNumel(numel);
}

MomentView::MomentView(std::string_view function, const std::string& name, const py::tuple& moment,
                       Access access)
    : codes_(function, (name + " codes").c_str(), PartOf(function, name, moment, 0), 1, "B",
             access),
      scales_(function, (name + " scales").c_str(), PartOf(function, name, moment, 1), 2, "hH",
              access) {
  scales_.CheckNumel(NumScales(codes_.numel()), "one for each 128 of the codes");
}

}  // namespace offload::adam
