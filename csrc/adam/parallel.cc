#include "adam/parallel.h"

#include <algorithm>
#include <atomic>
#include <cfenv>

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
    Pool& pool, std::size_t numel, int num_threads,
    const std::function<void(std::size_t block, std::size_t begin, std::size_t end)>& body) {
  const std::size_t num_blocks = NumBlocks(numel);
  if (num_blocks == 0) return;
  std::atomic<std::size_t> next{0};
  const auto take_blocks = [&]() noexcept {
    const DefaultFloatEnvironment environment;
    for (std::size_t block = next++; block < num_blocks; block = next++) {
      const std::size_t begin = block * kBlockNumel;
      body(block, begin, std::min(begin + kBlockNumel, numel));
    }
  };
  const auto wanted = static_cast<std::size_t>(std::max(num_threads, 1));
  pool.Run(std::min(wanted, num_blocks) - 1, take_blocks);
}

}  // namespace offload::adam
