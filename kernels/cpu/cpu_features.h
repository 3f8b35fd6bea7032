// What the processor can do, found once per process. Kernels are compiled per instruction set in
// files of their own and chosen at run time, so that one binary runs on any x86-64 (and, with the
// generic kernels, on anything else).
#pragma once

#include <cstdint>

namespace tandem::kernels::cpu {

/// Each level includes the ones before it. kAvx2 means AVX2 and FMA; kAvx512 means F, BW, DQ and
/// VL; kAvx512Bf16Fma has kAvx512Bf16's instructions on a processor whose f32 multiply-adds outrun
/// its dot products of bf16 pairs (Intel's: two against half a one per cycle, measured); kAmx means
/// AMX tiles with bf16, which the operating system has granted to this process.
enum class Isa : std::uint8_t { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAvx512Bf16Fma, kAmx };

const char* isa_name(Isa isa);

/// The best level this processor and operating system offer, or the lower one that the environment
/// variable TANDEM_CPU_ISA names ("generic", "avx2", "avx512", "avx512_bf16",
/// "avx512_bf16_fma", "amx"; tests and bug hunts). Detected on the first call, which also asks the
/// kernel for the AMX state; thread-safe.
Isa isa();

}  // namespace tandem::kernels::cpu
