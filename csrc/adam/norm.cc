#include "adam/norm.h"

#include <vector>

#include "adam/parallel.h"
#include "adam/widen_scalar.h"

namespace offload::adam {

namespace {

template <typename Element>
void AddSquares(const Element* elements, std::size_t begin, std::size_t end, double* lanes) {
  for (std::size_t i = begin; i < end; ++i) {
    const double wide = Widen(elements[i]);
    lanes[(i - begin) % kNormLanes] += wide * wide;
  }
}

}  // namespace

void NormScalar(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
                double* lanes) noexcept {
  switch (type) {
    case ElementType::kFloat32:
      return AddSquares(static_cast<const float*>(gradient), begin, end, lanes);
    case ElementType::kBFloat16:
      return AddSquares(static_cast<const BFloat16*>(gradient), begin, end, lanes);
    case ElementType::kFloat16:
      return AddSquares(static_cast<const Float16*>(gradient), begin, end, lanes);
  }
}

double SquaredNorm(Pool& pool, NormKernel kernel, const void* gradient, ElementType type,
                   std::size_t numel, int num_threads) {
  std::vector<double> block_sums(NumBlocks(numel));
  ForEachBlock(pool, numel, num_threads,
               [&](std::size_t block, std::size_t begin, std::size_t end) {
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
