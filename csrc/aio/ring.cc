#include "aio/ring.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string>
#include <system_error>

// Headers may be older than the running kernel, which is asked at run time.
#ifndef IORING_SETUP_SUBMIT_ALL
#define IORING_SETUP_SUBMIT_ALL (1U << 7)
#endif
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

namespace offload::aio {
namespace {

// Best first; a kernel answers EINVAL to flags it does not know. 6.1 on: completions are processed
// when the driving thread asks for them, in a batch, not in an interrupt of whatever it is doing.
constexpr std::array<unsigned, 3> kSetupFlags = {
    IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
    IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN, 0};

// One mapping for both rings (5.4), completions never dropped (5.5).
constexpr unsigned kFeatures = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP;

constexpr std::array<unsigned, 3> kOperations = {IORING_OP_READ, IORING_OP_WRITE,
                                                 IORING_OP_POLL_ADD};

UniqueFd set_up(unsigned entries, io_uring_params* params) {
  for (const unsigned flags : kSetupFlags) {
    *params = {};
    params->flags = flags;
    UniqueFd fd(static_cast<int>(::syscall(__NR_io_uring_setup, entries, params)));
    if (fd) return fd;
    if (errno != EINVAL) break;
  }
  throw std::system_error(errno, std::generic_category(), "io_uring_setup");
}

void require_operations(int fd) {
  constexpr unsigned kMost = 64;  // operations to be told about
  alignas(io_uring_probe)
      std::array<std::byte, sizeof(io_uring_probe) + kMost * sizeof(io_uring_probe_op)>
          space{};
  auto* const probe = reinterpret_cast<io_uring_probe*>(space.data());
  if (::syscall(__NR_io_uring_register, fd, IORING_REGISTER_PROBE, probe, kMost) != 0) {
    throw std::system_error(errno, std::generic_category(), "io_uring_register, to probe");
  }
  for (const unsigned operation : kOperations) {
    if (operation > probe->last_op || (probe->ops[operation].flags & IO_URING_OP_SUPPORTED) == 0) {
      throw std::system_error(
          EINVAL, std::generic_category(),
          "io_uring of a kernel before 5.6: no operation " + std::to_string(operation));
    }
  }
}

size_t rings_nbytes(const io_uring_params& params) {
  return std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                          params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
}

}  // namespace

Mapping::Mapping(int fd, size_t nbytes, off_t offset) : nbytes_(nbytes) {
  void* const address =
      ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
  if (address == MAP_FAILED) {
    throw std::system_error(errno, std::generic_category(), "mmap of an io_uring");
  }
  address_ = address;
  // A forked child must not touch the parent's ring. Where this is refused the pid checks remain.
  (void)::madvise(address, nbytes, MADV_DONTFORK);
}

Mapping::~Mapping() noexcept {
  if (address_ != nullptr) ::munmap(address_, nbytes_);
}

Ring Ring::make(unsigned entries) {
  io_uring_params params{};
  UniqueFd fd = set_up(entries, &params);
  if ((params.features & kFeatures) != kFeatures) {
    throw std::system_error(EINVAL, std::generic_category(), "io_uring of a kernel before 5.6");
  }
  require_operations(fd.get());
  return Ring(std::move(fd), params);
}

Ring::Ring(UniqueFd fd, const io_uring_params& params)
    : fd_(std::move(fd)),
      rings_(fd_.get(), rings_nbytes(params), IORING_OFF_SQ_RING),
      entries_mapping_(fd_.get(), params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES),
      sq_head_(rings_.at<unsigned>(params.sq_off.head)),
      sq_tail_(rings_.at<unsigned>(params.sq_off.tail)),
      sq_mask_(*rings_.at<unsigned>(params.sq_off.ring_mask)),
      cq_head_(rings_.at<unsigned>(params.cq_off.head)),
      cq_tail_(rings_.at<unsigned>(params.cq_off.tail)),
      cq_mask_(*rings_.at<unsigned>(params.cq_off.ring_mask)),
      cqes_(rings_.at<io_uring_cqe>(params.cq_off.cqes)),
      entries_(entries_mapping_.at<io_uring_sqe>(0)) {
  // The ring holds indices of entries; entry i is always at place i.
  unsigned* const indices = rings_.at<unsigned>(params.sq_off.array);
  for (unsigned i = 0; i < params.sq_entries; ++i) indices[i] = i;
}

io_uring_sqe& Ring::next_entry() noexcept {
  io_uring_sqe& entry = entries_[tail_++ & sq_mask_];
  entry = {};
  return entry;
}

int Ring::enter() noexcept {
  __atomic_store_n(sq_tail_, tail_, __ATOMIC_RELEASE);
  const unsigned num_new = tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
  // When it takes fewer than num_new the kernel does not wait: the caller comes again.
  const long taken =
      ::syscall(__NR_io_uring_enter, fd_.get(), num_new, 1, IORING_ENTER_GETEVENTS, nullptr, 0);
  return taken < 0 ? errno : 0;
}

}  // namespace offload::aio
