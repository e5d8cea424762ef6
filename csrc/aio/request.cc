#include "aio/request.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "aio/error.h"

namespace offload::aio {

Request::Request(Op op, File::Pin pin, std::byte* address, uint64_t offset, uint64_t nbytes,
                 std::shared_ptr<void> keeper)
    : op_(op),
      offset_(offset),
      nbytes_(nbytes),
      path_(pin.file().path()),
      owner_(::getpid()),
      address_(address),
      pin_(std::move(pin)),
      keeper_(std::move(keeper)) {}

bool Request::wait_for(std::chrono::nanoseconds timeout) {
  if (done()) return true;
  if (::getpid() != owner_) {
    throw StateError("this request was submitted by the parent of this process; wait for it there");
  }
  std::unique_lock lock(mutex_);
  return finished_.wait_for(lock, timeout, [this] { return done(); });
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
  keeper_.reset();
  pin_.release();
  const std::lock_guard lock(mutex_);
  done_.store(true, std::memory_order_release);
  finished_.notify_all();
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
