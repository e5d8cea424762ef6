// Sixteen elements at a time with AVX2. No inline function of a standard header is instantiated
// here (see adamw_avx2.cc).
#include <immintrin.h>

#include "adam/norm.h"

namespace offload::adam {
namespace {

struct Float32 {
  const float* elements;
  __m128 LoadFour(std::size_t i) const { return _mm_loadu_ps(elements + i); }
};

struct BFloat16 {
  const std::uint16_t* elements;
  __m128 LoadFour(std::size_t i) const {
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(elements + i));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
  }
};

// Returns the index of the first element it left: fewer than kNormLanes remain.
template <typename Source>
std::size_t AddSquares(const Source& source, std::size_t begin, std::size_t end, double* lanes) {
  __m256d sums[4];
  for (int k = 0; k < 4; ++k) sums[k] = _mm256_loadu_pd(lanes + 4 * k);
  std::size_t i = begin;
  for (; i + kNormLanes <= end; i += kNormLanes) {
    for (int k = 0; k < 4; ++k) {
      const __m256d wide = _mm256_cvtps_pd(source.LoadFour(i + 4 * static_cast<std::size_t>(k)));
      sums[k] = _mm256_add_pd(sums[k], _mm256_mul_pd(wide, wide));
    }
  }
  for (int k = 0; k < 4; ++k) _mm256_storeu_pd(lanes + 4 * k, sums[k]);
  return i;
}

}  // namespace

void NormAvx2(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
              double* lanes) noexcept {
  const std::size_t rest =
      type == ElementType::kBFloat16
          ? AddSquares(BFloat16{static_cast<const std::uint16_t*>(gradient)}, begin, end, lanes)
          : AddSquares(Float32{static_cast<const float*>(gradient)}, begin, end, lanes);
  // `rest` is a whole number of lanes from `begin`, so the tail falls into the same lanes.
  NormScalar(gradient, type, rest, end, lanes);
}

}  // namespace offload::adam
