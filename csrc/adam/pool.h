// Threads that wait for work: started when first needed, kept until Close(), started anew after a
// fork.
#ifndef OFFLOAD_ADAM_POOL_H_
#define OFFLOAD_ADAM_POOL_H_

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>

namespace offload::adam {

// Runs pieces of work on the calling thread and on helpers of its own. Any thread may call; calls
// at the same time share the helpers. There are never more helpers than this process has processors
// besides the caller's: more would only take turns.
//
// A forked child has no threads but the one that forked, and may find any lock taken: it begins
// with a new set of helpers, and leaves the parent's state alone (a few hundred bytes are never
// freed).
class Pool {
 public:
  Pool();
  ~Pool();  // Closes.
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Calls `work` once on the calling thread and, at the same time, on up to `max_helpers` others;
  // returns when every call has returned. A helper that is busy elsewhere until `work` has returned
  // on the caller's thread does not come. `work` must not throw.
  //
  // Throws std::system_error if a thread cannot be started; `work` has then not been called.
  void Run(std::size_t max_helpers, const std::function<void()>& work);

  // Ends the helpers, each after what it is doing. Later calls of Run have the caller's thread
  // alone.
  void Close() noexcept;

 private:
  class Helpers;

  // Those of this process.
  Helpers& Own();

  std::atomic<Helpers*> helpers_;
  std::atomic<bool> closed_{false};
};

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_POOL_H_
