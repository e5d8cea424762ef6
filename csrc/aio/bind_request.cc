#include "aio/bind_request.h"

#include <pybind11/stl.h>

#include <chrono>

#include "aio/bind_gil.h"
#include "aio/bind_wait.h"
#include "aio/python_errors.h"

namespace offload::aio {

uint64_t PyRequest::wait(std::optional<double> timeout_s) {
  if (!wait_interruptibly(timeout_s, [this](auto slice) { return request_->wait_for(slice); })) {
    set_error(py::module_::import("offload.aio.failures")
                  .attr("timeout_error")(request_->op() == Op::kRead ? "read" : "write",
                                         decode_path(request_->path()), *timeout_s,
                                         py::arg("offset_bytes") = request_->offset(),
                                         py::arg("asked_nbytes") = request_->nbytes()));
    throw py::error_already_set();
  }
  releases_->release_all();
  return request_->result();
}

bool PyRequest::done() const {
  releases_->release_all();
  return request_->done();
}

bool PyRequest::cancel() {
  bool cancelled = false;
  {
    const GilReleased no_gil;
    cancelled = request_->cancel();
  }
  releases_->release_all();
  return cancelled;
}

std::optional<double> PyRequest::finished_s() const {
  if (!request_->done()) return std::nullopt;
  return std::chrono::duration<double>(request_->finished_at().time_since_epoch()).count();
}

void bind_request(py::module_& m) {
  py::class_<PyRequest>(m, "Request", "A transfer in flight; see offload.aio.Request.")
      .def("wait", &PyRequest::wait, py::arg("timeout_s") = py::none())
      .def("done", &PyRequest::done)
      .def("cancel", &PyRequest::cancel)
      .def_property_readonly("finished_s", &PyRequest::finished_s);
}

}  // namespace offload::aio
