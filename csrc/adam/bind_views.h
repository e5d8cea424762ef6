// Python's buffers as the arrays of the kernels: checked when a view is made, held until it goes.
//
// Every check raises ValueError (py::value_error), with the function and the argument in front.
#ifndef OFFLOAD_ADAM_BIND_VIEWS_H_
#define OFFLOAD_ADAM_BIND_VIEWS_H_

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "adam/element.h"
#include "adam/moments8.h"

namespace offload::adam {

namespace py = pybind11;

enum class Access { kRead, kWrite };

// A contiguous export of a Python object's memory, held until destruction (with the GIL).
class BufferView {
 public:
  // `formats`: the struct characters accepted besides bytes, as "f" or "hH".
  BufferView(std::string_view function, const char* name, const py::object& object,
             std::size_t itemsize, std::string_view formats, Access access);
  ~BufferView();
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;

  void* data() const { return view_.buf; }
  std::size_t numel() const { return static_cast<std::size_t>(view_.len) / itemsize_; }

  // `from`: where that number comes from, for the message.
  void CheckNumel(std::size_t numel, const char* from = "exp_avg has") const;
  void CheckWholeElements() const;

 private:
  void CheckFormat(std::string_view formats) const;
  void CheckAlignment() const;

  std::string label_;
  std::size_t itemsize_;
  Py_buffer view_;
};

ElementType ParseGradientType(std::string_view function, std::string_view dtype);
BufferView GradientView(std::string_view function, const py::object& gradient, ElementType type);
void CheckNumThreads(std::string_view function, int num_threads);

// The master weights of an update, whole or split, held until destruction.
class WeightsView {
 public:
  WeightsView(std::string_view function, const py::object& weights, const py::object& residual,
              std::size_t numel);

  void* weights() const { return weights_.data(); }
  std::int16_t* residual() const {
    return residual_ == nullptr ? nullptr : static_cast<std::int16_t*>(residual_->data());
  }

 private:
  BufferView weights_;
  std::unique_ptr<BufferView> residual_;
};

// The codes and scales of an 8-bit moment, held until destruction.
class MomentView {
 public:
  MomentView(std::string_view function, const std::string& name, const py::tuple& moment,
             Access access);

  std::size_t numel() const { return codes_.numel(); }
  void CheckNumel(std::size_t numel) const { codes_.CheckNumel(numel); }
  Moment8 arrays() const {
    return {static_cast<std::uint8_t*>(codes_.data()), static_cast<std::uint16_t*>(scales_.data())};
  }

 private:
  BufferView codes_;
  BufferView scales_;
};

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_BIND_VIEWS_H_
