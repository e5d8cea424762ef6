#include "adam/parallel.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
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

// Blocks [next, end) that nobody has taken yet, on a cache line of its own.
struct alignas(64) Run {
  std::atomic<std::size_t> next;
  std::size_t end;
};

}  // namespace

void ForEachBlock(
    Pool& pool, std::size_t numel, int num_threads,
    const std::function<void(std::size_t block, std::size_t begin, std::size_t end)>& body) {
  const std::size_t num_blocks = NumBlocks(numel);
  if (num_blocks == 0) return;
  const auto wanted = static_cast<std::size_t>(std::max(num_threads, 1));
  const std::size_t num_runs = std::min(wanted, num_blocks);
  std::vector<Run> runs(num_runs);
  for (std::size_t i = 0; i < num_runs; ++i) {
    runs[i].next = i * num_blocks / num_runs;
    runs[i].end = (i + 1) * num_blocks / num_runs;
  }
  std::atomic<std::size_t> arrived{0};
  const auto take_blocks = [&]() noexcept {
    const DefaultFloatEnvironment environment;
    const std::size_t own = arrived++;
    for (std::size_t i = 0; i < num_runs; ++i) {
      Run& run = runs[(own + i) % num_runs];
      for (std::size_t block = run.next++; block < run.end; block = run.next++) {
        const std::size_t begin = block * kBlockNumel;
        body(block, begin, std::min(begin + kBlockNumel, numel));
      }
    }
  };
  pool.Run(num_runs - 1, take_blocks);
}

}  // namespace offload::adam
