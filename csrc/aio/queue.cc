#include "aio/queue.h"

#include <cerrno>
#include <utility>

#include "aio/error.h"

namespace offload::aio {
namespace {

// EINTR and EAGAIN on a regular file are rare and pass; a device that answers nothing else is
// broken.
constexpr int kMaxRetries = 64;

}  // namespace

void SegmentQueue::push(std::shared_ptr<Request> request) {
  const bool empty = request->nbytes_ == 0;
  Request& pushed = *request;
  {
    const std::lock_guard lock(mutex_);
    if (refusing_) throw StateError("the I/O engine is closed; open another");
    if (!empty) {
      waiting_.push_back(std::move(request));
      ++num_open_;
    }
  }
  if (empty) {
    pushed.finish();
  } else {
    work_.notify_all();
  }
}

std::optional<Segment> SegmentQueue::try_take() {
  const std::lock_guard lock(mutex_);
  return take_locked();
}

std::optional<Segment> SegmentQueue::take() {
  std::unique_lock lock(mutex_);
  for (;;) {
    std::optional<Segment> segment = take_locked();
    if (segment || refusing_) return segment;
    work_.wait(lock);
  }
}

// A request that failed counts as cut to its end, so that its rest is never begun.
void SegmentQueue::drop_cut_requests_locked() {
  while (!waiting_.empty() && waiting_.front()->cut_nbytes_ == waiting_.front()->nbytes_) {
    waiting_.pop_front();
  }
}

std::optional<Segment> SegmentQueue::take_locked() {
  drop_cut_requests_locked();
  if (waiting_.empty()) return std::nullopt;
  Request& request = *waiting_.front();
  const File& file = request.pin_.file();
  Segment segment;
  segment.request = waiting_.front();
  segment.address = request.address_ + request.cut_nbytes_;
  segment.offset = request.offset_ + request.cut_nbytes_;
  const Piece piece =
      next_piece(file.limits(), segment.offset, reinterpret_cast<uintptr_t>(segment.address),
                 request.nbytes_ - request.cut_nbytes_, segment_nbytes_);
  segment.nbytes = piece.nbytes;
  segment.direct = piece.direct;
  segment.fd = piece.direct ? file.direct_fd() : file.buffered_fd();
  request.cut_nbytes_ += piece.nbytes;
  ++request.num_live_;
  return segment;
}

bool SegmentQueue::settle(Segment& segment, int64_t result) {
  Request& request = *segment.request;
  if (result > 0 && static_cast<uint64_t>(result) < segment.nbytes) {
    segment.address += result;
    segment.offset += static_cast<uint64_t>(result);
    segment.nbytes -= static_cast<uint64_t>(result);
    segment.num_retries = 0;
    // At the end of an odd-sized file a direct read comes back short at an offset that O_DIRECT
    // would then refuse; the buffered descriptor takes any. See [Note: two descriptors] in file.cc.
    const File& file = request.pin_.file();
    if (segment.direct && segment.offset % file.limits().offset_align != 0) {
      segment.direct = false;
      segment.fd = file.buffered_fd();
    }
    return true;
  }
  if ((result == -EINTR || result == -EAGAIN) && ++segment.num_retries <= kMaxRetries) return true;

  bool last = false;
  {
    const std::lock_guard lock(mutex_);
    if (result <= 0) {
      const uint64_t failed_at = segment.offset - request.offset_;
      if (!request.failed_ || failed_at < request.failed_at_) {
        request.failed_at_ = failed_at;
        request.error_ = static_cast<int>(-result);
      }
      request.failed_ = true;
      request.cut_nbytes_ = request.nbytes_;
    }
    --request.num_live_;
    last = request.num_live_ == 0 && request.cut_nbytes_ == request.nbytes_;
  }
  if (last) {
    request.finish();
    const std::lock_guard lock(mutex_);
    --num_open_;
    if (num_open_ == 0) idle_.notify_all();
  }
  segment.request.reset();
  return false;
}

void SegmentQueue::refuse_new() noexcept {
  const std::lock_guard lock(mutex_);
  refusing_ = true;
  work_.notify_all();
}

bool SegmentQueue::exhausted() {
  const std::lock_guard lock(mutex_);
  drop_cut_requests_locked();
  return refusing_ && waiting_.empty();
}

bool SegmentQueue::has_work() {
  const std::lock_guard lock(mutex_);
  drop_cut_requests_locked();
  return !waiting_.empty();
}

bool SegmentQueue::wait_idle(std::chrono::nanoseconds timeout) {
  std::unique_lock lock(mutex_);
  return idle_.wait_for(lock, timeout, [this] { return num_open_ == 0; });
}

}  // namespace offload::aio
