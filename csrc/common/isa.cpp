#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace metafast {
namespace {

constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512};  // worst first

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool machine_supports(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool can_run(Isa isa) { return isa_built(isa) && machine_supports(isa); }

Isa choose() {
  const char* variable = std::getenv("METAFAST_CPU_ISA");
  if (variable == nullptr) return detected_isa();
  std::string available;
  for (Isa isa : kIsas) {
    if (!can_run(isa)) continue;
    if (isa_name(isa) == std::string(variable)) return isa;
    available += (available.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::runtime_error("METAFAST_CPU_ISA: expected one that this build and this machine have (" +
                           available + "), got '" + variable + "'");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "unknown";
}

bool isa_built(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
#ifdef METAFAST_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case Isa::avx512:
#ifdef METAFAST_HAVE_AVX512
      return true;
#else
      return false;
#endif
  }
  return false;
}

Isa detected_isa() {
  Isa best = Isa::baseline;
  for (Isa isa : kIsas) {
    if (can_run(isa)) best = isa;
  }
  return best;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace metafast
