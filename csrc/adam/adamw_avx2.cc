// The AdamW kernel with fp32 moments for AVX2 and FMA, eight elements at a time.
#include "adam/adamw_vector.h"
#include "adam/vector_avx2.h"

namespace offload::adam {

void AdamWAvx2(const AdamWCoefficients& coefficients, const AdamWArrays& arrays, std::size_t begin,
               std::size_t end) noexcept {
  AdamWVector<Vector>(coefficients, arrays, begin, end);
}

}  // namespace offload::adam
