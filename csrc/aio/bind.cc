// The Python module: the engines' handles, which bind_*.cc define, and CRC-32C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "aio/bind_engine.h"
#include "aio/bind_file.h"
#include "aio/bind_gil.h"
#include "aio/bind_request.h"
#include "aio/crc32c.h"
#include "aio/held_buffer.h"
#include "aio/python_errors.h"

namespace py = pybind11;

namespace offload::aio {
namespace {

uint32_t py_crc32c(const py::object& buffer, uint32_t seed) {
  HeldBuffer held;
  if (PyObject_GetBuffer(buffer.ptr(), &held.view, PyBUF_SIMPLE) != 0)
    throw py::error_already_set();
  uint32_t crc = 0;
  {
    const GilReleased no_gil;
    crc = crc32c(static_cast<const std::byte*>(held.view.buf), static_cast<size_t>(held.view.len),
                 seed);
  }
  PyBuffer_Release(&held.view);
  return crc;
}

uint32_t crc32c_by(const std::string& isa, const py::buffer& data, uint32_t seed) {
  const py::buffer_info view = data.request();
  for (const Crc32cIsa& one : crc32c_isas()) {
    if (one.name != isa) continue;
    return ~one.update(static_cast<const std::byte*>(view.ptr),
                       static_cast<size_t>(view.size * view.itemsize), ~seed);
  }
  throw py::value_error("this CPU has no crc32c by " + isa);
}

}  // namespace
}  // namespace offload::aio

PYBIND11_MODULE(_aio, m) {
  using namespace offload::aio;
  m.doc() = "The io_uring and thread engines, and CRC-32C; see offload.aio.";
  py::register_local_exception_translator(translate);

  bind_file(m);
  bind_request(m);
  bind_engine(m);

  m.def("crc32c", &py_crc32c, py::arg("buffer"), py::arg("seed") = 0,
        "CRC-32C of a contiguous buffer, going on from `seed`.");
  m.def(
      "crc32c_isas",
      [] {
        std::vector<std::string> names;
        for (const Crc32cIsa& isa : crc32c_isas()) names.emplace_back(isa.name);
        return names;
      },
      "The ways to compute crc32c that this CPU has, by their instructions; the first is used.");
  // For the tests, which hold each against one reference.
  m.def("_crc32c_by", &crc32c_by, py::arg("isa"), py::arg("data"), py::arg("seed") = 0);
}
