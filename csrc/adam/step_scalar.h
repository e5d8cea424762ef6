// One element of an AdamW update, whatever holds the moments: the reference for step_vector.h.
//
// In an unnamed namespace, so that each translation unit has its own copy (see widen_scalar.h).
#ifndef OFFLOAD_ADAM_STEP_SCALAR_H_
#define OFFLOAD_ADAM_STEP_SCALAR_H_

#include <cmath>
#include <type_traits>

#include "adam/adamw.h"
#include "adam/widen_scalar.h"

namespace offload::adam {
namespace {

// The bits of a value about to be stored.
[[maybe_unused]] std::uint32_t ToBits(float value) {
  return std::isnan(value) ? kCanonicalNan : BitsOf(value);
}

// Where the weights are: fp32 masters, or their high halves and residuals.
template <bool kSplit>
struct ScalarMasters {
  using Element = std::conditional_t<kSplit, std::uint16_t, float>;

  Element* weights;
  std::int16_t* residual;

  float Load(std::size_t i) const {
    if constexpr (kSplit) {
      const std::uint32_t high = weights[i];
      return FromBits((high << 16) + static_cast<std::uint32_t>(std::int32_t{residual[i]}));
    } else {
      return weights[i];
    }
  }

  void Store(std::size_t i, float master) const {
    const std::uint32_t bits = ToBits(master);
    if constexpr (kSplit) {
      weights[i] = static_cast<std::uint16_t>((bits + kHighRounding) >> 16);
      residual[i] = static_cast<std::int16_t>(bits & 0xFFFFu);
    } else {
      weights[i] = FromBits(bits);
    }
  }
};

// Updates the moments and the master weight of one element.
[[maybe_unused]] void Step(const AdamWCoefficients& c, float gradient, float* m, float* v,
                           float* p) {
  const float g = gradient * c.grad_scale;
  *m = std::fma(c.lerp_weight, g - *m, c.lerp_from_gradient ? g : *m);
  *v = std::fma(c.one_minus_beta2 * g, g, c.beta2 * *v);
  const float denominator = std::fma(std::sqrt(*v), c.inverse_sqrt_bias_correction2, c.eps);
  *p = std::fma(c.negative_step_size, *m / denominator, *p * c.decay);
}

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_STEP_SCALAR_H_
