// The Python face of an open file.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "aio/engine.h"

namespace offload::aio {

// One owner of a file. Every method is called with the GIL, by any thread.
class PyFile {
 public:
  explicit PyFile(std::shared_ptr<File> file) noexcept : file_(std::move(file)) {}
  PyFile(PyFile&&) noexcept = default;
  PyFile& operator=(PyFile&&) = delete;
  // Without the GIL: the last owner closes the descriptors.
  ~PyFile() noexcept;

  const std::shared_ptr<File>& file() const noexcept { return file_; }

  // Wait for what is in flight on it, then close it; Ctrl-C ends the wait.
  void close();

 private:
  std::shared_ptr<File> file_;
};

// Define `File` in a module.
void bind_file(pybind11::module_& m);

}  // namespace offload::aio
