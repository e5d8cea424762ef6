// One element at a time: gradients widened to fp32, and the bits of a float.
//
// Everything is in an unnamed namespace, so that each translation unit has its own copy: the linker
// must never keep one that was built for a wider instruction set and run it everywhere.
#ifndef OFFLOAD_ADAM_WIDEN_SCALAR_H_
#define OFFLOAD_ADAM_WIDEN_SCALAR_H_

#include <cstdint>
#include <cstring>

#include "adam/element.h"

namespace offload::adam {
namespace {

[[maybe_unused]] float FromBits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

[[maybe_unused]] std::uint32_t BitsOf(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

[[maybe_unused]] float Widen(float value) { return value; }

[[maybe_unused]] float Widen(BFloat16 value) { return FromBits(std::uint32_t{value.bits} << 16); }

[[maybe_unused]] float Widen(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return FromBits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // The bits in place, with an exponent 112 too small; the product is exact, denormals included.
  const float scaled = FromBits(magnitude << 13) * FromBits((127u + 112u) << 23);
  return FromBits(sign | BitsOf(scaled));
}

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_WIDEN_SCALAR_H_
