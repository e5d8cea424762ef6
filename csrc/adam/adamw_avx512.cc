// The AdamW kernel with fp32 moments for AVX-512, sixteen elements at a time.
#include "adam/adamw_vector.h"
#include "adam/vector_avx512.h"

namespace offload::adam {

void AdamWAvx512(const AdamWCoefficients& coefficients, const AdamWArrays& arrays,
                 std::size_t begin, std::size_t end) noexcept {
  AdamWVector<Vector>(coefficients, arrays, begin, end);
}

}  // namespace offload::adam
