// The Python face of a transfer in flight.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "aio/engine.h"
#include "aio/held_buffer.h"

namespace offload::aio {

// A request and the buffers that may be given back. Every method is called with the GIL, by any
// thread; dropping it lets the transfer go on.
class PyRequest {
 public:
  PyRequest(std::shared_ptr<Request> request, std::shared_ptr<ReleaseList> releases) noexcept
      : request_(std::move(request)), releases_(std::move(releases)) {}

  // Return the bytes moved. Throws what went wrong with the transfer,
  // RequestTimeoutError after `timeout_s`, KeyboardInterrupt at Ctrl-C.
  uint64_t wait(std::optional<double> timeout_s);
  bool done() const;
  bool cancel();
  // Seconds on the clock of time.perf_counter(), which is the steady clock on Linux.
  std::optional<double> finished_s() const;

 private:
  std::shared_ptr<Request> request_;
  std::shared_ptr<ReleaseList> releases_;
};

// Define `Request` in a module.
void bind_request(pybind11::module_& m);

}  // namespace offload::aio
