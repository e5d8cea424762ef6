#include "aio/crc32c.h"

#include <array>
#include <cstring>

namespace offload::aio {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][byte]: what `byte`, followed by k zero bytes, leaves in the register.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? kCrc32cPoly : 0);
    tables[0][byte] = value;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

std::vector<Crc32cIsa> find_isas() {
  std::vector<Crc32cIsa> found;
#if defined(__x86_64__)
  const bool sse42 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
  const bool wide = sse42 && __builtin_cpu_supports("vpclmulqdq");
  if (wide && __builtin_cpu_supports("avx512f")) found.push_back({"vpclmul512", crc32c_vpclmul512});
  if (wide && __builtin_cpu_supports("avx2")) found.push_back({"vpclmul256", crc32c_vpclmul256});
  if (sse42) found.push_back({"sse4.2", crc32c_sse42});
#endif
  found.push_back({"scalar", crc32c_scalar});
  return found;
}

}  // namespace

// Slicing by eight (Kounavis and Berry, "A Systematic Approach to Building High Performance
// Software-based CRC Generators", 2005): one table look-up a byte, but eight of them independent.
uint32_t crc32c_scalar(const std::byte* data, size_t nbytes, uint32_t state) noexcept {
  while (nbytes >= 8) {
    uint8_t b[8];
    std::memcpy(b, data, 8);
    state = kTables[7][b[0] ^ (state & 0xFF)] ^ kTables[6][b[1] ^ ((state >> 8) & 0xFF)] ^
            kTables[5][b[2] ^ ((state >> 16) & 0xFF)] ^ kTables[4][b[3] ^ (state >> 24)] ^
            kTables[3][b[4]] ^ kTables[2][b[5]] ^ kTables[1][b[6]] ^ kTables[0][b[7]];
    data += 8;
    nbytes -= 8;
  }
  for (; nbytes != 0; --nbytes, ++data) {
    state = (state >> 8) ^ kTables[0][(state ^ static_cast<uint32_t>(*data)) & 0xFF];
  }
  return state;
}

uint32_t crc32c(const std::byte* data, size_t nbytes, uint32_t seed) {
  static const auto update = crc32c_isas().front().update;
  return ~update(data, nbytes, ~seed);
}

const std::vector<Crc32cIsa>& crc32c_isas() {
  static const std::vector<Crc32cIsa> isas = find_isas();
  return isas;
}

}  // namespace offload::aio
