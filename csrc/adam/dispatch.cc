#include "adam/dispatch.h"

#include <algorithm>
#include <stdexcept>

namespace offload::adam {

std::vector<std::string> SupportedIsas() {
  std::vector<std::string> isas;
#if defined(__x86_64__)
  // The builtin also asks whether the operating system saves the wide registers.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back("avx2");
#endif
  isas.push_back("scalar");
  return isas;
}

Kernels KernelsFor(std::string_view isa) {
  const std::vector<std::string> supported = SupportedIsas();
  if (std::find(supported.begin(), supported.end(), isa) == supported.end()) {
    std::string message = "instruction set '" + std::string(isa) + "' is not supported here, only:";
    for (const std::string& name : supported) message += " '" + name + "'";
    throw std::invalid_argument(message);
  }
#if defined(__x86_64__)
  if (isa == "avx2") return {AdamWAvx2, NormAvx2};
#endif
  return {AdamWScalar, NormScalar};
}

std::string ChooseIsa(const char* wanted) {
  const std::string isa = wanted == nullptr ? "" : wanted;
  if (isa.empty() || isa == "auto") return SupportedIsas().front();
  try {
    KernelsFor(isa);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("OFFLOAD_ADAM_ISA: ") + error.what());
  }
  return isa;
}

}  // namespace offload::adam
