// The AdamW kernel with fp32 moments for NEON, four elements at a time.
#include "adam/adamw_vector.h"
#include "adam/vector_neon.h"

namespace offload::adam {

void AdamWNeon(const AdamWCoefficients& coefficients, const AdamWArrays& arrays, std::size_t begin,
               std::size_t end) noexcept {
  AdamWVector<Vector>(coefficients, arrays, begin, end);
}

}  // namespace offload::adam
