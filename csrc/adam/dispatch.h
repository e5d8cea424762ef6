// Which instruction set runs: the best one this processor has, unless a caller asks for another.
#ifndef OFFLOAD_ADAM_DISPATCH_H_
#define OFFLOAD_ADAM_DISPATCH_H_

#include <string>
#include <string_view>
#include <vector>

#include "adam/adamw.h"
#include "adam/moments8.h"
#include "adam/norm.h"

namespace offload::adam {

struct Kernels {
  AdamWKernel adamw;
  AdamW8Kernel adamw8;
  NormKernel norm;
};

// Names of the instruction sets this build and this processor support, best first; the last is
// always "scalar".
std::vector<std::string> SupportedIsas();

// Returns the kernels of one instruction set. Throws std::invalid_argument, naming the supported
// ones, for any other name.
Kernels KernelsFor(std::string_view isa);

// Returns the instruction set that the value of OFFLOAD_ADAM_ISA chooses: the best one for null,
// "" and "auto", else the named one. Throws as KernelsFor does.
std::string ChooseIsa(const char* wanted);

}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_DISPATCH_H_
