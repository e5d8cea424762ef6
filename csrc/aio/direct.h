// Which drives take direct (O_DIRECT) transfers, and what those must respect.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <mutex>

namespace offload::aio {

// What a direct transfer on a file must respect.
struct DirectLimits {
  bool usable = false;           // whether the file takes O_DIRECT at all
  uint64_t offset_align = 4096;  // of file offset and length
  uint64_t memory_align = 4096;  // of the buffer's address
};

// Decides once for each drive, by a transfer, whether O_DIRECT works there: some file systems
// accept the flag when a file is opened and refuse the first transfer. Thread-safe.
class DirectTrials {
 public:
  // The limits of an open file on drive `device`, whose descriptor has O_DIRECT. When the drive was
  // not tried yet: `fresh` says that the file was just made and is the caller's to write to; it is
  // empty again afterwards. Else the file is only read, and one too short for that decides nothing.
  // A transfer that fails for another reason than O_DIRECT decides nothing either: it will fail
  // again, where its error can be told.
  DirectLimits limits(int direct_fd, dev_t device, bool fresh);

 private:
  std::mutex mutex_;
  std::map<dev_t, bool> accepts_;
};

}  // namespace offload::aio
