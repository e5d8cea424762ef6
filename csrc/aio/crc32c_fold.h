// CRC-32C by folding with carry-less products of whole vectors. For crc32c_vpclmul*.cc, whose
// `Vector` has 2 or 4 lanes of 16 bytes.
#pragma once

#include <nmmintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "aio/crc32c.h"

namespace offload::aio {

// [Note: folding]
// A lane of 16 bytes, D bits ahead of another, may be replaced by its product with x^D modulo the
// polynomial, added to that other one: the message stays the same modulo the polynomial. Of the
// lane's two halves the first is 64 bits further ahead. A carry-less product of bit-reversed values
// is their product times x, and a 32-bit factor in a 64-bit lane stands for its product with x^32:
// hence x^(D + 64 - 33) for the first half and x^(D - 33) for the second. kVectors vectors are
// folded side by side, each by the length of all of them, so that the products of one do not wait
// for another's. What is left in them at the end is a short message with the same remainder.
// Source: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", 2009.
template <class Vector>
uint32_t crc32c_fold(const std::byte* data, size_t nbytes, uint32_t state) noexcept {
  constexpr size_t kVectors = 4;
  constexpr size_t kStride = kVectors * sizeof(Vector);
  if (nbytes < 2 * kStride) return crc32c_sse42(data, nbytes, state);
  const Vector factors(x_to_the(8 * kStride + 31), x_to_the(8 * kStride - 33));
  Vector folded[kVectors];
  for (size_t i = 0; i < kVectors; ++i) folded[i].load(data + i * sizeof(Vector));
  folded[0].add_to_first(state);
  for (data += kStride, nbytes -= kStride; nbytes >= kStride; data += kStride, nbytes -= kStride) {
    for (size_t i = 0; i < kVectors; ++i) folded[i].fold(factors, data + i * sizeof(Vector));
  }
  uint64_t crc = 0;
  for (const Vector& vector : folded) {
    uint64_t words[sizeof(Vector) / 8];
    std::memcpy(words, &vector, sizeof words);
    for (const uint64_t word : words) crc = _mm_crc32_u64(crc, word);
  }
  return crc32c_sse42(data, nbytes, static_cast<uint32_t>(crc));
}

}  // namespace offload::aio
