// The sum of squares of a gradient, in double, the same for every instruction set and thread count.
//
// The range is cut into blocks of kBlockNumel (parallel.h). In a block, lane l adds the squares of
// the elements l, l + 16, l + 32 ...; then the lanes are added in order, then the blocks in order.
// The square of an fp32 value is exact in double (48 bits of 53), so a fused multiply-add and a
// multiplication with an addition agree. No sum of finite squares can overflow a double, so the sum
// is finite exactly when every element is.
#ifndef OFFLOAD_ADAM_NORM_H_
#define OFFLOAD_ADAM_NORM_H_

#include <cstddef>

#include "adam/element.h"
#include "adam/pool.h"

namespace offload::adam {

inline constexpr std::size_t kNormLanes = 16;

// Adds the squares of elements [begin, end) to lanes[kNormLanes]. One kernel per instruction set.
using NormKernel = void (*)(const void* gradient, ElementType type, std::size_t begin,
                            std::size_t end, double* lanes);
void NormScalar(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
                double* lanes) noexcept;
void NormAvx2(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
              double* lanes) noexcept;
void NormAvx512(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
                double* lanes) noexcept;
void NormNeon(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
              double* lanes) noexcept;

// Returns the sum of squares of `numel` elements. Throws std::system_error if a thread cannot
// start.
double SquaredNorm(Pool& pool, NormKernel kernel, const void* gradient, ElementType type,
                   std::size_t numel, int num_threads);

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_NORM_H_
