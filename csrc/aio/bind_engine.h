// The Python face of an engine.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "aio/bind_file.h"
#include "aio/bind_request.h"
#include "aio/engine.h"
#include "aio/held_buffer.h"

namespace offload::aio {

// Owns an engine until it is closed. Every method is called with the GIL, by any thread.
class PyEngine {
 public:
  // Throws ValueError for a setting out of range, std::invalid_argument for an unknown name,
  // std::system_error when the kernel refuses what the engine needs.
  PyEngine(const std::string& name, unsigned queue_depth, uint64_t segment_nbytes, unsigned threads,
           bool direct);
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;
  // Finishes what is in flight.
  ~PyEngine() noexcept;

  const std::string& name() const noexcept { return name_; }
  unsigned queue_depth() const noexcept { return queue_depth_; }

  PyFile open(const pybind11::object& path, const std::string& mode, std::optional<int> dir_fd);
  // Hold the export of `buffer` until the transfer has ended.
  PyRequest submit(const std::string& op_name, const PyFile& file, const pybind11::object& buffer,
                   int64_t file_offset, std::optional<int64_t> nbytes);
  void sync(const PyFile& file);
  // Finish what is in flight; Ctrl-C ends the wait. Every later call throws StateError.
  void close();

 private:
  std::shared_ptr<Engine> usable_engine() const;

  std::string name_;
  unsigned queue_depth_ = 0;
  const bool direct_;
  std::shared_ptr<ReleaseList> releases_;
  // Shared, so that close() does not pull the engine from under another thread's submit().
  std::shared_ptr<Engine> engine_;
};

// Define `Engine` in a module.
void bind_engine(pybind11::module_& m);

}  // namespace offload::aio
