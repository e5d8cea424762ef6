// What the engines of this extension have in common: a lane for each drive, an owner process, an
// end.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "aio/direct.h"
#include "aio/queue.h"

namespace offload::aio {

// The requests of one drive and the threads that complete them. Destroying a lane finishes what is
// in flight and joins its threads.
class Lane {
 public:
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  virtual ~Lane() noexcept = default;

  SegmentQueue& queue() noexcept { return *queue_; }

  // Called after each change of the queue, on the caller's thread.
  virtual void wake() noexcept = 0;

 protected:
  explicit Lane(uint64_t segment_nbytes) : queue_(std::make_shared<SegmentQueue>(segment_nbytes)) {}

 private:
  const std::shared_ptr<SegmentQueue> queue_;
};

// Accepts requests and completes them on threads of its own, drive by drive: a slow drive takes
// nothing from a fast one. A forked child must not destroy it (its threads are not there).
// Thread-safe.
class Engine {
 public:
  using MakeLane = std::function<std::unique_ptr<Lane>()>;

  // Makes one lane at once, so that a kernel that refuses is known now; throws what `make_lane`
  // throws.
  explicit Engine(MakeLane make_lane);

  // The file, open, and a lane for its drive; see File::open. Also throws what `make_lane` throws.
  std::shared_ptr<File> open(std::string path, Mode mode, int dir_fd, bool try_direct);

  // Queue one request and return; never waits for I/O. Throws StateError when closed or forked.
  void submit(std::shared_ptr<Request> request);

  // Throws StateError when this process is not the one that made the engine.
  void check_process() const;
  bool forked() const noexcept;

  // Refuse further requests and wait up to `timeout` for the rest; return whether all are done.
  bool drain(std::chrono::nanoseconds timeout);

 private:
  Lane& lane_of(dev_t device);

  const MakeLane make_lane_;
  const pid_t owner_;
  DirectTrials trials_;
  std::mutex mutex_;
  bool closing_ = false;
  std::unique_ptr<Lane> spare_;  // of the drive that comes first
  std::map<dev_t, std::unique_ptr<Lane>> lanes_;
};

// Worker threads that each do one blocking preadv or pwritev at a time. Throws std::system_error
// when a thread cannot be started.
std::unique_ptr<Lane> make_threads_lane(unsigned num_threads, uint64_t segment_nbytes);

// One thread that drives an io_uring of `queue_depth` segments. Throws std::system_error when the
// kernel refuses (EPERM: seccomp or sysctl; ENOSYS: not built in; EINVAL: older than 5.6).
std::unique_ptr<Lane> make_uring_lane(unsigned queue_depth, uint64_t segment_nbytes);

}  // namespace offload::aio
