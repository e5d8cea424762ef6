// The GIL, let go while a call waits or works. For bind*.cc alone.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace offload::aio {

// Lets other threads of Python run until destruction.
//
// When the interpreter ends, CPython before 3.14 ends a daemon thread that wants the GIL back by
// pthread_exit. glibc does that by unwinding the stack: through a destructor it is the end of the
// process (std::terminate), and on its way it would take handles apart without the GIL. So the
// thread stays here for what is left of the process, as it does from 3.14 on.
class GilReleased {
 public:
  GilReleased() : thread_(PyEval_SaveThread()) {}
  ~GilReleased() noexcept {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {  // Nothing but the unwinding: this is C. Leaving the handler would be fatal.
      for (;;) ::pause();
    }
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* const thread_;
};

}  // namespace offload::aio
