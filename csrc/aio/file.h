// An open regular file: up to two descriptors on one inode, one buffered and one direct.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "aio/direct.h"
#include "aio/fd.h"

namespace offload::aio {

enum class Mode { kRead, kReadWrite, kCreate };

// Removes a file that was just created, unless it is kept: an open that fails half-way can then be
// tried again.
class CreatedName {
 public:
  CreatedName(int dir_fd, std::string path) : dir_fd_(dir_fd), path_(std::move(path)) {}
  CreatedName(const CreatedName&) = delete;
  CreatedName& operator=(const CreatedName&) = delete;
  ~CreatedName() noexcept;

  void keep() noexcept { kept_ = true; }

 private:
  const int dir_fd_;
  const std::string path_;
  bool kept_ = false;
};

// Thread-safe. Shared by the Python handle and the requests in flight; the descriptors close when
// close() has seen the last Pin go, or with the object.
class File {
 public:
  // Keeps the descriptors open while it lives. Move-only.
  class Pin {
   public:
    // Throws StateError when the file is closed or this process is a fork of the one that opened
    // it.
    explicit Pin(std::shared_ptr<File> file);
    Pin(Pin&&) noexcept = default;
    Pin& operator=(Pin&&) = delete;
    ~Pin() noexcept { release(); }

    // Let go early. Harmless when repeated.
    void release() noexcept;

    const File& file() const noexcept { return *file_; }

   private:
    std::shared_ptr<File> file_;
  };

  // Open `path`, relative to `dir_fd` when that is not AT_FDCWD. Follows no symbolic link in the
  // last component and takes regular files only. With `trials`, O_DIRECT is used where they say
  // that the drive takes it; with null it never is. Throws IoError.
  static std::shared_ptr<File> open(std::string path, Mode mode, int dir_fd, DirectTrials* trials);

  const std::string& path() const noexcept { return path_; }
  bool writable() const noexcept { return writable_; }
  const DirectLimits& limits() const noexcept { return limits_; }

  // The file system it is on (st_dev): requests on one share a queue.
  dev_t device() const noexcept { return device_; }

  // Whether direct transfers were wanted and are refused, so that what goes through the page cache
  // is dropped from it again.
  bool spares_cache() const noexcept { return spares_cache_; }

  // For holders of a Pin only.
  int buffered_fd() const noexcept { return buffered_.get(); }
  int direct_fd() const noexcept { return direct_.get(); }

  // Let go of clean pages of the cache from `offset` on (to the end when `nbytes` is 0) when
  // spares_cache(). Advice: whether the kernel follows it does not matter to the data.
  void drop_cache(uint64_t offset, uint64_t nbytes) const noexcept;

  // Stop further Pins, wait up to `timeout` for those alive, then close the descriptors. Returns
  // whether it came that far; call again when not. Does nothing in a forked child.
  bool close(std::chrono::nanoseconds timeout);

 private:
  struct Opened {
    UniqueFd buffered;
    UniqueFd direct;
    DirectLimits limits;
    dev_t device = 0;
    bool writable = false;
    bool spares_cache = false;
  };

  File(std::string path, Opened opened);

  const std::string path_;
  const bool writable_;
  const bool spares_cache_;
  const dev_t device_;
  const DirectLimits limits_;
  const pid_t owner_;
  UniqueFd buffered_;
  UniqueFd direct_;

  std::mutex mutex_;
  std::condition_variable unpinned_;
  uint64_t num_pins_ = 0;
  bool closed_ = false;
};

// The file's size now. Throws StateError when closed, IoError when fstat fails.
uint64_t size_nbytes(const std::shared_ptr<File>& file);

// Reserve space for the first `nbytes` (posix_fallocate). Blocks. Throws StateError, IoError.
void allocate(const std::shared_ptr<File>& file, uint64_t nbytes);

// Make completed writes durable (fdatasync). Blocks. Throws StateError, IoError.
void sync(const std::shared_ptr<File>& file);

}  // namespace offload::aio
