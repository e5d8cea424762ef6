// CRC-32C (Castagnoli), the checksum of the store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace offload::aio {

// The CRC-32C of `nbytes` at `data`, going on from `seed`: crc32c(b, crc32c(a)) is that of a then
// b, and the seed of a first call is 0. Uses the best instructions of this CPU.
uint32_t crc32c(const std::byte* data, size_t nbytes, uint32_t seed);

// A way to compute it, by the instructions it uses. `update` takes and returns the raw register
// (neither is inverted).
struct Crc32cIsa {
  const char* name;
  uint32_t (*update)(const std::byte* data, size_t nbytes, uint32_t state) noexcept;
};

// Those that this CPU has, best first. crc32c() uses the first; the last, "scalar", is everywhere.
const std::vector<Crc32cIsa>& crc32c_isas();

uint32_t crc32c_scalar(const std::byte* data, size_t nbytes, uint32_t state) noexcept;
#if defined(__x86_64__)
uint32_t crc32c_sse42(const std::byte* data, size_t nbytes, uint32_t state) noexcept;
uint32_t crc32c_vpclmul256(const std::byte* data, size_t nbytes, uint32_t state) noexcept;
uint32_t crc32c_vpclmul512(const std::byte* data, size_t nbytes, uint32_t state) noexcept;
#endif

// The polynomial, bit-reversed: bit 31 is x^0.
constexpr uint32_t kCrc32cPoly = 0x82F63B78;

// x^exponent modulo the polynomial, bit-reversed.
constexpr uint32_t x_to_the(unsigned exponent) {
  uint32_t value = 0x80000000;
  for (unsigned i = 0; i < exponent; ++i) {
    value = (value >> 1) ^ ((value & 1) != 0 ? kCrc32cPoly : 0);
  }
  return value;
}

}  // namespace offload::aio
