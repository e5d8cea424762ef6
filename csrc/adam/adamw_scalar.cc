// The reference kernel: any architecture, one element at a time. Built for the baseline
// instruction set, where std::fma is a library call; exact, and slow without an FMA unit.
#include <cmath>
#include <cstring>

#include "adam/adamw.h"

namespace offload::adam {
namespace {

float FromBits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The bits of a value about to be stored.
std::uint32_t ToBits(float value) {
  if (std::isnan(value)) return kCanonicalNan;
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <bool kBFloat16Gradient>
float LoadGradient(const AdamWArrays& a, std::size_t i) {
  if constexpr (kBFloat16Gradient) {
    const std::uint32_t high = static_cast<const std::uint16_t*>(a.gradient)[i];
    return FromBits(high << 16);
  } else {
    return static_cast<const float*>(a.gradient)[i];
  }
}

template <bool kSplitWeights>
float LoadMaster(const AdamWArrays& a, std::size_t i) {
  if constexpr (kSplitWeights) {
    const std::uint32_t high = static_cast<const std::uint16_t*>(a.weights)[i];
    return FromBits((high << 16) + static_cast<std::uint32_t>(std::int32_t{a.residual[i]}));
  } else {
    return static_cast<const float*>(a.weights)[i];
  }
}

template <bool kSplitWeights>
void StoreMaster(const AdamWArrays& a, std::size_t i, float master) {
  const std::uint32_t bits = ToBits(master);
  if constexpr (kSplitWeights) {
    static_cast<std::uint16_t*>(a.weights)[i] =
        static_cast<std::uint16_t>((bits + kHighRounding) >> 16);
    a.residual[i] = static_cast<std::int16_t>(bits & 0xFFFFu);
  } else {
    static_cast<float*>(a.weights)[i] = FromBits(bits);
  }
}

template <bool kBFloat16Gradient, bool kSplitWeights>
void Update(const AdamWCoefficients& c, const AdamWArrays& a, std::size_t begin, std::size_t end) {
  for (std::size_t i = begin; i < end; ++i) {
    const float g = LoadGradient<kBFloat16Gradient>(a, i) * c.grad_scale;
    float m = a.exp_avg[i];
    m = std::fma(c.lerp_weight, g - m, c.lerp_from_gradient ? g : m);
    const float v = std::fma(c.one_minus_beta2 * g, g, c.beta2 * a.exp_avg_sq[i]);
    const float denominator = std::fma(std::sqrt(v), c.inverse_sqrt_bias_correction2, c.eps);
    const float p =
        std::fma(c.negative_step_size, m / denominator, LoadMaster<kSplitWeights>(a, i) * c.decay);
    a.exp_avg[i] = FromBits(ToBits(m));
    a.exp_avg_sq[i] = FromBits(ToBits(v));
    StoreMaster<kSplitWeights>(a, i, p);
  }
}

}  // namespace

void AdamWScalar(const AdamWCoefficients& coefficients, const AdamWArrays& arrays,
                 std::size_t begin, std::size_t end) noexcept {
  const bool bfloat16_gradient = arrays.gradient_type == ElementType::kBFloat16;
  if (arrays.residual != nullptr) {
    bfloat16_gradient ? Update<true, true>(coefficients, arrays, begin, end)
                      : Update<false, true>(coefficients, arrays, begin, end);
  } else {
    bfloat16_gradient ? Update<true, false>(coefficients, arrays, begin, end)
                      : Update<false, false>(coefficients, arrays, begin, end);
  }
}

}  // namespace offload::adam
