// The squared norm for AVX-512, sixteen elements at a time.
#include "adam/norm_vector.h"
#include "adam/vector_avx512.h"

namespace offload::adam {

void NormAvx512(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
                double* lanes) noexcept {
  NormVector<Vector>(gradient, type, begin, end, lanes);
}

}  // namespace offload::adam
