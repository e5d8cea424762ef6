#include "aio/request.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "aio/error.h"
#include "aio/queue.h"

namespace offload::aio {

Request::Request(Op op, File::Pin pin, std::byte* address, uint64_t offset, uint64_t nbytes,
                 std::shared_ptr<void> keeper)
    : op_(op),
      offset_(offset),
      nbytes_(nbytes),
      path_(pin.file().path()),
      device_(pin.file().device()),
      owner_(::getpid()),
      address_(address),
      pin_(std::move(pin)),
      keeper_(std::move(keeper)) {}

void Request::check_process() const {
  if (::getpid() != owner_) {
    throw StateError("this request was submitted by the parent of this process; wait for it there");
  }
}

bool Request::wait_for(std::chrono::nanoseconds timeout) {
  if (done()) return true;
  check_process();
  if (!is_expedited_.exchange(true)) {
    if (const std::shared_ptr<SegmentQueue> queue = queue_.lock()) queue->expedite(*this);
  }
  std::unique_lock lock(mutex_);
  return finished_.wait_for(lock, timeout, [this] { return done(); });
}

bool Request::cancel() {
  if (done()) return false;
  check_process();
  // Without a queue the engine is gone, and every request of it done.
  const std::shared_ptr<SegmentQueue> queue = queue_.lock();
  return queue && queue->cancel(*this);
}

uint64_t Request::result() const {
  if (!failed_) return nbytes_;
  Failure failure{op_ == Op::kRead ? "read" : "write", path_, error_};
  failure.offset = offset_;
  failure.asked_nbytes = nbytes_;
  failure.got_nbytes = failed_at_;
  throw IoError(std::move(failure));
}

void Request::finish() noexcept {
  finished_at_ = std::chrono::steady_clock::now();
  if (op_ == Op::kRead && nbytes_ != 0) pin_.file().drop_cache(offset_, nbytes_);
  keeper_.reset();
  {
    const std::lock_guard lock(mutex_);
    done_.store(true, std::memory_order_release);
    finished_.notify_all();
  }
  pin_.release();  // last: who has closed the file finds every request on it done
}

Piece next_piece(const DirectLimits& limits, uint64_t offset, uintptr_t address, uint64_t nbytes,
                 uint64_t segment_nbytes) noexcept {
  const uint64_t most = std::min(nbytes, segment_nbytes);
  if (!limits.usable) return {most, false};
  const uint64_t align = limits.offset_align;
  const uint64_t head = (align - offset % align) % align;
  if ((address + head) % limits.memory_align != 0) return {most, false};
  if (head != 0) return {std::min(head, most), false};
  const uint64_t body = most / align * align;
  if (body != 0) return {body, true};
  // Less than one aligned block is left, or a segment is smaller than the alignment.
  return {most, false};
}

}  // namespace offload::aio
