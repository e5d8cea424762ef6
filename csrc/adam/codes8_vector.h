// The codes of 8-bit moments over a `Vector` of any width (see step_vector.h), and their rounding.
#ifndef OFFLOAD_ADAM_CODES8_VECTOR_H_
#define OFFLOAD_ADAM_CODES8_VECTOR_H_

#include "adam/block8.h"
#include "adam/moments8.h"

namespace offload::adam {
namespace {

// The bits of an fp32 number without its sign; as integers they are in the order of the magnitudes,
// with NaNs at the end.
inline constexpr std::int32_t kMagnitude = 0x7FFFFFFF;

template <typename V, typename SomeCurve>
typename V::Floats DecodeMagnitudes(typename V::Ints codes, float scale) {
  const auto curve =
      V::template ShiftLeft<SomeCurve::kShift>(V::Add(codes, V::SetInts(SomeCurve::kBase)));
  const float offset = FromBits(std::uint32_t{SomeCurve::kOffsetBits});
  // Every term is a multiple of the same power of two: exact.
  return V::Fma(V::AsFloats(curve), V::Set(scale), V::Set(-offset * scale));
}

template <typename V>
typename V::Floats DecodeFirsts(const std::uint8_t* codes, float scale) {
  const auto bytes = V::LoadBytes(codes);
  const auto magnitude = DecodeMagnitudes<V, FirstCurve>(V::And(bytes, V::SetInts(0x7F)), scale);
  const auto sign = V::template ShiftLeft<24>(V::And(bytes, V::SetInts(0x80)));
  return V::AsFloats(V::Or(V::AsInts(magnitude), sign));
}

template <typename V, typename SomeCurve>
typename V::Ints EncodeMagnitudes(typename V::Ints magnitude, typename V::Floats inverse,
                                  typename V::Ints rounding) {
  const auto offset = V::Set(FromBits(std::uint32_t{SomeCurve::kOffsetBits}));
  const auto bits = V::AsInts(V::Fma(V::AsFloats(magnitude), inverse, offset));
  return V::Sub(V::template ShiftRight<SomeCurve::kShift>(V::Add(bits, rounding)),
                V::SetInts(SomeCurve::kBase));
}

template <typename V>
typename V::Ints Hashes(typename V::Ints weyl) {
  auto x = V::Xor(weyl, V::template ShiftRight<16>(weyl));
  x = V::MulLow(x, V::SetInts(0x7FEB352D));
  x = V::Xor(x, V::template ShiftRight<15>(x));
  x = V::MulLow(x, V::SetInts(static_cast<std::int32_t>(0x846CA68Bu)));
  return V::Xor(x, V::template ShiftRight<16>(x));
}

// The codes of a vector of first moments, and of second ones, from their values' bits.
template <typename V>
typename V::Ints EncodeFirsts(typename V::Ints bits, typename V::Floats inverse,
                              typename V::Ints hash) {
  const auto code =
      EncodeMagnitudes<V, FirstCurve>(V::And(bits, V::SetInts(kMagnitude)), inverse,
                                      V::And(hash, V::SetInts((1 << FirstCurve::kShift) - 1)));
  return V::Or(code, V::template ShiftRight<24>(V::And(bits, V::SetInts(~kMagnitude))));
}

template <typename V>
typename V::Ints EncodeSeconds(typename V::Ints bits, typename V::Floats inverse,
                               typename V::Ints hash) {
  const auto code = EncodeMagnitudes<V, SecondCurve>(
      bits, inverse, V::template ShiftRight<32 - SecondCurve::kShift>(hash));
  return V::Max(code, V::Min(bits, V::SetInts(1)));  // Not zero becomes at least 1.
}

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_CODES8_VECTOR_H_
