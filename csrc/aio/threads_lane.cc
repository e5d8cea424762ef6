// The lane of worker threads: blocking calls, one segment each.

#include <sys/uio.h>

#include <cerrno>
#include <optional>
#include <vector>

#include "aio/engine.h"
#include "aio/io_thread.h"

namespace offload::aio {
namespace {

int64_t transfer(const Segment& segment) noexcept {
  iovec part{segment.address, segment.nbytes};
  const auto offset = static_cast<off_t>(segment.offset);
  const ssize_t result = segment.request->op() == Op::kRead
                             ? ::preadv(segment.fd, &part, 1, offset)
                             : ::pwritev(segment.fd, &part, 1, offset);
  return result < 0 ? -errno : result;
}

class ThreadsLane final : public Lane {
 public:
  ThreadsLane(unsigned num_threads, uint64_t segment_nbytes) : Lane(segment_nbytes) {
    workers_.reserve(num_threads);
    try {
      for (unsigned i = 0; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (...) {
      queue().refuse_new();  // else the join of those already running would never end
      throw;
    }
  }

  ~ThreadsLane() noexcept override {
    queue().refuse_new();
    workers_.clear();  // joins; before the queue goes
  }

 private:
  void wake() noexcept override {}  // the workers wait on the queue itself

  void work() {
    while (std::optional<Segment> segment = queue().take()) {
      while (queue().settle(*segment, transfer(*segment))) {
      }
    }
  }

  std::vector<IoThread> workers_;
};

}  // namespace

std::unique_ptr<Lane> make_threads_lane(unsigned num_threads, uint64_t segment_nbytes) {
  return std::make_unique<ThreadsLane>(num_threads, segment_nbytes);
}

}  // namespace offload::aio
