#include "kernels/cpu/cpu_features.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tandem::kernels::cpu {
namespace {

constexpr Isa kAll[] = {Isa::kGeneric,    Isa::kAvx2,          Isa::kAvx512,
                        Isa::kAvx512Bf16, Isa::kAvx512Bf16Fma, Isa::kAmx};

#if defined(__x86_64__)
// Linux grants the 8 KiB of tile state per thread only to processes that ask (Documentation/arch/
// x86/xstate.rst): arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool request_amx() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

// GCC 12's __builtin_cpu_supports does not know AMX: leaf 7, EDX bits 22 (bf16) and 24 (tile).
bool has_amx_bf16() {
  std::uint32_t a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr std::uint32_t kNeeded = (1u << 22) | (1u << 24);
  return (d & kNeeded) == kNeeded;
}

Isa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  if (has_amx_bf16() && request_amx()) return Isa::kAmx;
  // By maker, not by a measurement at start: the bits of a bf16 sum depend on the choice, and a job
  // that resumes must make the same one.
  return __builtin_cpu_is("intel") ? Isa::kAvx512Bf16Fma : Isa::kAvx512Bf16;
}
#else
Isa detect() {
  return Isa::kGeneric;
}
#endif

Isa limited(Isa found) {
  const char* wanted = std::getenv("TANDEM_CPU_ISA");
  if (wanted == nullptr) return found;
  for (Isa level : kAll)
    if (std::string_view(wanted) == isa_name(level) && level < found) return level;
  return found;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return "generic";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512Bf16Fma:
      return "avx512_bf16_fma";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

Isa isa() {
  static const Isa found = limited(detect());
  return found;
}

}  // namespace tandem::kernels::cpu
