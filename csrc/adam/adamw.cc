#include "adam/adamw.h"

#include <cmath>
#include <sstream>
#include <stdexcept>

namespace offload::adam {
namespace {

template <typename Value>
void Require(bool holds, const char* name, const char* range, Value got) {
  if (holds) return;
  std::ostringstream message;
  message.precision(17);
  message << "adamw: " << name << " must be " << range << ", got " << got;
  throw std::invalid_argument(message.str());
}

}  // namespace

AdamWCoefficients MakeCoefficients(const AdamWSettings& settings) {
  const AdamWSettings& s = settings;
  Require(std::isfinite(s.lr) && s.lr >= 0, "lr", "finite and >= 0", s.lr);
  Require(s.beta1 >= 0 && s.beta1 < 1, "beta1", "in [0, 1)", s.beta1);
  Require(s.beta2 >= 0 && s.beta2 < 1, "beta2", "in [0, 1)", s.beta2);
  Require(std::isfinite(s.weight_decay) && s.weight_decay >= 0, "weight_decay", "finite and >= 0",
          s.weight_decay);
  Require(s.step >= 1, "step", ">= 1 (1 is the first update)", s.step);
  Require(std::isfinite(s.grad_scale), "grad_scale", "finite", s.grad_scale);
  const auto eps = static_cast<float>(s.eps);
  // An eps of zero would turn the padding between tensors (all zero) into 0 / 0.
  Require(std::isfinite(eps) && eps > 0, "eps", "positive and finite in fp32", s.eps);

  const auto step = static_cast<double>(s.step);
  const double bias_correction1 = 1 - std::pow(s.beta1, step);
  const double bias_correction2 = 1 - std::pow(s.beta2, step);
  // torch's lerp starts at the nearer end, which keeps m exact for beta1 = 0.
  const bool from_gradient = static_cast<float>(1 - s.beta1) >= 0.5f;

  AdamWCoefficients c;
  c.grad_scale = static_cast<float>(s.grad_scale);
  c.lerp_from_gradient = from_gradient;
  c.lerp_weight = static_cast<float>(from_gradient ? -s.beta1 : 1 - s.beta1);
  c.beta2 = static_cast<float>(s.beta2);
  c.one_minus_beta2 = static_cast<float>(1 - s.beta2);
  c.inverse_sqrt_bias_correction2 = static_cast<float>(1 / std::sqrt(bias_correction2));
  c.eps = eps;
  c.decay = static_cast<float>(1 - s.lr * s.weight_decay);
  c.negative_step_size = static_cast<float>(-s.lr / bias_correction1);
  return c;
}

}  // namespace offload::adam
