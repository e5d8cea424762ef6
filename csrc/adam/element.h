// The element types of gradients and weights, and their bits.
#ifndef OFFLOAD_ADAM_ELEMENT_H_
#define OFFLOAD_ADAM_ELEMENT_H_

#include <cstdint>

namespace offload::adam {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

// Sixteen bits of a gradient, as a type of their own, so that overloads tell how to widen them.
// Both widen to fp32 exactly.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// The one NaN that is ever stored: quiet, positive, and still a NaN in its upper 16 bits alone.
inline constexpr std::uint32_t kCanonicalNan = 0x7FC00000u;

// Half a unit of the upper 16 bits: adding it before the shift rounds to nearest, half away from
// zero, because the sign is apart from the magnitude.
inline constexpr std::uint32_t kHighRounding = 0x8000u;

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_ELEMENT_H_
