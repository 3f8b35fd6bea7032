// The engine in f64: every op of training as a plain loop over doubles, so that two layouts of one
// job differ by 1e-15 and not by what f32 rounds. Tensors of the compute dtype and all sums are
// kF64; a packed weight is row-major f64. Serving ops, dropout and profiles of other devices are
// absent. Host memory of the CPU backend.
#pragma once

#include "kernels/ops.h"

namespace tandem::test {

kernels::Backend make_exact_backend();

}  // namespace tandem::test
