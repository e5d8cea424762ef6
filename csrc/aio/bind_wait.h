// Waits that other Python threads and Ctrl-C get through. For bind*.cc alone.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "aio/bind_gil.h"

namespace offload::aio {

namespace py = pybind11;

// How long a wait goes without a look for Ctrl-C.
constexpr std::chrono::milliseconds kSlice{100};

// Call `step` (without the GIL, at most kSlice long) until it returns true; false when `timeout_s`
// has passed first. Ctrl-C ends it with KeyboardInterrupt.
template <typename Step>
bool wait_interruptibly(std::optional<double> timeout_s, Step step) {
  using Clock = std::chrono::steady_clock;
  // A century is as good as for ever and does not overflow the clock.
  constexpr double kForever_s = 100.0 * 365 * 86400;
  if (timeout_s && std::isnan(*timeout_s)) throw py::value_error("timeout_s is not a number");
  const std::chrono::duration<double> allowed(
      std::clamp(timeout_s.value_or(kForever_s), 0.0, kForever_s));
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(allowed);
  for (;;) {
    {
      const GilReleased no_gil;
      const Clock::duration left = std::max(deadline - Clock::now(), Clock::duration::zero());
      if (step(std::min<std::chrono::nanoseconds>(left, kSlice))) return true;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (Clock::now() >= deadline) return false;
  }
}

}  // namespace offload::aio
