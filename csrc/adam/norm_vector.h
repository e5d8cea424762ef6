// The squared norm over a `Vector` of any width (vector_avx2.h and its like).
//
// Templates over an unnamed namespace's type, so each translation unit has its own.
#ifndef OFFLOAD_ADAM_NORM_VECTOR_H_
#define OFFLOAD_ADAM_NORM_VECTOR_H_

#include "adam/norm.h"

namespace offload::adam {
namespace {

// Returns the index of the first element it left: fewer than kNormLanes remain.
template <typename V, typename Element>
std::size_t AddSquares(const Element* elements, std::size_t begin, std::size_t end, double* lanes) {
  constexpr std::size_t kWide = V::kLanes / 2;  // Doubles in a vector.
  constexpr std::size_t kNumSums = kNormLanes / kWide;
  typename V::Doubles sums[kNumSums];
  for (std::size_t k = 0; k < kNumSums; ++k) sums[k] = V::LoadDoubles(lanes + k * kWide);
  std::size_t i = begin;
  for (; i + kNormLanes <= end; i += kNormLanes) {
    for (std::size_t k = 0; k < kNumSums; k += 2) {
      V::AddSquares(V::Widen(elements + i + k * kWide), &sums[k], &sums[k + 1]);
    }
  }
  for (std::size_t k = 0; k < kNumSums; ++k) V::StoreDoubles(lanes + k * kWide, sums[k]);
  return i;
}

template <typename V>
void NormVector(const void* gradient, ElementType type, std::size_t begin, std::size_t end,
                double* lanes) {
  std::size_t rest = begin;
  switch (type) {
    case ElementType::kFloat32:
      rest = AddSquares<V>(static_cast<const float*>(gradient), begin, end, lanes);
      break;
    case ElementType::kBFloat16:
      rest = AddSquares<V>(static_cast<const BFloat16*>(gradient), begin, end, lanes);
      break;
    case ElementType::kFloat16:
      rest = AddSquares<V>(static_cast<const Float16*>(gradient), begin, end, lanes);
      break;
  }
  // `rest` is a whole number of lanes from `begin`, so the tail falls into the same lanes.
  NormScalar(gradient, type, rest, end, lanes);
}

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_NORM_VECTOR_H_
