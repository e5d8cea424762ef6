// A flat range cut into fixed blocks, shared by the threads of a pool.
#ifndef OFFLOAD_ADAM_PARALLEL_H_
#define OFFLOAD_ADAM_PARALLEL_H_

#include <cstddef>
#include <functional>

#include "adam/pool.h"

namespace offload::adam {

// 64 Ki elements: about 50 us of work at memory speed, well above the cost of taking a block, and
// above that of waking a thread.
inline constexpr std::size_t kBlockNumel = std::size_t{1} << 16;

constexpr std::size_t NumBlocks(std::size_t numel) {
  return (numel + kBlockNumel - 1) / kBlockNumel;
}

// Calls body(block, begin, end) once for every block of [0, numel), on the calling thread and up to
// num_threads - 1 of the pool's, in any order; returns when all are done. Each thread begins with a
// run of neighbouring blocks of its own (streams far apart serve memory better than one that is
// taken in turns: 5 to 10 % with two threads) and then takes what is left of the others' runs. A
// range of one block runs inline. The floating-point environment is the default one meanwhile
// (round to nearest, no flushing of denormals), whatever the calling thread had set. `body` must
// not throw.
//
// Throws std::system_error if a thread cannot be started; no block has then been touched.
void ForEachBlock(
    Pool& pool, std::size_t numel, int num_threads,
    const std::function<void(std::size_t block, std::size_t begin, std::size_t end)>& body);

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_PARALLEL_H_
