// CRC-32C with 32-byte vectors. Built with -mavx2 -mvpclmulqdq; called only where both exist.

#include <immintrin.h>

#include "aio/crc32c_fold.h"

namespace offload::aio {
namespace {

struct Vector {
  Vector() = default;
  Vector(uint32_t first_half, uint32_t second_half)
      : value(_mm256_set_epi64x(second_half, first_half, second_half, first_half)) {}

  void load(const std::byte* data) noexcept {
    value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  }
  void add_to_first(uint32_t state) noexcept {
    value = _mm256_xor_si256(value, _mm256_set_epi32(0, 0, 0, 0, 0, 0, 0, static_cast<int>(state)));
  }
  void fold(const Vector& factors, const std::byte* data) noexcept {
    const __m256i product = _mm256_xor_si256(_mm256_clmulepi64_epi128(value, factors.value, 0x00),
                                             _mm256_clmulepi64_epi128(value, factors.value, 0x11));
    value = _mm256_xor_si256(product, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
  }

  __m256i value;
};

}  // namespace

uint32_t crc32c_vpclmul256(const std::byte* data, size_t nbytes, uint32_t state) noexcept {
  return crc32c_fold<Vector>(data, nbytes, state);
}

}  // namespace offload::aio
