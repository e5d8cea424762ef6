// The requests of one engine, from submission to completion.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "aio/request.h"

namespace offload::aio {

// Cuts requests into segments, in order and only when an engine can begin one, and judges what came
// of each. Knows no way of doing I/O itself. Thread-safe.
class SegmentQueue {
 public:
  explicit SegmentQueue(uint64_t segment_nbytes) : segment_nbytes_(segment_nbytes) {}

  // Append a request; one of zero bytes is done at once. Throws StateError after refuse_new().
  void push(std::shared_ptr<Request> request);

  // The next segment, or none when there is nothing to begin now.
  [[nodiscard]] std::optional<Segment> try_take();

  // The next segment; waits for one. None after refuse_new(), when all have been handed out.
  [[nodiscard]] std::optional<Segment> take();

  // Account for one operation on `segment`, which returned `result` bytes or -errno. True: issue
  // the segment again (it now describes the rest). False: it is over, and with its last segment the
  // request is done.
  [[nodiscard]] bool settle(Segment& segment, int64_t result);

  // Refuse further requests; those accepted go on.
  void refuse_new() noexcept;

  // Whether refuse_new() was called and every segment has been handed out.
  [[nodiscard]] bool exhausted();

  // Whether try_take() would find something.
  [[nodiscard]] bool has_work();

  // Wait up to `timeout` until every request is done; return whether that is so.
  [[nodiscard]] bool wait_idle(std::chrono::nanoseconds timeout);

 private:
  std::optional<Segment> take_locked();
  void drop_cut_requests_locked();

  const uint64_t segment_nbytes_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable idle_;
  std::deque<std::shared_ptr<Request>> waiting_;  // those with something left to cut, oldest first
  uint64_t num_open_ = 0;                         // requests pushed and not done
  bool refusing_ = false;
};

}  // namespace offload::aio
