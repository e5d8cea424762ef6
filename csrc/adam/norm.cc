#include "adam/norm.h"

#include <cstring>
#include <vector>

#include "adam/parallel.h"

namespace offload::adam {

void NormScalar(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
                double* lanes) noexcept {
  for (std::size_t i = begin; i < end; ++i) {
    float value;
    if (type == ElementType::kBFloat16) {
      const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(gradient)[i]}
                                 << 16;
      std::memcpy(&value, &bits, sizeof(value));
    } else {
      value = static_cast<const float*>(gradient)[i];
    }
    const double wide = value;
    lanes[(i - begin) % kNormLanes] += wide * wide;
  }
}

double SquaredNorm(NormKernel kernel, const void* gradient, ElementType type, std::size_t numel,
                   int num_threads) {
  std::vector<double> block_sums(NumBlocks(numel));
  ForEachBlock(numel, num_threads, [&](std::size_t block, std::size_t begin, std::size_t end) {
    double lanes[kNormLanes] = {};
    kernel(gradient, type, begin, end, lanes);
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    block_sums[block] = sum;
  });
  double sum = 0;
  for (const double block_sum : block_sums) sum += block_sum;
  return sum;
}

}  // namespace offload::adam
