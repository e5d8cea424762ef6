// CRC-32C with the crc32 instruction. Built with -msse4.2 -mpclmul; called only where both exist.

#include <nmmintrin.h>
#include <wmmintrin.h>

#include <cstring>

#include "aio/crc32c.h"

namespace offload::aio {
namespace {

// [Note: three streams]
// crc32 has a latency of three cycles and a throughput of one, so three independent streams of
// kBlock bytes run in the time of one. With a, b, c their registers (b, c begun at zero), the
// register of the whole is a x^(16 kBlock) + b x^(8 kBlock) + c modulo the polynomial. A carry-less
// product of two bit-reversed 32-bit values is their product times x, and crc32_u64(0, product)
// multiplies by x^32 while it reduces: hence the 33 less in the exponents.
// Source: Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction", 2011.

constexpr size_t kLongBlock = 4096;  // three of them stay in the first-level cache
constexpr size_t kShortBlock = 256;

template <size_t kBlock>
struct Shift {
  static constexpr uint32_t kOne = x_to_the(8 * kBlock - 33);
  static constexpr uint32_t kTwo = x_to_the(16 * kBlock - 33);
};

uint64_t load(const std::byte* data) noexcept {
  uint64_t value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

__m128i multiply(uint64_t state, uint32_t factor) noexcept {
  return _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<int64_t>(state)),
                              _mm_cvtsi64_si128(static_cast<int64_t>(factor)), 0);
}

template <size_t kBlock>
uint64_t three_streams(const std::byte* data, uint64_t a) noexcept {
  uint64_t b = 0;
  uint64_t c = 0;
  for (size_t i = 0; i < kBlock; i += 8) {
    a = _mm_crc32_u64(a, load(data + i));
    b = _mm_crc32_u64(b, load(data + kBlock + i));
    c = _mm_crc32_u64(c, load(data + 2 * kBlock + i));
  }
  const __m128i shifted =
      _mm_xor_si128(multiply(a, Shift<kBlock>::kTwo), multiply(b, Shift<kBlock>::kOne));
  return c ^ _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(shifted)));
}

}  // namespace

uint32_t crc32c_sse42(const std::byte* data, size_t nbytes, uint32_t state) noexcept {
  uint64_t crc = state;
  for (; nbytes >= 3 * kLongBlock; nbytes -= 3 * kLongBlock, data += 3 * kLongBlock) {
    crc = three_streams<kLongBlock>(data, crc);
  }
  for (; nbytes >= 3 * kShortBlock; nbytes -= 3 * kShortBlock, data += 3 * kShortBlock) {
    crc = three_streams<kShortBlock>(data, crc);
  }
  for (; nbytes >= 8; nbytes -= 8, data += 8) crc = _mm_crc32_u64(crc, load(data));
  auto last = static_cast<uint32_t>(crc);
  for (; nbytes != 0; --nbytes, ++data) last = _mm_crc32_u8(last, static_cast<uint8_t>(*data));
  return last;
}

}  // namespace offload::aio
