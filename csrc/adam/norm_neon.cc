// The squared norm for NEON, four elements at a time.
#include "adam/norm_vector.h"
#include "adam/vector_neon.h"

namespace offload::adam {

void NormNeon(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
              double* lanes) noexcept {
  NormVector<Vector>(gradient, type, begin, end, lanes);
}

}  // namespace offload::adam
