// Python buffers lent to requests: taken back under the GIL, whatever thread lets go of them.
#pragma once

#include <Python.h>
#include <unistd.h>

#include <memory>
#include <mutex>
#include <utility>

namespace offload::aio {

// One export of the buffer protocol.
struct HeldBuffer {
  Py_buffer view{};
  std::unique_ptr<HeldBuffer> next;
};

// Exports that no request needs any more, waiting for a thread with the GIL. An I/O thread only
// links them in: it neither takes the GIL nor allocates.
class ReleaseList {
 public:
  ReleaseList() = default;
  ReleaseList(const ReleaseList&) = delete;
  ReleaseList& operator=(const ReleaseList&) = delete;
  // What is left when nobody with the GIL came by again (the interpreter is gone) is not released.
  ~ReleaseList() noexcept {
    while (pop()) {
    }
  }

  void push(std::unique_ptr<HeldBuffer> buffer) noexcept {
    const std::lock_guard lock(mutex_);
    buffer->next = std::move(head_);
    head_ = std::move(buffer);
  }

  // Release all of them. With the GIL; runs Python code when an export was an object's last owner.
  // Not in a forked child: an I/O thread may have held the lock when it was made.
  void release_all() noexcept {
    if (::getpid() != owner_) return;
    while (std::unique_ptr<HeldBuffer> buffer = pop()) PyBuffer_Release(&buffer->view);
  }

 private:
  std::unique_ptr<HeldBuffer> pop() noexcept {
    const std::lock_guard lock(mutex_);
    std::unique_ptr<HeldBuffer> first = std::move(head_);
    if (first) head_ = std::move(first->next);
    return first;
  }

  const pid_t owner_ = ::getpid();
  std::mutex mutex_;
  std::unique_ptr<HeldBuffer> head_;
};

// Gives its buffer to a ReleaseList when it goes. Made in one allocation per request.
class BufferLoan {
 public:
  BufferLoan(std::unique_ptr<HeldBuffer> buffer, std::shared_ptr<ReleaseList> list) noexcept
      : buffer_(std::move(buffer)), list_(std::move(list)) {}
  BufferLoan(const BufferLoan&) = delete;
  BufferLoan& operator=(const BufferLoan&) = delete;
  ~BufferLoan() noexcept { list_->push(std::move(buffer_)); }

 private:
  std::unique_ptr<HeldBuffer> buffer_;
  std::shared_ptr<ReleaseList> list_;
};

}  // namespace offload::aio
