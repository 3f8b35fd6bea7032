// Private to kernels/cpu's AVX-512 files: finished f32 sums to the output of a Product.
#pragma once

#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/simd_bf16.h"

namespace tandem::kernels::cpu {
namespace {

/// Finished sums on their way to the output: rows [row, row + rows), one panel's columns.
struct Finished {
  const float* sums = nullptr;  ///< row stride 32
  std::int64_t row = 0, rows = 0, column = 0;
};

/// Writes the first `count` rows of `f` and takes them off it.
inline void write_rows(const Product& p, Finished& f, std::int64_t count) {
  const std::int64_t columns = min_of(kPanel, p.columns - f.column);
  const __mmask16 m0 = lane_mask(columns), m1 = lane_mask(columns - 16);
  const __m512 scale = _mm512_set1_ps(p.scale);
  __m512 bias0 = _mm512_setzero_ps(), bias1 = bias0;
  if (p.bias != nullptr) {
    bias0 = load_lanes(p.bias, p.bias_bf16, f.column, m0);
    bias1 = load_lanes(p.bias, p.bias_bf16, f.column + 16, m1);
  }
  count = min_of(count, f.rows);
  for (std::int64_t i = 0; i < count; ++i) {
    __m512 s0 = _mm512_fmadd_ps(_mm512_load_ps(f.sums + i * kPanel), scale, bias0);
    __m512 s1 = _mm512_fmadd_ps(_mm512_load_ps(f.sums + i * kPanel + 16), scale, bias1);
    const std::int64_t at = (f.row + i) * p.ldy + f.column;
    if (p.accumulate) {
      s0 = _mm512_add_ps(s0, load_lanes(p.y, p.y_bf16, at, m0));
      s1 = _mm512_add_ps(s1, load_lanes(p.y, p.y_bf16, at + 16, m1));
    }
    if (p.y_bf16 && columns == kPanel) {
      const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(s1, s0));
      auto* to = reinterpret_cast<__m512i*>(static_cast<std::uint16_t*>(p.y) + at);
      p.stream_y ? _mm512_stream_si512(to, both) : _mm512_storeu_si512(to, both);
    } else {
      store_lanes(p.y, p.y_bf16, at, m0, s0);
      store_lanes(p.y, p.y_bf16, at + 16, m1, s1);
    }
  }
  f.sums += count * kPanel;
  f.row += count;
  f.rows -= count;
}

}  // namespace
}  // namespace tandem::kernels::cpu
