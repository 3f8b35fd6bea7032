#include "kernels/cpu/row_kernels.h"

#include "kernels/cpu/cpu_features.h"

namespace tandem::kernels::cpu {

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kRowKernelsAvx512;
  if (isa() == Isa::kAvx2) return kRowKernelsAvx2;
#endif
  return kRowKernelsGeneric;
}

template <>
const RowKernelsOf<float>& row_kernels_of<float>() {
  return row_kernels().f32;
}
template <>
const RowKernelsOf<bf16>& row_kernels_of<bf16>() {
  return row_kernels().half;
}

RowStatistics row_statistics(const float* logits, std::int64_t n) {
  return row_kernels().statistics(logits, n);
}

}  // namespace tandem::kernels::cpu
