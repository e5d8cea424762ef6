#include "aio/queue.h"

#include <algorithm>
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
  const uint64_t nbytes = request->nbytes_;
  request->queue_ = weak_from_this();
  Request& pushed = *request;
  {
    const std::lock_guard lock(mutex_);
    if (refusing_) throw StateError("the I/O engine is closed; open another");
    if (nbytes != 0) {
      waiting_.push_back(std::move(request));
      ++num_open_;
    }
  }
  if (nbytes == 0) {
    pushed.finish();
  } else if (nbytes <= segment_nbytes_) {
    work_.notify_one();  // an unaligned one may be two segments; who took the first comes back
  } else {
    work_.notify_all();
  }
}

void SegmentQueue::expedite(const Request& request) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find_if(waiting_.begin(), waiting_.end(),
                                  [&](const auto& one) { return one.get() == &request; });
  if (found == waiting_.end()) return;  // all begun, or expedited already
  urgent_.push_back(std::move(*found));
  waiting_.erase(found);
}

bool SegmentQueue::cancel(Request& request) {
  bool last = false;
  {
    const std::lock_guard lock(mutex_);
    if (request.cut_nbytes_ == request.nbytes_) return false;
    request.failed_ = true;
    request.error_ = ECANCELED;
    request.failed_at_ = request.cut_nbytes_;
    request.cut_nbytes_ = request.nbytes_;
    last = request.num_live_ == 0;
  }
  if (last) finish(request);
  return true;
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
SegmentQueue::Requests& SegmentQueue::next_requests_locked() {
  for (Requests* requests : {&urgent_, &waiting_}) {
    while (!requests->empty() && requests->front()->cut_nbytes_ == requests->front()->nbytes_) {
      requests->pop_front();
    }
    if (!requests->empty()) return *requests;
  }
  return waiting_;
}

std::optional<Segment> SegmentQueue::take_locked() {
  const Requests& requests = next_requests_locked();
  if (requests.empty()) return std::nullopt;
  Request& request = *requests.front();
  const File& file = request.pin_.file();
  Segment segment;
  segment.request = requests.front();
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
  if (last) finish(request);
  segment.request.reset();
  return false;
}

void SegmentQueue::finish(Request& request) {
  request.finish();
  const std::lock_guard lock(mutex_);
  --num_open_;
  if (num_open_ == 0) idle_.notify_all();
}

void SegmentQueue::refuse_new() noexcept {
  const std::lock_guard lock(mutex_);
  refusing_ = true;
  work_.notify_all();
}

bool SegmentQueue::exhausted() {
  const std::lock_guard lock(mutex_);
  return refusing_ && next_requests_locked().empty();
}

bool SegmentQueue::has_work() {
  const std::lock_guard lock(mutex_);
  return !next_requests_locked().empty();
}

bool SegmentQueue::wait_idle(std::chrono::nanoseconds timeout) {
  std::unique_lock lock(mutex_);
  return idle_.wait_for(lock, timeout, [this] { return num_open_ == 0; });
}

}  // namespace offload::aio
