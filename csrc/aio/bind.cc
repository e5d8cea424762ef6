// The Python module: the engines' handles, which bind_*.cc define, and CRC-32C.

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string_view>

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
  m.def("active_isa", &active_isa, "The instruction set crc32c uses: 'sse4.2' or 'scalar'.");
  // For the tests: the reference that the fast ones are held against.
  m.def(
      "_crc32c_scalar",
      [](const py::bytes& data, uint32_t seed) {
        const std::string_view view(data);
        return ~crc32c_scalar(reinterpret_cast<const std::byte*>(view.data()), view.size(), ~seed);
      },
      py::arg("data"), py::arg("seed") = 0);
}
