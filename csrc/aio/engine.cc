#include "aio/engine.h"

#include <unistd.h>

#include <utility>

#include "aio/error.h"

namespace offload::aio {

Engine::Engine(std::string name, unsigned queue_depth, uint64_t segment_nbytes)
    : queue_(segment_nbytes),
      name_(std::move(name)),
      queue_depth_(queue_depth),
      owner_(::getpid()) {}

bool Engine::forked() const noexcept { return ::getpid() != owner_; }

void Engine::check_process() const {
  if (forked()) {
    throw StateError(
        "the I/O engine belongs to the parent of this process; open one after the fork");
  }
}

void Engine::submit(std::shared_ptr<Request> request) {
  check_process();
  queue_.push(std::move(request));
  wake();
}

bool Engine::drain(std::chrono::nanoseconds timeout) {
  queue_.refuse_new();
  wake();
  return queue_.wait_idle(timeout);
}

}  // namespace offload::aio
