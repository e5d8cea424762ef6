// Rows of Python's tensors as updates: all of them checked, before anything is changed.
#ifndef OFFLOAD_ADAM_BIND_TENSORS_H_
#define OFFLOAD_ADAM_BIND_TENSORS_H_

#include <pybind11/pybind11.h>

#include <vector>

#include "adam/tensors.h"

namespace offload::adam {

namespace py = pybind11;

// The updates of a call; holds the rows, and so their tensors, until destruction (with the GIL).
class TensorRows {
 public:
  // `groups` as `adamw_tensors` in offload/_adam.pyi has them. Throws py::value_error, with the
  // number of group and row and the name of the tensor, for what does not fit.
  explicit TensorRows(const py::list& groups);

  const std::vector<TensorUpdate>& updates() const { return updates_; }

  // Adds one to the step of each tensor.
  void CountStep() const noexcept;

 private:
  std::vector<py::object> held_;
  std::vector<TensorUpdate> updates_;
  std::vector<float*> steps_;
};

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_BIND_TENSORS_H_
