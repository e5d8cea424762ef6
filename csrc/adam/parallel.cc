#include "adam/parallel.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <mutex>
#include <thread>
#include <vector>

namespace offload::adam {
namespace {

// torch.set_flush_denormal() changes the calling thread's control register; results must not
// depend on it, nor on which thread took a block.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace

void ForEachBlock(
    std::size_t numel, int num_threads,
    const std::function<void(std::size_t block, std::size_t begin, std::size_t end)>& body) {
  const std::size_t num_blocks = NumBlocks(numel);
  std::atomic<std::size_t> next{0};
  const auto take_blocks = [&]() noexcept {
    const DefaultFloatEnvironment environment;
    for (std::size_t block = next++; block < num_blocks; block = next++) {
      const std::size_t begin = block * kBlockNumel;
      body(block, begin, std::min(begin + kBlockNumel, numel));
    }
  };

  const std::size_t wanted =
      std::min(static_cast<std::size_t>(std::max(num_threads, 1)), num_blocks);
  if (wanted <= 1) {
    take_blocks();
    return;
  }

  // The helpers wait at the gate until all have started, so that a failure to start one leaves
  // every block untouched.
  std::mutex gate;
  bool cancelled = false;
  std::vector<std::thread> helpers;
  helpers.reserve(wanted - 1);
  {
    std::unique_lock<std::mutex> closed(gate);
    try {
      while (helpers.size() + 1 < wanted) {
        helpers.emplace_back([&] {
          {
            const std::lock_guard<std::mutex> open(gate);
            if (cancelled) return;
          }
          take_blocks();
        });
      }
    } catch (...) {
      cancelled = true;
      closed.unlock();
      for (std::thread& helper : helpers) helper.join();
      throw;
    }
  }
  take_blocks();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace offload::adam
