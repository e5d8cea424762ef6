// The lane over io_uring: one thread submits and reaps, in batches.

#include <poll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <future>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "aio/engine.h"
#include "aio/io_thread.h"
#include "aio/ring.h"

namespace offload::aio {
namespace {

// user_data of the poll that wakes the driver; segments carry the number of their slot.
constexpr uint64_t kWake = ~uint64_t{0};

UniqueFd make_eventfd() {
  UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd) throw std::system_error(errno, std::generic_category(), "eventfd");
  return fd;
}

bool passes(int error) noexcept { return error == EINTR || error == EAGAIN || error == EBUSY; }

// [Note: one driver]
// submit() only queues: with O_DIRECT, io_uring_enter itself can wait in the block layer for a free
// request. The driver thread sleeps in io_uring_enter, so that one call submits, waits and reaps.
// To be woken for new work it keeps a poll on an eventfd in the ring. A submitter writes to that
// only when `sleeping_` says that the driver has room and has found nothing to do; the driver looks
// at the queue once more after it has set `sleeping_`, so no submission is missed. A driver whose
// ring is full looks at the queue after the next completion anyway.
class UringLane final : public Lane {
 public:
  UringLane(unsigned queue_depth, uint64_t segment_nbytes)
      : Lane(segment_nbytes), queue_depth_(queue_depth), event_(make_eventfd()) {
    std::promise<void> started;
    std::future<void> outcome = started.get_future();
    // The thread owns the promise: set_value() is still inside it when the wait below ends.
    driver_.emplace([this, started = std::move(started)]() mutable { drive(started); });
    try {
      outcome.get();  // rethrows what Ring::make threw
    } catch (...) {
      driver_.reset();
      throw;
    }
  }

  ~UringLane() noexcept override {
    queue().refuse_new();
    wake();
    driver_.reset();  // joins
  }

 private:
  struct State {
    // One more entry than segments: the poll on the eventfd.
    explicit State(unsigned depth) : ring(Ring::make(depth + 1)), slots(depth) {
      for (uint64_t slot = depth; slot-- > 0;) free_slots.push_back(slot);
    }

    Ring ring;
    std::vector<Segment> slots;
    std::vector<uint64_t> free_slots;
    bool wake_armed = false;
  };

  void wake() noexcept override {
    if (!sleeping_.exchange(false)) return;
    const uint64_t one = 1;
    // Fails only when the counter is full, and then the poll fires as well.
    (void)!::write(event_.get(), &one, sizeof one);
  }

  void drive(std::promise<void>& started) noexcept {
    std::optional<State> state;
    try {
      state.emplace(queue_depth_);
    } catch (...) {
      started.set_exception(std::current_exception());
      return;
    }
    started.set_value();
    run(*state);
    // The poll may still be armed; it goes with the ring and refers to none of our memory.
  }

  void run(State& state) noexcept {
    for (;;) {
      while (!state.free_slots.empty()) {
        std::optional<Segment> segment = queue().try_take();
        if (!segment) break;
        const uint64_t slot = state.free_slots.back();
        state.free_slots.pop_back();
        state.slots[slot] = std::move(*segment);
        issue(state, slot);
      }
      if (!state.free_slots.empty()) {
        const bool all_free = state.free_slots.size() == state.slots.size();
        sleeping_.store(true);
        if (queue().has_work()) continue;
        if (all_free && queue().exhausted()) return;
      }
      if (!state.wake_armed) arm_wake(state);
      const int error = state.ring.enter();
      sleeping_.store(false);
      if (error != 0 && !passes(error)) fail_untaken(state, error);
      state.ring.reap([&](uint64_t slot, int32_t result) {
        if (slot == kWake) {
          uint64_t count = 0;
          (void)!::read(event_.get(), &count, sizeof count);
          state.wake_armed = false;
        } else {
          settle(state, slot, result);
        }
      });
    }
  }

  static void issue(State& state, uint64_t slot) noexcept {
    const Segment& segment = state.slots[slot];
    io_uring_sqe& entry = state.ring.next_entry();
    entry.opcode = segment.request->op() == Op::kRead ? IORING_OP_READ : IORING_OP_WRITE;
    entry.fd = segment.fd;
    entry.off = segment.offset;
    entry.addr = reinterpret_cast<uintptr_t>(segment.address);
    entry.len = static_cast<uint32_t>(segment.nbytes);  // segments are at most 1 GiB
    entry.user_data = slot;
  }

  void arm_wake(State& state) noexcept {
    io_uring_sqe& entry = state.ring.next_entry();
    entry.opcode = IORING_OP_POLL_ADD;
    entry.fd = event_.get();
    entry.poll_events = POLLIN;
    entry.user_data = kWake;
    state.wake_armed = true;
  }

  void settle(State& state, uint64_t slot, int64_t result) noexcept {
    if (queue().settle(state.slots[slot], result)) {
      issue(state, slot);
    } else {
      state.free_slots.push_back(slot);
    }
  }

  // io_uring_enter failed in a way that will not pass (a seccomp filter installed since, say): what
  // the kernel has not taken fails with that error; what it has taken is still its own, and is
  // reaped when it comes.
  void fail_untaken(State& state, int error) noexcept {
    state.ring.take_back([&](uint64_t slot) {
      if (slot == kWake) {
        state.wake_armed = false;
      } else {
        (void)queue().settle(state.slots[slot], -error);
        state.free_slots.push_back(slot);
      }
    });
    const timespec pause{0, 10'000'000};  // else this loop would spin until the engine is closed
    ::nanosleep(&pause, nullptr);
  }

  const unsigned queue_depth_;
  const UniqueFd event_;
  std::atomic<bool> sleeping_{false};
  std::optional<IoThread> driver_;
};

}  // namespace

std::unique_ptr<Lane> make_uring_lane(unsigned queue_depth, uint64_t segment_nbytes) {
  return std::make_unique<UringLane>(queue_depth, segment_nbytes);
}

}  // namespace offload::aio
