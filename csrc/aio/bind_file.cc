#include "aio/bind_file.h"

#include <cstdint>
#include <optional>

#include "aio/bind_gil.h"
#include "aio/bind_wait.h"
#include "aio/python_errors.h"

namespace offload::aio {

PyFile::~PyFile() noexcept {
  if (!file_) return;
  const GilReleased no_gil;
  file_.reset();
}

void PyFile::close() {
  wait_interruptibly(std::nullopt, [this](auto slice) { return file_->close(slice); });
}

void bind_file(py::module_& m) {
  py::class_<PyFile>(m, "File", "An open file of a native engine; see offload.aio.File.")
      .def_property_readonly("path",
                             [](const PyFile& self) { return decode_path(self.file()->path()); })
      .def_property_readonly("direct",
                             [](const PyFile& self) { return self.file()->limits().usable; })
      .def_property_readonly("size_nbytes",
                             [](const PyFile& self) {
                               const GilReleased no_gil;
                               return size_nbytes(self.file());
                             })
      .def(
          "allocate", [](const PyFile& self, uint64_t nbytes) { allocate(self.file(), nbytes); },
          py::arg("nbytes"), py::call_guard<GilReleased>())
      .def("close", &PyFile::close)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](PyFile& self, const py::args&) { self.close(); });
}

}  // namespace offload::aio
