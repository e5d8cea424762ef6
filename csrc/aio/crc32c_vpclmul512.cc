// CRC-32C with 64-byte vectors. Built with -mavx512f -mvpclmulqdq; called only where both exist.

#include <immintrin.h>

#include "aio/crc32c_fold.h"

namespace offload::aio {
namespace {

struct Vector {
  Vector() = default;
  Vector(uint32_t first_half, uint32_t second_half)
      : value(_mm512_set4_epi64(second_half, first_half, second_half, first_half)) {}

  void load(const std::byte* data) noexcept { value = _mm512_loadu_si512(data); }
  void add_to_first(uint32_t state) noexcept {
    value = _mm512_xor_si512(value, _mm512_zextsi128_si512(_mm_cvtsi64_si128(state)));
  }
  void fold(const Vector& factors, const std::byte* data) noexcept {
    constexpr int kXorOfThree = 0x96;
    value = _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, factors.value, 0x00),
                                      _mm512_clmulepi64_epi128(value, factors.value, 0x11),
                                      _mm512_loadu_si512(data), kXorOfThree);
  }

  __m512i value;
};

}  // namespace

uint32_t crc32c_vpclmul512(const std::byte* data, size_t nbytes, uint32_t state) noexcept {
  return crc32c_fold<Vector>(data, nbytes, state);
}

}  // namespace offload::aio
