#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace mf {
namespace {

constexpr const char* kNames[MF_ISA_COUNT] = {"baseline", "avx2", "avx512", "neon"};

const Kernels* table(int isa) {
  switch (isa) {
#if defined(MF_HAVE_BASELINE)
    case MF_ISA_BASELINE:
      return baseline::kernels();
#endif
#if defined(MF_HAVE_AVX2)
    case MF_ISA_AVX2:
      return avx2::kernels();
#endif
#if defined(MF_HAVE_AVX512)
    case MF_ISA_AVX512:
      return avx512::kernels();
#endif
#if defined(MF_HAVE_NEON)
    case MF_ISA_NEON:
      return neon::kernels();
#endif
    default:
      return nullptr;
  }
}

#if defined(__x86_64__) || defined(__i386__)
// __builtin_cpu_supports asks CPUID and, through XGETBV, whether the operating system saves the
// registers.
bool cpu_has(int isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == MF_ISA_AVX2) return avx2;
  if (isa == MF_ISA_AVX512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == MF_ISA_BASELINE;
}
#else
bool cpu_has(int isa) {
  return isa == MF_ISA_BASELINE || isa == MF_ISA_NEON;
}  // NEON is part of AArch64
#endif

std::string usable_names() {
  std::string names;
  for (int isa = 0; isa < MF_ISA_COUNT; ++isa)
    if (isa_supported(isa)) names += (names.empty() ? "" : ", ") + std::string(kNames[isa]);
  return names;
}

}  // namespace

const char* isa_name(int isa) { return isa >= 0 && isa < MF_ISA_COUNT ? kNames[isa] : nullptr; }
bool isa_compiled(int isa) { return table(isa) != nullptr; }
bool isa_supported(int isa) { return isa_compiled(isa) && cpu_has(isa); }

int choose_isa(int wanted) {
  if (wanted < 0) {
    const char* text = std::getenv("MAGIC_FAST_CPU_ISA");
    if (text && *text && std::strcmp(text, "auto") != 0) {
      for (int isa = 0; isa < MF_ISA_COUNT; ++isa)
        if (std::strcmp(text, kNames[isa]) == 0) wanted = isa;
      if (wanted < 0)
        throw Failure(MF_UNSUPPORTED, "MAGIC_FAST_CPU_ISA: expected one of " + usable_names() +
                                          ", got '" + std::string(text) + "'.");
    }
  }
  if (wanted < 0) {
    static const int best = [] {
      for (const int isa : {MF_ISA_AVX512, MF_ISA_AVX2, MF_ISA_NEON, MF_ISA_BASELINE})
        if (isa_supported(isa)) return (int)isa;
      throw Failure(MF_INTERNAL, "no instruction set was compiled in.");
    }();
    return best;
  }
  if (!isa_supported(wanted))
    throw Failure(MF_UNSUPPORTED,
                  "instruction set '" + std::string(isa_name(wanted) ? isa_name(wanted) : "?") +
                      "': expected one of " + usable_names() +
                      ", which this CPU and build can run. Unset MAGIC_FAST_CPU_ISA.");
  return wanted;
}

const Kernels& kernels_of(int isa) { return *table(isa); }

}  // namespace mf
