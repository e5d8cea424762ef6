// Eight lanes of AVX2, FMA and F16C, as adamw_vector.h, moments8_vector.h and norm_vector.h use
// them.
//
// Everything is in an unnamed namespace, and so the templates over it are each translation unit's
// own: the linker must never keep a copy that was built for AVX2 and run it everywhere. For the
// same reason no inline function of a standard header is instantiated in these units.
#ifndef OFFLOAD_ADAM_VECTOR_AVX2_H_
#define OFFLOAD_ADAM_VECTOR_AVX2_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "adam/element.h"

namespace offload::adam {
namespace {

struct Vector {
  static constexpr std::size_t kLanes = 8;
  using Floats = __m256;
  using Ints = __m256i;
  using Mask = __m256;
  // As many doubles as fit; kLanes / 2.
  using Doubles = __m256d;

  static Floats Set(float x) { return _mm256_set1_ps(x); }
  static Ints SetInts(std::int32_t x) { return _mm256_set1_epi32(x); }
  static Ints Iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static Floats AsFloats(Ints x) { return _mm256_castsi256_ps(x); }
  static Ints AsInts(Floats x) { return _mm256_castps_si256(x); }

  static Floats Load(const float* at) { return _mm256_loadu_ps(at); }
  static void Store(float* at, Floats x) { _mm256_storeu_ps(at, x); }
  static Ints LoadHalves(const void* at) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at)));
  }
  static Ints LoadSignedHalves(const std::int16_t* at) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static Ints LoadBytes(const std::uint8_t* at) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  }
  static Floats Widen(const float* at) { return Load(at); }
  static Floats Widen(const BFloat16* at) { return AsFloats(ShiftLeft<16>(LoadHalves(at))); }
  static Floats Widen(const Float16* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  // The lower halves of `upper` and `lower`, whose upper halves are zero, to two arrays.
  static void StoreHalves(std::uint16_t* high, std::int16_t* low, Ints upper, Ints lower) {
    // Packing works within 128-bit halves: upper 0-3, lower 0-3, upper 4-7, lower 4-7.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, lower), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_castsi256_si128(packed));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_extracti128_si256(packed, 1));
  }
  // Four vectors of values up to 255, to 4 * kLanes bytes.
  static void StoreBytes(std::uint8_t* at, Ints a, Ints b, Ints c, Ints d) {
    const __m256i halves_ab = _mm256_packus_epi32(a, b);
    const __m256i halves_cd = _mm256_packus_epi32(c, d);
    // Fours, in the order a0 b0 c0 d0 a1 b1 c1 d1.
    const __m256i fours = _mm256_packus_epi16(halves_ab, halves_cd);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_permutevar8x32_epi32(fours, order));
  }

  static Floats Add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats Sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats Mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats Div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats Sqrt(Floats a) { return _mm256_sqrt_ps(a); }
  static Floats Fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

  static Ints Add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Ints Sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static Ints MulLow(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
  static Ints And(Ints a, Ints b) { return _mm256_and_si256(a, b); }
  static Ints Or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
  static Ints Xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
  static Ints Max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
  static Ints Min(Ints a, Ints b) { return _mm256_min_epi32(a, b); }
  template <int kBits>
  static Ints ShiftLeft(Ints a) {
    return _mm256_slli_epi32(a, kBits);
  }
  template <int kBits>
  static Ints ShiftRight(Ints a) {
    return _mm256_srli_epi32(a, kBits);
  }
  static std::int32_t Largest(Ints a) {
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
  }

  static Mask IsNan(Floats a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static bool None(Mask mask) { return _mm256_testz_ps(mask, mask) != 0; }
  static Floats Select(Mask mask, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, mask); }

  static Doubles LoadDoubles(const double* at) { return _mm256_loadu_pd(at); }
  static void StoreDoubles(double* at, Doubles x) { _mm256_storeu_pd(at, x); }
  static void AddSquares(Floats x, Doubles* lower, Doubles* upper) {
    const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    const __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    *lower = _mm256_fmadd_pd(a, a, *lower);
    *upper = _mm256_fmadd_pd(b, b, *upper);
  }
};

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_VECTOR_AVX2_H_
