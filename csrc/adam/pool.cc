#include "adam/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace offload::adam {
namespace {

// How many processors this process may use. Asked at each call: taskset and cgroups change it.
std::size_t NumProcessors() {
  cpu_set_t set;
  // A machine with more than 1024 does not fit the set; it has enough in any case.
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return CPU_SETSIZE;
  return static_cast<std::size_t>(CPU_COUNT(&set));
}

// Blocks every signal of the calling thread, and so of the threads that it starts: Ctrl-C and
// timers are for the interpreter's threads.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

// The helpers of one process.
class Pool::Helpers {
 public:
  Helpers() : process_(getpid()) {}
  Helpers(const Helpers&) = delete;
  Helpers& operator=(const Helpers&) = delete;

  bool OfThisProcess() const { return process_ == getpid(); }

  void Run(std::size_t max_helpers, const std::function<void()>& work) {
    Job job{work, max_helpers, 0};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (closing_) job.num_wanted = 0;
      jobs_.reserve(jobs_.size() + 1);
      StartUpTo(job.num_wanted);
      jobs_.push_back(&job);
    }
    if (max_helpers == 1) {
      posted_.notify_one();
    } else {
      posted_.notify_all();
    }
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    left_.wait(lock, [&job] { return job.num_inside == 0; });
  }

  void Close() noexcept {
    std::vector<std::thread> ending;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      ending.swap(threads_);
    }
    posted_.notify_all();
    for (std::thread& thread : ending) thread.join();
  }

 private:
  struct Job {
    const std::function<void()>& work;
    std::size_t num_wanted;  // Helpers that may still come.
    std::size_t num_inside;  // Helpers that are at it.
  };

  void StartUpTo(std::size_t num_threads) {
    if (threads_.size() >= num_threads) return;
    const SignalsBlocked blocked;
    while (threads_.size() < num_threads) threads_.emplace_back([this] { Serve(); });
  }

  void Serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* const job = NextJob();
      if (job == nullptr) {
        if (closing_) return;
        posted_.wait(lock);
        continue;
      }
      --job->num_wanted;
      ++job->num_inside;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->num_inside == 0) left_.notify_all();
    }
  }

  Job* NextJob() const {
    for (Job* const job : jobs_) {
      if (job->num_wanted > 0) return job;
    }
    return nullptr;
  }

  const pid_t process_;
  std::mutex mutex_;
  std::condition_variable posted_;  // There is a job, or the end.
  std::condition_variable left_;    // The last helper has left a job.
  std::vector<Job*> jobs_;          // Those that run, oldest first.
  std::vector<std::thread> threads_;
  bool closing_ = false;
};

Pool::Pool() : helpers_(new Helpers) {}

Pool::~Pool() {
  Close();
  Helpers* const helpers = helpers_.load();
  if (helpers->OfThisProcess()) delete helpers;
}

Pool::Helpers& Pool::Own() {
  Helpers* current = helpers_.load();
  while (!current->OfThisProcess()) {
    auto fresh = std::make_unique<Helpers>();
    // The parent's are not deleted: they hold threads that do not exist here.
    if (helpers_.compare_exchange_strong(current, fresh.get())) return *fresh.release();
  }
  return *current;
}

void Pool::Run(std::size_t max_helpers, const std::function<void()>& work) {
  if (max_helpers > 0) max_helpers = std::min(max_helpers, NumProcessors() - 1);
  if (max_helpers == 0 || closed_.load()) {
    work();
    return;
  }
  Own().Run(max_helpers, work);
}

void Pool::Close() noexcept {
  closed_ = true;
  Helpers* const helpers = helpers_.load();
  if (helpers->OfThisProcess()) helpers->Close();
}

}  // namespace offload::adam
