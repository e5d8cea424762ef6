#include "adam/dispatch.h"

#include <algorithm>
#include <stdexcept>

namespace offload::adam {

std::vector<std::string> SupportedIsas() {
  std::vector<std::string> isas;
#if defined(__x86_64__)
  // The builtin also asks whether the operating system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    isas.push_back("avx512");
  }
  if (avx2) isas.push_back("avx2");
#elif defined(__aarch64__)
  isas.push_back("neon");
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
  if (isa == "avx512") return {AdamWAvx512, AdamW8Avx512, NormAvx512};
  if (isa == "avx2") return {AdamWAvx2, AdamW8Avx2, NormAvx2};
#elif defined(__aarch64__)
  if (isa == "neon") return {AdamWNeon, AdamW8Neon, NormNeon};
#endif
  return {AdamWScalar, AdamW8Scalar, NormScalar};
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
