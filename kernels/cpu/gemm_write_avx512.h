// Private to kernels/cpu's AVX-512 files: finished f32 sums to the output of a Product.
#pragma once

#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/simd_bf16.h"

namespace tandem::kernels::cpu {
namespace {

// Writes rows x columns of finished sums c (row stride 32) to y.
inline void write_block(const Product& p, const float* c, std::int64_t row, std::int64_t rows,
                        std::int64_t column) {
  const std::int64_t columns = min_of(kPanel, p.columns - column);
  const __mmask16 m0 = lane_mask(columns), m1 = lane_mask(columns - 16);
  const __m512 scale = _mm512_set1_ps(p.scale);
  __m512 bias0 = _mm512_setzero_ps(), bias1 = bias0;
  if (p.bias != nullptr) {
    bias0 = load_lanes(p.bias, p.bias_bf16, column, m0);
    bias1 = load_lanes(p.bias, p.bias_bf16, column + 16, m1);
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    __m512 s0 = _mm512_fmadd_ps(_mm512_load_ps(c + i * kPanel), scale, bias0);
    __m512 s1 = _mm512_fmadd_ps(_mm512_load_ps(c + i * kPanel + 16), scale, bias1);
    const std::int64_t at = (row + i) * p.ldy + column;
    if (p.accumulate) {
      s0 = _mm512_add_ps(s0, load_lanes(p.y, p.y_bf16, at, m0));
      s1 = _mm512_add_ps(s1, load_lanes(p.y, p.y_bf16, at + 16, m1));
    }
    store_lanes(p.y, p.y_bf16, at, m0, s0);
    store_lanes(p.y, p.y_bf16, at + 16, m1, s1);
  }
}

}  // namespace
}  // namespace tandem::kernels::cpu
