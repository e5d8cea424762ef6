// Runs every kernel of the instruction sets that are here on the same arrays, compares the bits,
// and prints one line per case with a checksum of them, so that two architectures can be compared
// by their output. No Python: it is built with a cross compiler and run under an emulator.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "adam/adamw.h"
#include "adam/dispatch.h"
#include "adam/moments8.h"
#include "adam/norm.h"

namespace offload::adam {
namespace {

constexpr std::size_t kNumel = 128 * 37 + 61;
constexpr std::size_t kGuard = 64;  // Bytes behind an array that nothing may write.
constexpr unsigned char kGuardByte = 0xA5;

using Bytes = std::vector<unsigned char>;

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint32_t Next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 32);
  }

 private:
  std::uint64_t state_;
};

// What the elements are: any bits, or numbers as in training.
enum class Kind { kAnyBits, kOrdinary };

Bytes RandomBytes(std::size_t nbytes, Random* random) {
  Bytes bytes(nbytes + kGuard, kGuardByte);
  for (std::size_t i = 0; i < nbytes; ++i) bytes[i] = static_cast<unsigned char>(random->Next());
  return bytes;
}

Bytes Floats(Kind kind, Random* random) {
  Bytes bytes = RandomBytes(kNumel * 4, random);
  if (kind == Kind::kAnyBits) return bytes;
  for (std::size_t i = 0; i < kNumel; ++i) {
    const float value = static_cast<float>(random->Next()) * 0x1p-34f;
    std::memcpy(&bytes[4 * i], &value, 4);
  }
  return bytes;
}

// All that an update reads and writes.
struct Arrays {
  Bytes gradient, weights, residual, exp_avg, exp_avg_sq, exp_avg_scales, exp_avg_sq_scales;

  std::vector<Bytes*> All() {
    return {&gradient,   &weights,        &residual,         &exp_avg,
            &exp_avg_sq, &exp_avg_scales, &exp_avg_sq_scales};
  }
};

Arrays MakeArrays(Kind kind, bool eight_bit, std::uint64_t seed) {
  Random random(seed);
  Arrays a;
  a.gradient = Floats(kind, &random);
  a.weights = Floats(kind, &random);
  a.residual = RandomBytes(kNumel * 2, &random);
  a.exp_avg = eight_bit ? RandomBytes(kNumel, &random) : Floats(kind, &random);
  a.exp_avg_sq = eight_bit ? RandomBytes(kNumel, &random) : Floats(kind, &random);
  a.exp_avg_scales = Bytes(NumScales(kNumel) * 2 + kGuard, kGuardByte);
  a.exp_avg_sq_scales = a.exp_avg_scales;
  for (std::size_t i = 0; i < NumScales(kNumel); ++i) {
    // Powers of two from 2^-90 to 2^126, and zero.
    const auto exponent = static_cast<std::uint16_t>(random.Next() % 218);
    const auto scale = static_cast<std::uint16_t>(exponent == 0 ? 0 : (exponent + 36) << 7);
    std::memcpy(&a.exp_avg_scales[2 * i], &scale, 2);
    std::memcpy(&a.exp_avg_sq_scales[2 * i], &scale, 2);
  }
  return a;
}

bool GuardsHold(Arrays* arrays) {
  for (const Bytes* bytes : arrays->All()) {
    for (std::size_t i = bytes->size() - kGuard; i < bytes->size(); ++i) {
      if ((*bytes)[i] != kGuardByte) return false;
    }
  }
  return true;
}

// FNV-1a.
std::uint64_t Checksum(std::uint64_t sum, const void* data, std::size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  for (std::size_t i = 0; i < nbytes; ++i) sum = (sum ^ bytes[i]) * 0x100000001B3u;
  return sum;
}

struct Case {
  ElementType type;
  bool split;
  bool eight_bit;
  Kind kind;
};

// The checksum of everything after an update by one instruction set; 0 if a guard was overwritten.
std::uint64_t Run(const Kernels& kernels, const Case& each) {
  Arrays a = MakeArrays(each.kind, each.eight_bit, 7);
  const AdamWCoefficients c = MakeCoefficients({1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 0.5});
  auto* residual = each.split ? reinterpret_cast<std::int16_t*>(a.residual.data()) : nullptr;
  if (each.eight_bit) {
    const AdamW8Arrays arrays{
        a.gradient.data(),
        each.type,
        a.weights.data(),
        residual,
        {a.exp_avg.data(), reinterpret_cast<std::uint16_t*>(a.exp_avg_scales.data())},
        {a.exp_avg_sq.data(), reinterpret_cast<std::uint16_t*>(a.exp_avg_sq_scales.data())}};
    kernels.adamw8(c, arrays, MakeNoise(3, 1, 0), 0, kNumel);
  } else {
    const AdamWArrays arrays{a.gradient.data(),
                             each.type,
                             a.weights.data(),
                             residual,
                             reinterpret_cast<float*>(a.exp_avg.data()),
                             reinterpret_cast<float*>(a.exp_avg_sq.data())};
    kernels.adamw(c, arrays, 0, kNumel);
  }
  if (!GuardsHold(&a)) return 0;
  std::uint64_t sum = 0xCBF29CE484222325u;
  for (const Bytes* bytes : a.All()) sum = Checksum(sum, bytes->data(), bytes->size());
  Arrays finite = MakeArrays(Kind::kOrdinary, false, 9);
  double lanes[kNormLanes] = {};
  kernels.norm(finite.gradient.data(), ElementType::kFloat32, 0, kNumel, lanes);
  return Checksum(sum, lanes, sizeof(lanes));
}

int CheckAll() {
  int wrong = 0;
  const char* types[] = {"float32", "bfloat16", "float16"};
  for (int type = 0; type < 3; ++type) {
    for (int bits = 0; bits < 8; ++bits) {
      const Case each{static_cast<ElementType>(type), (bits & 1) != 0, (bits & 2) != 0,
                      (bits & 4) != 0 ? Kind::kAnyBits : Kind::kOrdinary};
      const std::uint64_t want = Run(KernelsFor("scalar"), each);
      std::printf("%s%s%s%s %016llx\n", types[type], each.split ? " split" : " whole",
                  each.eight_bit ? " 8-bit" : " fp32", (bits & 4) != 0 ? " any" : " ordinary",
                  static_cast<unsigned long long>(want));
      for (const std::string& isa : SupportedIsas()) {
        const std::uint64_t got = Run(KernelsFor(isa), each);
        if (got == want && want != 0) continue;
        std::fprintf(stderr, "%s differs from scalar in the case above\n", isa.c_str());
        ++wrong;
      }
    }
  }
  std::string isas;
  for (const std::string& isa : SupportedIsas()) isas += " " + isa;
  std::fprintf(stderr, "compared:%s, %d differences\n", isas.c_str(), wrong);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace offload::adam

int main() { return offload::adam::CheckAll(); }
