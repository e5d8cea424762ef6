// The exceptions of the I/O engines. bind.cc turns them into those of offload.errors.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>

namespace offload::aio {

// What failed, on what: enough to write the whole message, which Python does for all engines alike.
struct Failure {
  std::string action;  // "open", "read", "write", "sync", "allocate", "stat"
  std::string path;
  int error = 0;  // errno; 0 when a transfer ended early without one (end of file)
  std::string detail = {};
  std::optional<uint64_t> offset = std::nullopt;
  std::optional<uint64_t> asked_nbytes = std::nullopt;
  std::optional<uint64_t> got_nbytes = std::nullopt;
};

// A file operation failed.
class IoError : public std::system_error {
 public:
  explicit IoError(Failure failure)
      : std::system_error(failure.error, std::generic_category(),
                          failure.action + " " + failure.path),
        failure_(std::move(failure)) {}

  const Failure& failure() const noexcept { return failure_; }

 private:
  Failure failure_;
};

// A call out of order: the engine or file is closed, or belongs to the parent of this process.
class StateError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

}  // namespace offload::aio
