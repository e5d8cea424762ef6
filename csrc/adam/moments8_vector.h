// The AdamW kernel with 8-bit moments over a `Vector` of any width (see step_vector.h): a block is
// decoded and updated into a buffer in the first-level cache, then encoded with its new scales.
#ifndef OFFLOAD_ADAM_MOMENTS8_VECTOR_H_
#define OFFLOAD_ADAM_MOMENTS8_VECTOR_H_

#include <cstring>

#include "adam/block8.h"
#include "adam/codes8_vector.h"
#include "adam/moments8.h"
#include "adam/step_vector.h"
#include "adam/types.h"

namespace offload::adam {
namespace {

template <typename V, typename Gradient, bool kSplit>
struct Block {
  const Gradient* gradient;
  Masters<V, kSplit> masters;
  std::uint8_t* exp_avg;
  std::uint8_t* exp_avg_sq;
  std::uint16_t* exp_avg_scale;
  std::uint16_t* exp_avg_sq_scale;
};

template <typename V, typename Gradient, bool kSplit>
void UpdateBlock(Constants<V> c, const Block<V, Gradient, kSplit>& at, std::uint32_t key) {
  alignas(64) float m[kScaleNumel];
  alignas(64) float v[kScaleNumel];
  const float old_m_scale = Widen(BFloat16{*at.exp_avg_scale});
  const float old_v_scale = Widen(BFloat16{*at.exp_avg_sq_scale});
  auto m_largest = V::SetInts(0);
  auto v_largest = V::SetInts(0);
  for (std::size_t j = 0; j < kScaleNumel; j += V::kLanes) {
    const Masters<V, kSplit> masters = at.masters.From(j);
    const State<V> old{
        DecodeFirsts<V>(at.exp_avg + j, old_m_scale),
        DecodeMagnitudes<V, SecondCurve>(V::LoadBytes(at.exp_avg_sq + j), old_v_scale),
        masters.Load()};
    State<V> now = Updated<V>(c, V::Widen(at.gradient + j), old);
    if (__builtin_expect(!V::None(V::IsNan(now.p)), 0)) now.p = CanonicalNans<V>(now.p);
    masters.Store(now.p);
    V::Store(m + j, now.m);
    V::Store(v + j, now.v);
    m_largest = V::Max(m_largest, V::And(V::AsInts(now.m), V::SetInts(kMagnitude)));
    v_largest = V::Max(v_largest, V::And(V::AsInts(now.v), V::SetInts(kMagnitude)));
  }
  std::int32_t m_bits = V::Largest(m_largest);
  std::int32_t v_bits = V::Largest(v_largest);
  if (__builtin_expect(m_bits > kLargestBits, 0)) m_bits = MakeStorable(m, kScaleNumel);
  if (__builtin_expect(v_bits > kLargestBits, 0)) v_bits = MakeStorable(v, kScaleNumel);
  const Scale m_scale = ScaleFor<FirstCurve>(m_bits);
  const Scale v_scale = ScaleFor<SecondCurve>(v_bits);
  *at.exp_avg_scale = m_scale.bfloat16;
  *at.exp_avg_sq_scale = v_scale.bfloat16;

  auto weyl = V::Add(V::SetInts(static_cast<std::int32_t>(key)),
                     V::MulLow(V::Iota(), V::SetInts(static_cast<std::int32_t>(kGolden32))));
  const auto weyl_step = V::SetInts(static_cast<std::int32_t>(kGolden32 * V::kLanes));
  const auto m_inverse = V::Set(m_scale.inverse);
  const auto v_inverse = V::Set(v_scale.inverse);
  for (std::size_t j = 0; j < kScaleNumel; j += 4 * V::kLanes) {
    typename V::Ints firsts[4];
    typename V::Ints seconds[4];
    for (std::size_t k = 0; k < 4; ++k) {
      const auto hash = Hashes<V>(weyl);
      weyl = V::Add(weyl, weyl_step);
      firsts[k] = EncodeFirsts<V>(V::AsInts(V::Load(m + j + k * V::kLanes)), m_inverse, hash);
      seconds[k] = EncodeSeconds<V>(V::AsInts(V::Load(v + j + k * V::kLanes)), v_inverse, hash);
    }
    V::StoreBytes(at.exp_avg + j, firsts[0], firsts[1], firsts[2], firsts[3]);
    V::StoreBytes(at.exp_avg_sq + j, seconds[0], seconds[1], seconds[2], seconds[3]);
  }
}

// The last block of the arrays goes through the same code in a zero-filled copy: zeros stay zeros,
// and are never the largest.
template <typename V, typename Gradient, bool kSplit>
void UpdatePart(const Constants<V>& c, const Block<V, Gradient, kSplit>& at, std::uint32_t key,
                std::size_t count) {
  Gradient gradient[kScaleNumel] = {};
  typename Masters<V, kSplit>::Element weights[kScaleNumel] = {};
  std::int16_t residual[kScaleNumel] = {};
  std::uint8_t exp_avg[kScaleNumel] = {};
  std::uint8_t exp_avg_sq[kScaleNumel] = {};
  const std::size_t weights_nbytes = count * sizeof(weights[0]);
  const std::size_t residual_nbytes = kSplit ? count * sizeof(residual[0]) : 0;
  std::memcpy(gradient, at.gradient, count * sizeof(gradient[0]));
  std::memcpy(weights, at.masters.weights, weights_nbytes);
  if constexpr (kSplit) std::memcpy(residual, at.masters.residual, residual_nbytes);
  std::memcpy(exp_avg, at.exp_avg, count);
  std::memcpy(exp_avg_sq, at.exp_avg_sq, count);
  UpdateBlock(c,
              Block<V, Gradient, kSplit>{gradient,
                                         {weights, residual},
                                         exp_avg,
                                         exp_avg_sq,
                                         at.exp_avg_scale,
                                         at.exp_avg_sq_scale},
              key);
  std::memcpy(at.masters.weights, weights, weights_nbytes);
  if constexpr (kSplit) std::memcpy(at.masters.residual, residual, residual_nbytes);
  std::memcpy(at.exp_avg, exp_avg, count);
  std::memcpy(at.exp_avg_sq, exp_avg_sq, count);
}

template <typename V>
void AdamW8Vector(const AdamWCoefficients& coefficients, const AdamW8Arrays& a, const Noise& noise,
                  std::size_t begin, std::size_t end) {
  const Constants<V> c(coefficients);
  WithTypes(a.gradient_type, a.residual != nullptr, [&](auto element, auto split) {
    using Gradient = decltype(element);
    using SomeMasters = Masters<V, decltype(split)::value>;
    const auto* gradient = static_cast<const Gradient*>(a.gradient);
    const SomeMasters masters{static_cast<typename SomeMasters::Element*>(a.weights), a.residual};
    for (std::size_t i = begin; i < end; i += kScaleNumel) {
      const std::size_t block = i / kScaleNumel;
      const Block<V, Gradient, decltype(split)::value> at{
          gradient + i,           masters.From(i),          a.exp_avg.codes + i,
          a.exp_avg_sq.codes + i, a.exp_avg.scales + block, a.exp_avg_sq.scales + block};
      const std::uint32_t key = BlockKey(noise, block);
      if (i + kScaleNumel <= end) {
        UpdateBlock(c, at, key);
      } else {
        UpdatePart(c, at, key, end - i);
      }
    }
  });
}

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_MOMENTS8_VECTOR_H_
