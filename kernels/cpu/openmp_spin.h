// How long OpenMP's threads spin between parallel regions. libgomp's default is about 15 ms, which
// makes every region that long where processes share cores (ops of 0.03 ms took 25 ms on a machine
// with three busy threads per core); not spinning at all costs a wake-up of some microseconds per
// op. A spin of about 50 us bridges the ops of a step and yields to everyone else.
// libgomp reads the setting when it is loaded: see start_with_environment.
#pragma once

#include "protocol/base/environment.h"

namespace tandem::kernels::cpu {

/// In GOMP_SPINCOUNT's unit, a pause of about 50 ns.
inline constexpr EnvironmentVariable kOpenmpSpin{"GOMP_SPINCOUNT", "1000"};

}  // namespace tandem::kernels::cpu
