// The reference kernel with fp32 moments: any architecture, one element at a time. Built for the
// baseline instruction set, where std::fma is a library call; exact, and slow without an FMA unit.
#include "adam/adamw.h"
#include "adam/step_scalar.h"
#include "adam/types.h"

namespace offload::adam {

void AdamWScalar(const AdamWCoefficients& coefficients, const AdamWArrays& a, std::size_t begin,
                 std::size_t end) noexcept {
  WithTypes(a.gradient_type, a.residual != nullptr, [&](auto element, auto split) {
    const auto* gradient = static_cast<const decltype(element)*>(a.gradient);
    using Masters = ScalarMasters<decltype(split)::value>;
    const Masters masters{static_cast<typename Masters::Element*>(a.weights), a.residual};
    for (std::size_t i = begin; i < end; ++i) {
      float m = a.exp_avg[i];
      float v = a.exp_avg_sq[i];
      float p = masters.Load(i);
      Step(coefficients, Widen(gradient[i]), &m, &v, &p);
      a.exp_avg[i] = FromBits(ToBits(m));
      a.exp_avg_sq[i] = FromBits(ToBits(v));
      masters.Store(i, p);
    }
  });
}

}  // namespace offload::adam
