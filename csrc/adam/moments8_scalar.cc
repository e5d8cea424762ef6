// The reference kernel with 8-bit moments, one element at a time; and the codes alone, for those
// who convert moments.
#include <algorithm>
#include <cmath>

#include "adam/block8.h"
#include "adam/moments8.h"
#include "adam/step_scalar.h"
#include "adam/types.h"

namespace offload::adam {
namespace {

// Of SomeCurve::kShift bits, those that nearest rounding adds.
template <typename SomeCurve>
constexpr std::uint32_t kHalf = 1u << (SomeCurve::kShift - 1);

template <typename SomeCurve>
float DecodeMagnitude(std::uint32_t code, std::uint16_t scale) {
  const float curve = FromBits((std::uint32_t{SomeCurve::kBase} + code) << SomeCurve::kShift);
  return (curve - FromBits(std::uint32_t{SomeCurve::kOffsetBits})) * Widen(BFloat16{scale});
}

// `rounding`: what is added to the bits that a code leaves out.
template <typename SomeCurve>
std::uint32_t EncodeMagnitude(float magnitude, const Scale& scale, std::uint32_t rounding) {
  const float offset = FromBits(std::uint32_t{SomeCurve::kOffsetBits});
  const std::uint32_t bits = BitsOf(std::fma(magnitude, scale.inverse, offset));
  return ((bits + rounding) >> SomeCurve::kShift) - std::uint32_t{SomeCurve::kBase};
}

float DecodeFirst(std::uint8_t code, std::uint16_t scale) {
  const float magnitude = DecodeMagnitude<FirstCurve>(code & 0x7Fu, scale);
  return (code & 0x80u) != 0 ? -magnitude : magnitude;
}

std::uint8_t EncodeFirst(float m, const Scale& scale, std::uint32_t rounding) {
  const std::uint32_t code = EncodeMagnitude<FirstCurve>(std::fabs(m), scale, rounding);
  return static_cast<std::uint8_t>(code | (std::signbit(m) ? 0x80u : 0u));
}

std::uint8_t EncodeSecond(float v, const Scale& scale, std::uint32_t rounding) {
  const std::uint32_t code = EncodeMagnitude<SecondCurve>(v, scale, rounding);
  return static_cast<std::uint8_t>(v > 0 ? std::max(code, 1u) : code);
}

}  // namespace

Noise MakeNoise(std::uint64_t seed, std::int64_t step, std::uint64_t first_element) {
  const std::uint64_t key = Mix64(seed + Mix64(static_cast<std::uint64_t>(step) * kGolden64));
  return {key, first_element / kScaleNumel};
}

void AdamW8Scalar(const AdamWCoefficients& coefficients, const AdamW8Arrays& a, const Noise& noise,
                  std::size_t begin, std::size_t end) noexcept {
  WithTypes(a.gradient_type, a.residual != nullptr, [&](auto element, auto split) {
    const auto* gradient = static_cast<const decltype(element)*>(a.gradient);
    using Masters = ScalarMasters<decltype(split)::value>;
    const Masters masters{static_cast<typename Masters::Element*>(a.weights), a.residual};
    for (std::size_t first = begin; first < end; first += kScaleNumel) {
      const std::size_t block = first / kScaleNumel;
      const std::size_t count = std::min(kScaleNumel, end - first);
      float m[kScaleNumel] = {};
      float v[kScaleNumel] = {};
      Decode8(Moment::kFirst, a.exp_avg, m, first, first + count);
      Decode8(Moment::kSecond, a.exp_avg_sq, v, first, first + count);
      for (std::size_t j = 0; j < count; ++j) {
        float p = masters.Load(first + j);
        Step(coefficients, Widen(gradient[first + j]), &m[j], &v[j], &p);
        masters.Store(first + j, p);
      }
      const Scale m_scale = ScaleFor<FirstCurve>(MakeStorable(m, count));
      const Scale v_scale = ScaleFor<SecondCurve>(MakeStorable(v, count));
      a.exp_avg.scales[block] = m_scale.bfloat16;
      a.exp_avg_sq.scales[block] = v_scale.bfloat16;
      const std::uint32_t key = BlockKey(noise, block);
      for (std::size_t j = 0; j < count; ++j) {
        const std::uint32_t hash = Hash32(key, static_cast<std::uint32_t>(j));
        const std::uint32_t lower = hash & ((1u << FirstCurve::kShift) - 1);
        const std::uint32_t upper = hash >> (32 - SecondCurve::kShift);
        a.exp_avg.codes[first + j] = EncodeFirst(m[j], m_scale, lower);
        a.exp_avg_sq.codes[first + j] = EncodeSecond(v[j], v_scale, upper);
      }
    }
  });
}

void Decode8(Moment moment, const Moment8& from, float* values, std::size_t begin,
             std::size_t end) noexcept {
  for (std::size_t i = begin; i < end; ++i) {
    const std::uint16_t scale = from.scales[i / kScaleNumel];
    values[i - begin] = moment == Moment::kFirst
                            ? DecodeFirst(from.codes[i], scale)
                            : DecodeMagnitude<SecondCurve>(from.codes[i], scale);
  }
}

void Encode8(Moment moment, const float* values, const Moment8& to, std::size_t begin,
             std::size_t end) noexcept {
  for (std::size_t first = begin; first < end; first += kScaleNumel) {
    const std::size_t count = std::min(kScaleNumel, end - first);
    float storable[kScaleNumel];
    for (std::size_t j = 0; j < count; ++j) {
      const float value = values[first - begin + j];
      storable[j] = moment == Moment::kSecond && value < 0 ? 0.0f : value;
    }
    const std::int32_t largest_bits = MakeStorable(storable, count);
    const Scale scale = moment == Moment::kFirst ? ScaleFor<FirstCurve>(largest_bits)
                                                 : ScaleFor<SecondCurve>(largest_bits);
    to.scales[first / kScaleNumel] = scale.bfloat16;
    for (std::size_t j = 0; j < count; ++j) {
      to.codes[first + j] = moment == Moment::kFirst
                                ? EncodeFirst(storable[j], scale, kHalf<FirstCurve>)
                                : EncodeSecond(storable[j], scale, kHalf<SecondCurve>);
    }
  }
}

}  // namespace offload::adam
