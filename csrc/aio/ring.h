// One io_uring by its system calls: the two rings, the entries, and nothing about files.
#pragma once

#include <linux/io_uring.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "aio/fd.h"

namespace offload::aio {

// An mmap that goes with its object and is not inherited by a fork.
class Mapping {
 public:
  Mapping() noexcept = default;
  // Throws std::system_error.
  Mapping(int fd, size_t nbytes, off_t offset);
  Mapping(Mapping&& other) noexcept
      : address_(std::exchange(other.address_, nullptr)), nbytes_(other.nbytes_) {}
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping() noexcept;

  // The object `offset_bytes` from the start.
  template <typename T>
  T* at(size_t offset_bytes) const noexcept {
    return reinterpret_cast<T*>(static_cast<std::byte*>(address_) + offset_bytes);
  }

 private:
  void* address_ = nullptr;
  size_t nbytes_ = 0;
};

// Not thread-safe: made and used on one thread, which lets the kernel skip its locks
// (IORING_SETUP_SINGLE_ISSUER). The caller keeps at most `entries` operations between next_entry()
// and their completion, so neither ring can overflow.
class Ring {
 public:
  // Throws std::system_error: EPERM, ENOSYS, ENOMEM, or EINVAL for a kernel before 5.6.
  static Ring make(unsigned entries);

  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // A zeroed submission entry to fill in; the kernel sees it at the next enter().
  [[nodiscard]] io_uring_sqe& next_entry() noexcept;

  // Submit what next_entry() gave and, once all of that is taken, wait for a completion. Returns 0
  // or the errno; what the kernel did not take stays for the next call.
  [[nodiscard]] int enter() noexcept;

  // Call `take(user_data, result)` for every completion there is.
  template <typename Take>
  void reap(Take take) {
    unsigned head = *cq_head_;
    while (head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) {
      const io_uring_cqe entry = cqes_[head & cq_mask_];
      __atomic_store_n(cq_head_, ++head, __ATOMIC_RELEASE);
      take(entry.user_data, entry.res);
    }
  }

  // Take back every entry the kernel has not consumed, calling `take(user_data)`. After enter()
  // failed for good.
  template <typename Take>
  void take_back(Take take) {
    const unsigned head = __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
    const unsigned tail = tail_;
    tail_ = head;
    __atomic_store_n(sq_tail_, head, __ATOMIC_RELEASE);
    for (unsigned i = head; i != tail; ++i) take(entries_[i & sq_mask_].user_data);
  }

 private:
  Ring(UniqueFd fd, const io_uring_params& params);

  const UniqueFd fd_;
  const Mapping rings_;
  const Mapping entries_mapping_;
  unsigned* const sq_head_;
  unsigned* const sq_tail_;
  const unsigned sq_mask_;
  unsigned* const cq_head_;
  unsigned* const cq_tail_;
  const unsigned cq_mask_;
  io_uring_cqe* const cqes_;
  io_uring_sqe* const entries_;
  unsigned tail_ = 0;  // of the entries given out; the shared tail follows at enter()
};

}  // namespace offload::aio
