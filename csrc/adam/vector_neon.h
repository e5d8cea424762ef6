// Four lanes of AArch64's Advanced SIMD; see vector_avx2.h for the interface and the unnamed
// namespace. Every AArch64 processor has it, so it needs no flags and no question at run time.
#ifndef OFFLOAD_ADAM_VECTOR_NEON_H_
#define OFFLOAD_ADAM_VECTOR_NEON_H_

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "adam/element.h"

namespace offload::adam {
namespace {

struct Vector {
  static constexpr std::size_t kLanes = 4;
  using Floats = float32x4_t;
  using Ints = int32x4_t;
  using Mask = uint32x4_t;
  using Doubles = float64x2_t;

  static Floats Set(float x) { return vdupq_n_f32(x); }
  static Ints SetInts(std::int32_t x) { return vdupq_n_s32(x); }
  static Ints Iota() {
    const std::int32_t numbers[kLanes] = {0, 1, 2, 3};
    return vld1q_s32(numbers);
  }
  static Floats AsFloats(Ints x) { return vreinterpretq_f32_s32(x); }
  static Ints AsInts(Floats x) { return vreinterpretq_s32_f32(x); }

  static Floats Load(const float* at) { return vld1q_f32(at); }
  static void Store(float* at, Floats x) { vst1q_f32(at, x); }
  static Ints LoadHalves(const void* at) {
    return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(static_cast<const std::uint16_t*>(at))));
  }
  static Ints LoadSignedHalves(const std::int16_t* at) { return vmovl_s16(vld1_s16(at)); }
  static Ints LoadBytes(const std::uint8_t* at) {
    // Four bytes, and not the eight that vld1_u8 would read.
    const std::uint32_t four = at[0] | at[1] << 8 | at[2] << 16 | std::uint32_t{at[3]} << 24;
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
  }
  static Floats Widen(const float* at) { return Load(at); }
  static Floats Widen(const BFloat16* at) { return AsFloats(ShiftLeft<16>(LoadHalves(at))); }
  static Floats Widen(const Float16* at) {
    const uint16x4_t halves = vld1_u16(reinterpret_cast<const std::uint16_t*>(at));
    return vcvt_f32_f16(vreinterpret_f16_u16(halves));
  }
  static void StoreHalves(std::uint16_t* high, std::int16_t* low, Ints upper, Ints lower) {
    vst1_u16(high, vmovn_u32(vreinterpretq_u32_s32(upper)));
    vst1_s16(low, vmovn_s32(lower));
  }
  static void StoreBytes(std::uint8_t* at, Ints a, Ints b, Ints c, Ints d) {
    const int16x8_t halves_ab = vcombine_s16(vmovn_s32(a), vmovn_s32(b));
    const int16x8_t halves_cd = vcombine_s16(vmovn_s32(c), vmovn_s32(d));
    vst1q_u8(at, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(halves_ab), vmovn_s16(halves_cd))));
  }

  static Floats Add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats Sub(Floats a, Floats b) { return vsubq_f32(a, b); }
  static Floats Mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats Div(Floats a, Floats b) { return vdivq_f32(a, b); }
  static Floats Sqrt(Floats a) { return vsqrtq_f32(a); }
  static Floats Fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }

  static Ints Add(Ints a, Ints b) { return vaddq_s32(a, b); }
  static Ints Sub(Ints a, Ints b) { return vsubq_s32(a, b); }
  static Ints MulLow(Ints a, Ints b) { return vmulq_s32(a, b); }
  static Ints And(Ints a, Ints b) { return vandq_s32(a, b); }
  static Ints Or(Ints a, Ints b) { return vorrq_s32(a, b); }
  static Ints Xor(Ints a, Ints b) { return veorq_s32(a, b); }
  static Ints Max(Ints a, Ints b) { return vmaxq_s32(a, b); }
  static Ints Min(Ints a, Ints b) { return vminq_s32(a, b); }
  template <int kBits>
  static Ints ShiftLeft(Ints a) {
    return vshlq_n_s32(a, kBits);
  }
  template <int kBits>
  static Ints ShiftRight(Ints a) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), kBits));
  }
  static std::int32_t Largest(Ints a) { return vmaxvq_s32(a); }

  static Mask IsNan(Floats a) { return vmvnq_u32(vceqq_f32(a, a)); }
  static bool None(Mask mask) { return vmaxvq_u32(mask) == 0; }
  static Floats Select(Mask mask, Floats yes, Floats no) { return vbslq_f32(mask, yes, no); }

  static Doubles LoadDoubles(const double* at) { return vld1q_f64(at); }
  static void StoreDoubles(double* at, Doubles x) { vst1q_f64(at, x); }
  static void AddSquares(Floats x, Doubles* lower, Doubles* upper) {
    const float64x2_t a = vcvt_f64_f32(vget_low_f32(x));
    const float64x2_t b = vcvt_high_f64_f32(x);
    *lower = vfmaq_f64(*lower, a, a);
    *upper = vfmaq_f64(*upper, b, b);
  }
};

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_VECTOR_NEON_H_
