// AdamW moments in eight bits: the format, and the update that reads and writes it.
//
// n elements of a moment are n codes of a byte, and one bf16 scale for each 128 of them (the last
// block may be shorter): 2.03 bytes per parameter for both moments. A scale is a power of two, or
// zero where every element is. A code stands for a line of a piecewise linear curve, as in mu-law
// companding: with C = 2^-octaves, it is the upper bits of the fp32 number |x| / scale + C,
//
//   |x| = scale * (fp32 of bits (base + code) << shift  -  C)
//
// so that code 0 is zero, steps are equal near zero, and grow with the value above C.
//
//   exp_avg     sign in bit 7, 7 bits of magnitude: 16 octaves of 8 steps
//   exp_avg_sq  8 bits: 16 octaves of 16 steps, or what kSecondMantissaBits says
//
// Decoding is exact. Encoding chooses the least scale whose last code reaches the block's largest
// value (a scale of at least 2^-90), and rounds between neighbouring codes up or down with odds
// that make it right on average: rounded to nearest, exp_avg_sq could not change by the thousandth
// that one step changes it. A second moment that is not zero never becomes zero. A value beyond
// 2^126 is stored as that, a NaN as zero: the block's other elements are not concerned, and the NaN
// is in the weight. What was decoded is encoded without change, except where the block's largest
// was rounded down to where half the scale will do. Bytes of zero are moments of zero.
//
// The odds come from a counter: a hash of seed, step, and the element's number. So results depend
// neither on threads nor on how a range is cut into calls at multiples of 128.
#ifndef OFFLOAD_ADAM_MOMENTS8_H_
#define OFFLOAD_ADAM_MOMENTS8_H_

#include <cstddef>
#include <cstdint>

#include "adam/adamw.h"

namespace offload::adam {

inline constexpr std::size_t kScaleNumel = 128;

constexpr std::size_t NumScales(std::size_t numel) {
  return (numel + kScaleNumel - 1) / kScaleNumel;
}

inline constexpr int kFirstMantissaBits = 3;
inline constexpr int kSecondMantissaBits = 4;

// One curve: the numbers that its codes are shifted and moved by.
template <int kCodeBits, int kMantissaBits>
struct Curve {
  static constexpr int kShift = 23 - kMantissaBits;
  static constexpr std::int32_t kLastCode = (1 << kCodeBits) - 1;
  static constexpr int kOctaves = (1 << kCodeBits) >> kMantissaBits;
  // C is one step of the exponent above 2^-kOctaves, because the last octave is [1, 2).
  static constexpr std::int32_t kOffsetBits = (127 + 1 - kOctaves) << 23;
  static constexpr std::int32_t kBase = kOffsetBits >> kShift;
  // fp32 bits of the largest |x| / scale + C.
  static constexpr std::int32_t kLastBits = (kBase + kLastCode) << kShift;
};
using FirstCurve = Curve<7, kFirstMantissaBits>;
using SecondCurve = Curve<8, kSecondMantissaBits>;

inline constexpr int kLeastScaleExponent = -90;
// fp32 bits of 2^126, the largest magnitude that is stored.
inline constexpr std::int32_t kLargestBits = (126 + 127) << 23;

struct Moment8 {
  std::uint8_t* codes;
  std::uint16_t* scales;  // bf16, NumScales(n) of them.
};

// The arrays of one update, as AdamWArrays.
struct AdamW8Arrays {
  const void* gradient;
  ElementType gradient_type;
  void* weights;
  std::int16_t* residual;
  Moment8 exp_avg;
  Moment8 exp_avg_sq;
};

// Where the odds come from.
struct Noise {
  std::uint64_t key;          // Of the seed and the step.
  std::uint64_t first_block;  // Element 0 of the arrays is the first of this block.
};

// Returns the noise of one step; `first_element` is a multiple of kScaleNumel.
Noise MakeNoise(std::uint64_t seed, std::int64_t step, std::uint64_t first_element);

// Updates the elements [begin, end) of the arrays; `begin` is a multiple of kScaleNumel, and so is
// `end` unless it is that of the arrays. One kernel per instruction set.
using AdamW8Kernel = void (*)(const AdamWCoefficients&, const AdamW8Arrays&, const Noise&,
                              std::size_t begin, std::size_t end);
void AdamW8Scalar(const AdamWCoefficients& coefficients, const AdamW8Arrays& arrays,
                  const Noise& noise, std::size_t begin, std::size_t end) noexcept;
void AdamW8Avx2(const AdamWCoefficients& coefficients, const AdamW8Arrays& arrays,
                const Noise& noise, std::size_t begin, std::size_t end) noexcept;
void AdamW8Avx512(const AdamWCoefficients& coefficients, const AdamW8Arrays& arrays,
                  const Noise& noise, std::size_t begin, std::size_t end) noexcept;
void AdamW8Neon(const AdamWCoefficients& coefficients, const AdamW8Arrays& arrays,
                const Noise& noise, std::size_t begin, std::size_t end) noexcept;

enum class Moment { kFirst, kSecond };

// Writes the fp32 values of a moment's elements [begin, end); both as for an AdamW8Kernel.
void Decode8(Moment moment, const Moment8& from, float* values, std::size_t begin,
             std::size_t end) noexcept;

// Rounds fp32 values to the nearest code. A negative second moment is stored as zero.
void Encode8(Moment moment, const float* values, const Moment8& to, std::size_t begin,
             std::size_t end) noexcept;

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_MOMENTS8_H_
