// One vector of an AdamW update, whatever holds the moments: the arithmetic of adamw.h, and the
// master weights.
//
// `V` is the `Vector` of vector_avx2.h and its like. Templates over an unnamed namespace's type, so
// each translation unit has its own.
#ifndef OFFLOAD_ADAM_STEP_VECTOR_H_
#define OFFLOAD_ADAM_STEP_VECTOR_H_

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "adam/adamw.h"

namespace offload::adam {
namespace {

template <typename V>
struct Constants {
  explicit Constants(const AdamWCoefficients& c)
      : lerp_from_gradient(c.lerp_from_gradient),
        grad_scale(V::Set(c.grad_scale)),
        lerp_weight(V::Set(c.lerp_weight)),
        beta2(V::Set(c.beta2)),
        one_minus_beta2(V::Set(c.one_minus_beta2)),
        inverse_sqrt_bias_correction2(V::Set(c.inverse_sqrt_bias_correction2)),
        eps(V::Set(c.eps)),
        decay(V::Set(c.decay)),
        negative_step_size(V::Set(c.negative_step_size)) {}

  bool lerp_from_gradient;
  typename V::Floats grad_scale;
  typename V::Floats lerp_weight;
  typename V::Floats beta2;
  typename V::Floats one_minus_beta2;
  typename V::Floats inverse_sqrt_bias_correction2;
  typename V::Floats eps;
  typename V::Floats decay;
  typename V::Floats negative_step_size;
};

// Moments and master weights of a vector's elements.
template <typename V>
struct State {
  typename V::Floats m;
  typename V::Floats v;
  typename V::Floats p;
};

template <typename V>
State<V> Updated(const Constants<V>& c, typename V::Floats gradient, const State<V>& old) {
  const auto g = V::Mul(gradient, c.grad_scale);
  const auto m = V::Fma(c.lerp_weight, V::Sub(g, old.m), c.lerp_from_gradient ? g : old.m);
  const auto v = V::Fma(V::Mul(c.one_minus_beta2, g), g, V::Mul(c.beta2, old.v));
  const auto denominator = V::Fma(V::Sqrt(v), c.inverse_sqrt_bias_correction2, c.eps);
  const auto p = V::Fma(c.negative_step_size, V::Div(m, denominator), V::Mul(old.p, c.decay));
  return {m, v, p};
}

template <typename V>
typename V::Floats CanonicalNans(typename V::Floats x) {
  const auto nan = V::AsFloats(V::SetInts(static_cast<std::int32_t>(kCanonicalNan)));
  return V::Select(V::IsNan(x), nan, x);
}

// Where the weights are: fp32 masters, or their high halves and residuals.
template <typename V, bool kSplit>
struct Masters {
  using Element = std::conditional_t<kSplit, std::uint16_t, float>;

  Element* weights;
  std::int16_t* residual;

  Masters From(std::size_t i) const { return {weights + i, kSplit ? residual + i : nullptr}; }

  typename V::Floats Load() const {
    if constexpr (kSplit) {
      const auto high = V::template ShiftLeft<16>(V::LoadHalves(weights));
      return V::AsFloats(V::Add(high, V::LoadSignedHalves(residual)));
    } else {
      return V::Load(weights);
    }
  }

  void Store(typename V::Floats master) const {
    if constexpr (kSplit) {
      const auto bits = V::AsInts(master);
      const auto rounded = V::Add(bits, V::SetInts(static_cast<std::int32_t>(kHighRounding)));
      V::StoreHalves(weights, residual, V::template ShiftRight<16>(rounded),
                     V::And(bits, V::SetInts(0xFFFF)));
    } else {
      V::Store(weights, master);
    }
  }
};

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_STEP_VECTOR_H_
