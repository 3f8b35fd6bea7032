#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_layout.h"

#include <cmath>

namespace tandem::kernels::cpu {
namespace {
float get(const ConstRows& m, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i * m.ld + j;
  return m.dtype == DType::kF32 ? static_cast<const float*>(m.data)[at]
                                : to_f32(static_cast<const bf16*>(m.data)[at]);
}
}  // namespace

std::int64_t outer_accumulate_scratch(DType, std::int64_t, std::int64_t, std::int64_t, int) {
  return 0;
}
void outer_accumulate(std::int64_t t, std::int64_t m, std::int64_t n, ConstRows a, ConstRows b,
                      float alpha, float* c, std::int64_t ldc, std::span<std::byte>) {
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (std::int64_t k = 0; k < t; ++k) sum = std::fma(get(a, k, i), get(b, k, j), sum);
      c[i * ldc + j] = std::fma(alpha, sum, c[i * ldc + j]);
    }
}

}  // namespace tandem::kernels::cpu
