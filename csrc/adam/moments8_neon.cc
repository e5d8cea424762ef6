// The AdamW kernel with 8-bit moments for NEON, four elements at a time.
#include "adam/moments8_vector.h"
#include "adam/vector_neon.h"

namespace offload::adam {

void AdamW8Neon(const AdamWCoefficients& coefficients, const AdamW8Arrays& arrays,
                const Noise& noise, std::size_t begin, std::size_t end) noexcept {
  AdamW8Vector<Vector>(coefficients, arrays, noise, begin, end);
}

}  // namespace offload::adam
