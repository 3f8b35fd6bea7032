// How long OpenMP's threads spin between parallel regions. libgomp's default is about 15 ms, which
// makes every region that long where processes share cores (ops of 0.03 ms took 25 ms on a machine
// with three busy threads per core); not spinning at all costs a wake-up of some microseconds per
// op. A spin of about 50 us bridges the ops of a step and yields to everyone else.
// libgomp reads the setting when it is loaded, so it must be in the environment before.
#pragma once

namespace tandem::kernels::cpu {

/// In GOMP_SPINCOUNT's unit, a pause of about 50 ns.
inline constexpr const char* kOpenmpSpinCount = "1000";

/// Puts the limit into this process's environment, for the processes that it starts, unless
/// GOMP_SPINCOUNT or OMP_WAIT_POLICY is set already. True when it changed something. Call at the
/// start of main, before any thread exists.
bool limit_openmp_spin_of_children();

/// For programs that run ops themselves: limits, and starts this program anew if that changed
/// something. Returns where it cannot.
void limit_openmp_spin(char** argv);

}  // namespace tandem::kernels::cpu
