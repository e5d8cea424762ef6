// The hash behind stochastic rounding, and the choice of a block's scale: integers and exact
// arithmetic, one element at a time.
//
// In an unnamed namespace, so that each translation unit has its own copy (see vector_avx2.h).
#ifndef OFFLOAD_ADAM_BLOCK8_H_
#define OFFLOAD_ADAM_BLOCK8_H_

#include <cstddef>
#include <cstdint>

#include "adam/moments8.h"
#include "adam/widen_scalar.h"

namespace offload::adam {
namespace {

// Weyl sequences: the golden ratio in 32 and in 64 bits.
inline constexpr std::uint32_t kGolden32 = 0x9E3779B9u;
inline constexpr std::uint64_t kGolden64 = 0x9E3779B97F4A7C15u;

// Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (splitmix64).
[[maybe_unused]] std::uint64_t Mix64(std::uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// What the hash of a block's elements begins with.
[[maybe_unused]] std::uint32_t BlockKey(const Noise& noise, std::size_t block) {
  return static_cast<std::uint32_t>(
      Mix64(noise.key + (noise.first_block + block + 1) * kGolden64) >> 32);
}

// The hash of the element `number` of a block. The first moment rounds with its lower bits, the
// second with its upper ones.
// Source: Wellons, "Prospecting for Hash Functions" (lowbias32).
[[maybe_unused]] std::uint32_t Hash32(std::uint32_t block_key, std::uint32_t number) {
  std::uint32_t x = block_key + number * kGolden32;
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

[[maybe_unused]] float PowerOfTwo(int exponent) {
  return FromBits(static_cast<std::uint32_t>(exponent + 127) << 23);
}

// A block's scale, and its inverse.
struct Scale {
  std::uint16_t bfloat16;
  float inverse;
};

// Returns the least scale whose last code reaches a largest magnitude, given as fp32 bits up to
// kLargestBits.
template <typename SomeCurve>
Scale ScaleFor(std::int32_t largest_bits) {
  if (largest_bits == 0) return {0, 1.0f};
  const auto bits = static_cast<std::uint32_t>(largest_bits);
  int exponent = static_cast<int>(bits >> 23) - 127;
  if (exponent < kLeastScaleExponent) exponent = kLeastScaleExponent;
  // An exact product: a scale is a power of two, and what it makes denormal is far below C.
  const float shifted =
      FromBits(bits) * PowerOfTwo(-exponent) + FromBits(std::uint32_t{SomeCurve::kOffsetBits});
  if (BitsOf(shifted) > static_cast<std::uint32_t>(SomeCurve::kLastBits)) ++exponent;
  return {static_cast<std::uint16_t>((exponent + 127) << 7), PowerOfTwo(-exponent)};
}

// Takes out of a block what cannot be stored: a NaN becomes zero, and what lies beyond 2^126 that.
// Returns the fp32 bits of the largest magnitude left.
[[maybe_unused]] std::int32_t MakeStorable(float* values, std::size_t count) {
  std::uint32_t largest_bits = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t bits = BitsOf(values[i]);
    std::uint32_t sign = bits & 0x80000000u;
    std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    // A NaN's sign depends on the instruction set.
    if (magnitude > 0x7F800000u) sign = magnitude = 0;
    if (magnitude > std::uint32_t{kLargestBits}) magnitude = kLargestBits;
    if (magnitude > largest_bits) largest_bits = magnitude;
    values[i] = FromBits(sign | magnitude);
  }
  return static_cast<std::int32_t>(largest_bits);
}

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_BLOCK8_H_
