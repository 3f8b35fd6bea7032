#include "kernels/cpu/gemm.h"

#include "kernels/cpu/gemm_layout.h"
#include "protocol/base/check.h"

#include <cmath>

namespace tandem::kernels::cpu {
namespace {

float get(const ConstRows& m, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i * m.ld + j;
  return m.dtype == DType::kF32 ? static_cast<const float*>(m.data)[at]
                                : to_f32(static_cast<const bf16*>(m.data)[at]);
}
float get(const Rows& m, std::int64_t i, std::int64_t j) {
  return get(ConstRows{m.data, m.ld, m.dtype}, i, j);
}
void set(const Rows& m, std::int64_t i, std::int64_t j, float x) {
  const std::int64_t at = i * m.ld + j;
  if (m.dtype == DType::kF32)
    static_cast<float*>(m.data)[at] = x;
  else
    static_cast<bf16*>(m.data)[at] = to_bf16(x);
}
float weight(const PackedMatrix& w, std::int64_t n, std::int64_t k) {
  const char* panel = static_cast<const char*>(w.data) + n / kPanel * panel_bytes(w.format, w.k);
  if (w.format == DType::kF32)
    return reinterpret_cast<const float*>(panel)[k * kPanel + n % kPanel];
  return to_f32(reinterpret_cast<const bf16*>(panel)[bf16_panel_index(n % kPanel, k)]);
}

float add_low_rank(float sum, const LinearOptions& options, bool forward, std::int64_t i,
                   std::int64_t j) {
  for (const LowRankTerm& term : options.low_rank) {
    if (j < term.begin || j >= term.begin + term.count) continue;
    for (std::int64_t r = 0; r < term.rank; ++r)
      sum =
          std::fma(get(term.u, i, r),
                   forward ? get(term.v, j - term.begin, r) : get(term.v, r, j - term.begin), sum);
  }
  return sum;
}

}  // namespace

std::int64_t linear_forward_scratch(DType, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                    std::int64_t, int) {
  return 0;
}
void linear_forward(const PackedMatrix& w, std::int64_t t, ConstRows x, Rows y,
                    const LinearOptions& options, std::span<std::byte>) {
#pragma omp parallel for schedule(static)
  for (std::int64_t n = 0; n < w.n; ++n)
    for (std::int64_t i = 0; i < t; ++i) {
      float sum = options.accumulate ? get(y, i, n) : 0.0f;
      if (options.bias != nullptr) sum += get({options.bias, 0, options.bias_dtype}, 0, n);
      for (std::int64_t k = 0; k < w.k; ++k) sum = std::fma(get(x, i, k), weight(w, n, k), sum);
      set(y, i, n, add_low_rank(sum, options, true, i, n));
    }
}

std::int64_t linear_input_grad_scratch(DType, std::int64_t, std::int64_t, std::int64_t,
                                       std::int64_t, std::int64_t, int) {
  return 0;
}
void linear_input_grad(const PackedMatrix& w, std::int64_t t, ConstRows dy, Rows dx,
                       const LinearOptions& options, std::span<std::byte>) {
#pragma omp parallel for schedule(static)
  for (std::int64_t k = 0; k < w.k; ++k)
    for (std::int64_t i = 0; i < t; ++i) {
      float sum = options.accumulate ? get(dx, i, k) : 0.0f;
      for (std::int64_t n = 0; n < w.n; ++n) sum = std::fma(get(dy, i, n), weight(w, n, k), sum);
      set(dx, i, k, add_low_rank(sum, options, false, i, k));
    }
}

std::int64_t small_product_scratch(DType, std::int64_t, std::int64_t, std::int64_t, int) {
  return 0;
}
void small_product(std::int64_t t, std::int64_t in, std::int64_t out, ConstRows x, ConstRows w,
                   SmallLayout layout, float scale, bool accumulate, Rows y, std::span<std::byte>) {
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < t; ++i)
    for (std::int64_t o = 0; o < out; ++o) {
      float sum = accumulate ? get(y, i, o) : 0.0f;
      for (std::int64_t k = 0; k < in; ++k)
        sum = std::fma(get(x, i, k) * (accumulate ? scale : 1.0f),
                       layout == SmallLayout::kOutByIn ? get(w, o, k) : get(w, k, o), sum);
      set(y, i, o, accumulate ? sum : sum * scale);
    }
}

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
