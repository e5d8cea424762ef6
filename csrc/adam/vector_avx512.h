// Sixteen lanes of AVX-512 (F, BW, VL, DQ); see vector_avx2.h for the interface and the unnamed
// namespace.
#ifndef OFFLOAD_ADAM_VECTOR_AVX512_H_
#define OFFLOAD_ADAM_VECTOR_AVX512_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "adam/element.h"

namespace offload::adam {
namespace {

struct Vector {
  static constexpr std::size_t kLanes = 16;
  using Floats = __m512;
  using Ints = __m512i;
  using Mask = __mmask16;
  using Doubles = __m512d;

  static Floats Set(float x) { return _mm512_set1_ps(x); }
  static Ints SetInts(std::int32_t x) { return _mm512_set1_epi32(x); }
  static Ints Iota() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static Floats AsFloats(Ints x) { return _mm512_castsi512_ps(x); }
  static Ints AsInts(Floats x) { return _mm512_castps_si512(x); }

  static Floats Load(const float* at) { return _mm512_loadu_ps(at); }
  static void Store(float* at, Floats x) { _mm512_storeu_ps(at, x); }
  static Ints LoadHalves(const void* at) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
  }
  static Ints LoadSignedHalves(const std::int16_t* at) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static Ints LoadBytes(const std::uint8_t* at) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static Floats Widen(const float* at) { return Load(at); }
  static Floats Widen(const BFloat16* at) { return AsFloats(ShiftLeft<16>(LoadHalves(at))); }
  static Floats Widen(const Float16* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static void StoreHalves(std::uint16_t* high, std::int16_t* low, Ints upper, Ints lower) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm512_cvtepi32_epi16(upper));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm512_cvtepi32_epi16(lower));
  }
  static void StoreBytes(std::uint8_t* at, Ints a, Ints b, Ints c, Ints d) {
    const __m512i halves_ab = _mm512_packus_epi32(a, b);
    const __m512i halves_cd = _mm512_packus_epi32(c, d);
    // Fours, in the order a0 b0 c0 d0 a1 b1 c1 d1 ... d3.
    const __m512i fours = _mm512_packus_epi16(halves_ab, halves_cd);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(at, _mm512_permutexvar_epi32(order, fours));
  }

  static Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats Sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats Mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats Div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats Sqrt(Floats a) { return _mm512_sqrt_ps(a); }
  static Floats Fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  static Ints Add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints Sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static Ints MulLow(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
  static Ints And(Ints a, Ints b) { return _mm512_and_si512(a, b); }
  static Ints Or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
  static Ints Xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
  static Ints Max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
  static Ints Min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
  template <int kBits>
  static Ints ShiftLeft(Ints a) {
    return _mm512_slli_epi32(a, kBits);
  }
  template <int kBits>
  static Ints ShiftRight(Ints a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static std::int32_t Largest(Ints a) { return _mm512_reduce_max_epi32(a); }

  static Mask IsNan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static bool None(Mask mask) { return mask == 0; }
  static Floats Select(Mask mask, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(mask, no, yes);
  }

  static Doubles LoadDoubles(const double* at) { return _mm512_loadu_pd(at); }
  static void StoreDoubles(double* at, Doubles x) { _mm512_storeu_pd(at, x); }
  static void AddSquares(Floats x, Doubles* lower, Doubles* upper) {
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    *lower = _mm512_fmadd_pd(a, a, *lower);
    *upper = _mm512_fmadd_pd(b, b, *upper);
  }
};

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_VECTOR_AVX512_H_
