// The AdamW update of one flat range of elements, in one pass over memory.
//
// Per element, in fp32 with fused multiply-adds exactly where written:
//
//   g = gradient * grad_scale
//   m = lerp(m, g, 1 - beta1)             fma, from m when 1 - beta1 < 0.5, else from g (as torch)
//   v = fma((1 - beta2) * g, g, beta2 * v)
//   d = fma(sqrt(v), 1 / sqrt(1 - beta2^step), eps)
//   p = fma(-lr / (1 - beta1^step), m / d, p * (1 - lr * weight_decay))
//
// Every operation is correctly rounded, so each instruction set gives the same bits, tails
// included, and so does any division of the range among threads. A NaN is stored as kCanonicalNan
// in every array: payloads depend on operand order, which the instruction sets do not share.
//
// Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2; operation
// order of torch.optim.AdamW.
#ifndef OFFLOAD_ADAM_ADAMW_H_
#define OFFLOAD_ADAM_ADAMW_H_

#include <cstddef>
#include <cstdint>

#include "adam/element.h"

namespace offload::adam {

// Settings of one update, as the user states them.
struct AdamWSettings {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  std::int64_t step;  // 1 for the first update.
  double grad_scale;
};

// What the loop multiplies with: computed once, in double, and rounded to fp32.
struct AdamWCoefficients {
  float grad_scale;
  bool lerp_from_gradient;
  float lerp_weight;  // 1 - beta1, or -beta1 when the interpolation starts at the gradient.
  float beta2;
  float one_minus_beta2;
  float inverse_sqrt_bias_correction2;
  float eps;
  float decay;
  float negative_step_size;
};

// The arrays of one update, all of the same length and disjoint, owned by the caller until the call
// returns.
struct AdamWArrays {
  const void* gradient;
  ElementType gradient_type;
  // fp32 master weights; or, with a residual, the bf16 high halves of the masters. See
  // offload/codec for the split: master bits = (high << 16) + sign_extended(residual).
  void* weights;
  std::int16_t* residual;  // Null: the weights are fp32.
  float* exp_avg;
  float* exp_avg_sq;
};

// Returns the coefficients of one step. Throws std::invalid_argument, naming the setting and its
// value, for settings outside lr >= 0, 0 <= beta < 1, eps > 0 (in fp32), weight_decay >= 0,
// step >= 1, grad_scale finite.
AdamWCoefficients MakeCoefficients(const AdamWSettings& settings);

// Updates the elements [begin, end) of the arrays. One kernel per instruction set.
using AdamWKernel = void (*)(const AdamWCoefficients&, const AdamWArrays&, std::size_t begin,
                             std::size_t end);
void AdamWScalar(const AdamWCoefficients& coefficients, const AdamWArrays& arrays,
                 std::size_t begin, std::size_t end) noexcept;
void AdamWAvx2(const AdamWCoefficients& coefficients, const AdamWArrays& arrays, std::size_t begin,
               std::size_t end) noexcept;
void AdamWAvx512(const AdamWCoefficients& coefficients, const AdamWArrays& arrays,
                 std::size_t begin, std::size_t end) noexcept;
void AdamWNeon(const AdamWCoefficients& coefficients, const AdamWArrays& arrays, std::size_t begin,
               std::size_t end) noexcept;

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_ADAMW_H_
