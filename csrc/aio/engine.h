// What the engines of this extension have in common: a queue, an owner process, an end.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "aio/queue.h"

namespace offload::aio {

// Accepts requests and completes them on threads of its own. Destroying an engine finishes what is
// in flight and joins its threads; a forked child must not destroy it (its threads are not there).
class Engine {
 public:
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine() noexcept = default;

  const std::string& name() const noexcept { return name_; }

  // The largest number of segments in flight.
  unsigned queue_depth() const noexcept { return queue_depth_; }

  // Queue one request and return; never waits for I/O. Throws StateError when closed or forked.
  void submit(std::shared_ptr<Request> request);

  // Throws StateError when this process is not the one that made the engine.
  void check_process() const;
  bool forked() const noexcept;

  // Refuse further requests and wait up to `timeout` for the rest; return whether all are done.
  bool drain(std::chrono::nanoseconds timeout);

 protected:
  Engine(std::string name, unsigned queue_depth, uint64_t segment_nbytes);

  // Called after each change of the queue, on the caller's thread.
  virtual void wake() noexcept = 0;

  SegmentQueue queue_;

 private:
  const std::string name_;
  const unsigned queue_depth_;
  const pid_t owner_;
};

// Worker threads that each do one blocking preadv or pwritev at a time. Throws std::system_error
// when a thread cannot be started.
std::unique_ptr<Engine> make_threads_engine(unsigned num_threads, uint64_t segment_nbytes);

// One thread that drives an io_uring of `queue_depth` segments. Throws std::system_error when the
// kernel refuses (EPERM: seccomp or sysctl; ENOSYS: not built in; EINVAL: older than 5.6).
std::unique_ptr<Engine> make_uring_engine(unsigned queue_depth, uint64_t segment_nbytes);

}  // namespace offload::aio
