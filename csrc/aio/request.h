// One read or write asked for by a caller, and the segments it is cut into.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "aio/file.h"

namespace offload::aio {

class SegmentQueue;

enum class Op { kRead, kWrite };

// One transfer of up to the whole buffer. Shared by the caller's handle and the engine; the public
// methods may be called from any thread, the rest belongs to SegmentQueue.
class Request {
 public:
  // `keeper` owns the memory; it is let go once no transfer can touch the memory any more, on
  // whatever thread that happens, and before done() turns true.
  Request(Op op, File::Pin pin, std::byte* address, uint64_t offset, uint64_t nbytes,
          std::shared_ptr<void> keeper);

  Op op() const noexcept { return op_; }
  uint64_t offset() const noexcept { return offset_; }
  uint64_t nbytes() const noexcept { return nbytes_; }
  const std::string& path() const noexcept { return path_; }
  dev_t device() const noexcept { return device_; }

  // Whether the transfer has ended, in success or failure.
  bool done() const noexcept { return done_.load(std::memory_order_acquire); }

  // When the transfer ended. Only after done().
  std::chrono::steady_clock::time_point finished_at() const noexcept { return finished_at_; }

  // Wait up to `timeout` for the end; return done(). The first wait puts the request before those
  // that nobody waits for. Throws StateError in a forked child, where nobody is left to finish it.
  bool wait_for(std::chrono::nanoseconds timeout);

  // Begin no more of it; return whether there was anything left. Throws StateError in a forked
  // child.
  bool cancel();

  // Bytes transferred, all that were asked for; throws IoError when the transfer failed. Only after
  // done().
  uint64_t result() const;

 private:
  friend class SegmentQueue;

  // Give the memory back, wake the waiters, then let go of the file. Once.
  void finish() noexcept;

  void check_process() const;

  const Op op_;
  const uint64_t offset_;
  const uint64_t nbytes_;
  const std::string path_;
  const dev_t device_;
  const pid_t owner_;
  std::byte* const address_;
  File::Pin pin_;
  std::shared_ptr<void> keeper_;
  std::weak_ptr<SegmentQueue> queue_;      // set before the request is shared
  std::atomic<bool> is_expedited_{false};  // waited for once

  // Under the SegmentQueue's lock until finish().
  uint64_t cut_nbytes_ = 0;  // handed out as segments so far
  uint64_t num_live_ = 0;    // segments handed out and not settled
  bool failed_ = false;      // the fields below hold the failure nearest the start
  int error_ = 0;            // errno of it; 0 for an early end of file
  uint64_t failed_at_ = 0;   // bytes of this request before it

  std::mutex mutex_;
  std::condition_variable finished_;
  std::chrono::steady_clock::time_point finished_at_{};  // published by done_
  std::atomic<bool> done_{false};
};

// A run of one request small enough to be one operation of an engine. `address`, `offset` and
// `nbytes` describe what is left of it.
struct Segment {
  std::shared_ptr<Request> request;
  int fd = -1;
  bool direct = false;
  std::byte* address = nullptr;
  uint64_t offset = 0;
  uint64_t nbytes = 0;
  int num_retries = 0;
};

struct Piece {
  uint64_t nbytes;
  bool direct;
};

// Length and way of the next segment of a transfer of `nbytes` (> 0) between `offset` and
// `address`: pieces on the direct path respect `limits`, others end where the direct path can
// begin.
Piece next_piece(const DirectLimits& limits, uint64_t offset, uintptr_t address, uint64_t nbytes,
                 uint64_t segment_nbytes) noexcept;

}  // namespace offload::aio
