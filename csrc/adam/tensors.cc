#include "adam/tensors.h"

#include <algorithm>

#include "adam/parallel.h"

namespace offload::adam {
namespace {

// Blocks of ForEachBlock are whole blocks of scales.
static_assert(kBlockNumel % kScaleNumel == 0);

// Updates the elements [begin, end) of a tensor; `begin` is a multiple of kScaleNumel.
void UpdatePart(const Kernels& kernels, const TensorUpdate& update, std::size_t begin,
                std::size_t end) {
  if (const auto* arrays = std::get_if<AdamWArrays>(&update.arrays)) {
    kernels.adamw(update.coefficients, *arrays, begin, end);
    return;
  }
  const Noisy8Arrays& noisy = *std::get_if<Noisy8Arrays>(&update.arrays);
  kernels.adamw8(update.coefficients, noisy.arrays, noisy.noise, begin, end);
}

}  // namespace

void UpdateTensors(Pool& pool, const Kernels& kernels, const std::vector<TensorUpdate>& updates,
                   int num_threads) {
  // Each tensor begins at a whole block of scales, so that any cut of the range is one that the
  // kernels take. The gaps hold nothing.
  std::vector<std::size_t> begins;
  begins.reserve(updates.size());
  std::size_t total = 0;
  for (const TensorUpdate& update : updates) {
    begins.push_back(total);
    total += NumScales(update.numel) * kScaleNumel;
  }
  ForEachBlock(pool, total, num_threads, [&](std::size_t, std::size_t begin, std::size_t end) {
    // The last tensor that begins at `begin` or before; empty ones ahead of it begin there as well.
    auto index = static_cast<std::size_t>(std::upper_bound(begins.begin(), begins.end(), begin) -
                                          begins.begin()) -
                 1;
    for (; index < updates.size() && begins[index] < end; ++index) {
      const std::size_t first = std::max(begin, begins[index]) - begins[index];
      const std::size_t last = std::min(end - begins[index], updates[index].numel);
      if (first < last) UpdatePart(kernels, updates[index], first, last);
    }
  });
}

}  // namespace offload::adam
