// A thread for I/O: takes no signals, is joined when it goes.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace offload::aio {

// Runs a function on a thread of its own with every signal blocked, so that Ctrl-C and timers reach
// the interpreter's threads and no system call here is interrupted.
class IoThread {
 public:
  template <typename Function>
  explicit IoThread(Function function) {
    sigset_t all;
    sigset_t before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    const MaskGuard guard{before};
    thread_ = std::thread(std::move(function));
  }
  IoThread(IoThread&&) noexcept = default;
  IoThread& operator=(IoThread&&) = delete;
  ~IoThread() noexcept {
    if (thread_.joinable()) thread_.join();
  }

 private:
  struct MaskGuard {
    sigset_t before;
    ~MaskGuard() noexcept { ::pthread_sigmask(SIG_SETMASK, &before, nullptr); }
  };

  std::thread thread_;
};

}  // namespace offload::aio
