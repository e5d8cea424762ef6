// One AdamW step of many tensors: their elements are shared out as those of one range.
#ifndef OFFLOAD_ADAM_TENSORS_H_
#define OFFLOAD_ADAM_TENSORS_H_

#include <cstddef>
#include <variant>
#include <vector>

#include "adam/adamw.h"
#include "adam/dispatch.h"
#include "adam/moments8.h"
#include "adam/pool.h"

namespace offload::adam {

// The arrays of a tensor with 8-bit moments, and where its odds come from.
struct Noisy8Arrays {
  AdamW8Arrays arrays;
  Noise noise;
};

// What one tensor's update takes. Arrays are as for the kernels: owned by the caller until the call
// returns, and disjoint from those of the other tensors.
struct TensorUpdate {
  std::size_t numel;
  AdamWCoefficients coefficients;
  std::variant<AdamWArrays, Noisy8Arrays> arrays;
};

// Updates every tensor. The bits are those of a call for each, whatever the number of threads.
//
// Throws as ForEachBlock does.
void UpdateTensors(Pool& pool, const Kernels& kernels, const std::vector<TensorUpdate>& updates,
                   int num_threads);

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_TENSORS_H_
