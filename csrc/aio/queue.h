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

// Cuts the requests of one drive into segments, only when an engine can begin one, and judges what
// came of each. Order: requests somebody waits for, in the order of those waits, then the others in
// the order they came. Knows no way of doing I/O itself. Thread-safe; made by std::make_shared.
class SegmentQueue : public std::enable_shared_from_this<SegmentQueue> {
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

  // Somebody waits for `request`: put it before those that nobody waits for.
  void expedite(const Request& request);

  // Begin nothing more of `request`, which fails with ECANCELED unless all of it has begun; return
  // whether there was anything left.
  bool cancel(Request& request);

  // Refuse further requests; those accepted go on.
  void refuse_new() noexcept;

  // Whether refuse_new() was called and every segment has been handed out.
  [[nodiscard]] bool exhausted();

  // Whether try_take() would find something.
  [[nodiscard]] bool has_work();

  // Wait up to `timeout` until every request is done; return whether that is so.
  [[nodiscard]] bool wait_idle(std::chrono::nanoseconds timeout);

 private:
  using Requests = std::deque<std::shared_ptr<Request>>;

  std::optional<Segment> take_locked();
  // Those with something left to cut, what is cut to its end dropped from the front; may be empty.
  Requests& next_requests_locked();
  void finish(Request& request);

  const uint64_t segment_nbytes_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable idle_;
  Requests urgent_;        // somebody waits for them
  Requests waiting_;       // nobody does yet
  uint64_t num_open_ = 0;  // requests pushed and not done
  bool refusing_ = false;
};

}  // namespace offload::aio
