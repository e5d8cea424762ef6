// Paths and exceptions between C++ and Python. For bind*.cc alone; everything here needs the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <system_error>

#include "aio/error.h"

namespace offload::aio {

namespace py = pybind11;

// A path as Python has it: bytes that are not UTF-8 become surrogates, as in os.fsdecode.
inline py::str decode_path(const std::string& path) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

// The bytes of a str, bytes or os.PathLike. Throws ValueError for an embedded zero.
inline std::string encode_path(const py::object& path) {
  PyObject* encoded = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &encoded) == 0) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(encoded);
}

// The StorageError or DiskFullError of a failure; Python has the words for all engines.
inline py::object io_error(const Failure& failure) {
  return py::module_::import("offload.aio.failures")
      .attr("io_error")(failure.action, decode_path(failure.path), failure.error,
                        py::arg("detail") = failure.detail,
                        py::arg("offset_bytes") = failure.offset,
                        py::arg("asked_nbytes") = failure.asked_nbytes,
                        py::arg("got_nbytes") = failure.got_nbytes);
}

// Make `error` the exception that the current call raises.
inline void set_error(py::handle error) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

// The one translator: our exceptions to those of offload.errors, others to pybind11.
inline void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const IoError& error) {
    set_error(io_error(error.failure()));
  } catch (const std::system_error& error) {
    set_error(py::module_::import("offload.errors")
                  .attr("StorageError")(error.what(), py::arg("errno") = error.code().value()));
  } catch (const StateError& error) {
    set_error(py::module_::import("offload.errors").attr("StateError")(decode_path(error.what())));
  }
}

}  // namespace offload::aio
