#include "aio/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "aio/error.h"

namespace offload::aio {
namespace {

// [Note: two descriptors]
// Aligned transfers use O_DIRECT; what is not aligned (the head and tail of an odd request, or an
// odd buffer address) goes through a second, buffered descriptor. The kernel keeps the page cache
// coherent with direct transfers at page granularity: a direct transfer first writes back, then
// drops, the cached pages of its range. So the border between the two ways must lie on a page
// boundary (64 KiB on some arm64 kernels), never on the smaller sector the drive would accept: a
// dirty page straddling it could be written back over newer direct data. Unaligned requests that
// share a page both go through the cache, where the kernel serialises them; a bounce buffer of our
// own would lose one of the two. Readahead is off on the buffered descriptor of a direct file: it
// would fill the cache with neighbouring pages that direct writes then have to drop again.

constexpr int kFlags = O_NOFOLLOW | O_CLOEXEC | O_NOCTTY;
constexpr mode_t kOwnerOnly = 0600;
constexpr int kMaxRetries = 64;

UniqueFd open_checked(const std::string& path, int dir_fd, int flags) {
  for (int retry = 0;; ++retry) {
    UniqueFd fd(::openat(dir_fd, path.c_str(), flags, kOwnerOnly));
    if (fd) return fd;
    if (errno != EINTR || retry == kMaxRetries) throw IoError({"open", path, errno});
  }
}

struct stat stat_checked(int fd, const std::string& path) {
  struct stat info{};
  if (::fstat(fd, &info) != 0) throw IoError({"stat", path, errno});
  return info;
}

}  // namespace

CreatedName::~CreatedName() noexcept {
  if (!kept_) (void)::unlinkat(dir_fd_, path_.c_str(), 0);
}

File::Pin::Pin(std::shared_ptr<File> file) : file_(std::move(file)) {
  // Before the lock: in a forked child a thread that is no more may hold it.
  if (::getpid() != file_->owner_) {
    throw StateError(file_->path_ +
                     " was opened by the parent of this process; open it again here");
  }
  const std::lock_guard lock(file_->mutex_);
  if (file_->closed_) throw StateError(file_->path_ + " is closed; open it again to use it");
  ++file_->num_pins_;
}

void File::Pin::release() noexcept {
  if (!file_) return;
  {
    const std::lock_guard lock(file_->mutex_);
    --file_->num_pins_;
    // Under the lock: the File may go as soon as a closer sees zero.
    if (file_->num_pins_ == 0) file_->unpinned_.notify_all();
  }
  file_.reset();
}

std::shared_ptr<File> File::open(std::string path, Mode mode, int dir_fd, DirectTrials* trials) {
  const int access = mode == Mode::kRead ? O_RDONLY : O_RDWR;
  const int create = mode == Mode::kCreate ? O_CREAT | O_EXCL : 0;
  Opened opened;
  opened.writable = mode != Mode::kRead;
  // O_NONBLOCK so that a FIFO does not block here until someone writes to it.
  opened.buffered = open_checked(path, dir_fd, access | create | kFlags | O_NONBLOCK);
  CreatedName name(dir_fd, path);
  if (mode != Mode::kCreate) name.keep();
  const struct stat info = stat_checked(opened.buffered.get(), path);
  if (!S_ISREG(info.st_mode)) {
    throw IoError({"open", path, S_ISDIR(info.st_mode) ? EISDIR : EINVAL, "not a regular file"});
  }
  opened.device = info.st_dev;
  // Cleared again: io_uring answers EAGAIN instead of waiting when it is set.
  if (::fcntl(opened.buffered.get(), F_SETFL, 0) != 0) throw IoError({"open", path, errno});

  if (trials != nullptr) {
    UniqueFd direct(::openat(dir_fd, path.c_str(), access | kFlags | O_NONBLOCK | O_DIRECT));
    if (direct) {
      const struct stat again = stat_checked(direct.get(), path);
      if (again.st_dev != info.st_dev || again.st_ino != info.st_ino) {
        throw IoError({"open", path, ESTALE, "the file was replaced while it was being opened"});
      }
      if (::fcntl(direct.get(), F_SETFL, O_DIRECT) != 0) throw IoError({"open", path, errno});
      opened.limits = trials->limits(direct.get(), info.st_dev, mode == Mode::kCreate);
    } else if (errno != EINVAL) {  // EINVAL: this file system has no O_DIRECT
      throw IoError({"open", path, errno});
    }
    if (opened.limits.usable) opened.direct = std::move(direct);
    opened.spares_cache = !opened.limits.usable;
  }
  if (opened.direct) {
    // Advice only, so its result does not matter. See [Note: two descriptors].
    (void)::posix_fadvise(opened.buffered.get(), 0, 0, POSIX_FADV_RANDOM);
  }
  std::shared_ptr<File> file(new File(std::move(path), std::move(opened)));
  name.keep();
  return file;
}

File::File(std::string path, Opened opened)
    : path_(std::move(path)),
      writable_(opened.writable),
      spares_cache_(opened.spares_cache),
      device_(opened.device),
      limits_(opened.limits),
      owner_(::getpid()),
      buffered_(std::move(opened.buffered)),
      direct_(std::move(opened.direct)) {}

void File::drop_cache(uint64_t offset, uint64_t nbytes) const noexcept {
  if (!spares_cache_) return;
  (void)::posix_fadvise(buffered_.get(), static_cast<off_t>(offset), static_cast<off_t>(nbytes),
                        POSIX_FADV_DONTNEED);
}

bool File::close(std::chrono::nanoseconds timeout) {
  if (::getpid() != owner_) return true;
  std::unique_lock lock(mutex_);
  closed_ = true;
  if (!unpinned_.wait_for(lock, timeout, [this] { return num_pins_ == 0; })) return false;
  // Closed without the lock: the last close of an unlinked file frees all of its blocks.
  const UniqueFd direct = std::move(direct_);
  const UniqueFd buffered = std::move(buffered_);
  lock.unlock();
  return true;
}

uint64_t size_nbytes(const std::shared_ptr<File>& file) {
  const File::Pin pin(file);
  return static_cast<uint64_t>(stat_checked(file->buffered_fd(), file->path()).st_size);
}

void allocate(const std::shared_ptr<File>& file, uint64_t nbytes) {
  const File::Pin pin(file);
  if (nbytes == 0) return;
  int error = EINTR;
  for (int retry = 0; error == EINTR && retry <= kMaxRetries; ++retry) {
    error = ::posix_fallocate(file->buffered_fd(), 0, static_cast<off_t>(nbytes));
  }
  if (error == 0) return;
  Failure failure{"allocate", file->path(), error};
  failure.asked_nbytes = nbytes;
  throw IoError(std::move(failure));
}

void sync(const std::shared_ptr<File>& file) {
  const File::Pin pin(file);
  // Not retried, not even after EINTR: after a failed flush the kernel may have dropped the dirty
  // pages and forgotten the error, so a second, successful call would prove nothing.
  if (::fdatasync(file->buffered_fd()) != 0) throw IoError({"sync", file->path(), errno});
  file->drop_cache(0, 0);
}

}  // namespace offload::aio
