#include "aio/direct.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <optional>

namespace offload::aio {
namespace {

// Alignments the file asks for; the kernel tells from 6.1 on (statx), else 4 KiB has to do.
DirectLimits ask_limits(int fd) noexcept {
  DirectLimits limits;
  limits.usable = true;
  limits.offset_align = std::max<uint64_t>(limits.offset_align, ::sysconf(_SC_PAGESIZE));
#ifdef STATX_DIOALIGN
  struct statx info{};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN) != 0) {
    limits.usable = info.stx_dio_offset_align != 0;
    limits.offset_align = std::max<uint64_t>(limits.offset_align, info.stx_dio_offset_align);
    limits.memory_align = std::max<uint64_t>(1, info.stx_dio_mem_align);
  }
#else
  (void)fd;
#endif
  return limits;
}

struct Free {
  void operator()(void* memory) const noexcept { std::free(memory); }
};

// Transfer one aligned block; whether it was refused for being direct. None when that cannot be
// told.
std::optional<bool> try_transfer(int fd, const DirectLimits& limits, bool fresh) {
  const auto nbytes = static_cast<size_t>(limits.offset_align);
  const std::unique_ptr<void, Free> block(
      std::aligned_alloc(std::max<size_t>(limits.memory_align, nbytes), nbytes));
  if (!block) return std::nullopt;
  ssize_t result = 0;
  int error = 0;
  if (fresh) {
    std::fill_n(static_cast<std::byte*>(block.get()), nbytes, std::byte{0});
    result = ::pwrite(fd, block.get(), nbytes, 0);
    error = errno;
    if (::ftruncate(fd, 0) != 0) return std::nullopt;
  } else {
    result = ::pread(fd, block.get(), nbytes, 0);
    error = errno;
  }
  if (result > 0) return true;
  if (result < 0 && (error == EINVAL || error == EOPNOTSUPP)) return false;
  return std::nullopt;
}

}  // namespace

DirectLimits DirectTrials::limits(int direct_fd, dev_t device, bool fresh) {
  DirectLimits limits = ask_limits(direct_fd);
  if (!limits.usable) return limits;
  {
    const std::lock_guard lock(mutex_);
    if (const auto known = accepts_.find(device); known != accepts_.end()) {
      limits.usable = known->second;
      return limits;
    }
  }
  // Not under the lock: a drive that hangs must not keep others from being opened.
  if (const std::optional<bool> accepts = try_transfer(direct_fd, limits, fresh)) {
    const std::lock_guard lock(mutex_);
    limits.usable = accepts_.emplace(device, *accepts).first->second;
  }
  return limits;
}

}  // namespace offload::aio
