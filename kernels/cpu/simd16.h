// Private to kernels/cpu: sixteen f32 lanes on any instruction set, for files that are compiled
// once per instruction set. Every operation is rounded alike on AVX2 and AVX-512 (reductions fold
// halves: 16, 8, 4, 2, 1), so a kernel written with it gives the same bits on both. Everything is
// in an unnamed namespace and inlined: nothing of one instruction set may be linked into another's
// file.
#pragma once

#include "kernels/cpu/gemm_layout.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if !defined(__AVX512F__)
#include <cmath>
#endif

namespace tandem::kernels::cpu {
namespace {

#define TANDEM_V inline __attribute__((always_inline))

inline constexpr std::int64_t kLanes = 16;

#if defined(__AVX512F__)

using V = __m512;
TANDEM_V V vset(float x) {
  return _mm512_set1_ps(x);
}
TANDEM_V V vload(const float* p) {
  return _mm512_loadu_ps(p);
}
TANDEM_V void vstore(float* p, V x) {
  _mm512_storeu_ps(p, x);
}
TANDEM_V __mmask16 vlanes(std::int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1);
}
/// The first n lanes (0 <= n <= 16), the others 0.
TANDEM_V V vload_n(const float* p, std::int64_t n) {
  return _mm512_maskz_loadu_ps(vlanes(n), p);
}
TANDEM_V void vstore_n(float* p, std::int64_t n, V x) {
  _mm512_mask_storeu_ps(p, vlanes(n), x);
}
TANDEM_V V vfma(V a, V b, V c) {
  return _mm512_fmadd_ps(a, b, c);
}
TANDEM_V V vadd(V a, V b) {
  return _mm512_add_ps(a, b);
}
TANDEM_V V vsub(V a, V b) {
  return _mm512_sub_ps(a, b);
}
TANDEM_V V vmul(V a, V b) {
  return _mm512_mul_ps(a, b);
}
TANDEM_V V vdiv(V a, V b) {
  return _mm512_div_ps(a, b);
}
TANDEM_V V vmax(V a, V b) {
  return _mm512_max_ps(a, b);
}
TANDEM_V V vmin(V a, V b) {
  return _mm512_min_ps(a, b);
}
TANDEM_V V vround(V a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/// x * 2^n for whole n with a normal result.
TANDEM_V V vscale2(V x, V n) {
  return _mm512_scalef_ps(x, n);
}
/// a < b ? 0 : x, per lane.
TANDEM_V V vzero_below(V a, V b, V x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x);
}
/// Lane i < lo or >= hi becomes `other`.
TANDEM_V V vkeep(V x, std::int64_t lo, std::int64_t hi, V other) {
  return _mm512_mask_mov_ps(other, static_cast<__mmask16>(vlanes(hi) & ~vlanes(lo)), x);
}
TANDEM_V __m256 vfold_add(V x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
TANDEM_V __m256 vfold_max(V x) {
  return _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
TANDEM_V V vload_bf16(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

#elif defined(__AVX2__)

struct V {
  __m256 lo, hi;
};
TANDEM_V V vset(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
TANDEM_V V vload(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
TANDEM_V void vstore(float* p, V x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
TANDEM_V __m256i vlanes8(std::int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TANDEM_V V vload_n(const float* p, std::int64_t n) {
  return {_mm256_maskload_ps(p, vlanes8(n)), _mm256_maskload_ps(p + 8, vlanes8(n - 8))};
}
TANDEM_V void vstore_n(float* p, std::int64_t n, V x) {
  _mm256_maskstore_ps(p, vlanes8(n), x.lo);
  _mm256_maskstore_ps(p + 8, vlanes8(n - 8), x.hi);
}
TANDEM_V V vfma(V a, V b, V c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
TANDEM_V V vadd(V a, V b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
TANDEM_V V vsub(V a, V b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
TANDEM_V V vmul(V a, V b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
TANDEM_V V vdiv(V a, V b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
TANDEM_V V vmax(V a, V b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
TANDEM_V V vmin(V a, V b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
TANDEM_V __m256 vround8(__m256 a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TANDEM_V V vround(V a) {
  return {vround8(a.lo), vround8(a.hi)};
}
TANDEM_V __m256 vscale8(__m256 x, __m256 n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
}
TANDEM_V V vscale2(V x, V n) {
  return {vscale8(x.lo, n.lo), vscale8(x.hi, n.hi)};
}
TANDEM_V V vzero_below(V a, V b, V x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ), x.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ), x.hi)};
}
TANDEM_V V vkeep(V x, std::int64_t lo, std::int64_t hi, V other) {
  const __m256i l = _mm256_andnot_si256(vlanes8(lo), vlanes8(hi));
  const __m256i h = _mm256_andnot_si256(vlanes8(lo - 8), vlanes8(hi - 8));
  return {_mm256_blendv_ps(other.lo, x.lo, _mm256_castsi256_ps(l)),
          _mm256_blendv_ps(other.hi, x.hi, _mm256_castsi256_ps(h))};
}
TANDEM_V __m256 vfold_add(V x) {
  return _mm256_add_ps(x.lo, x.hi);
}
TANDEM_V __m256 vfold_max(V x) {
  return _mm256_max_ps(x.lo, x.hi);
}
TANDEM_V __m256 vwiden8(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
TANDEM_V V vload_bf16(const bf16* p) {
  return {vwiden8(p), vwiden8(p + 8)};
}

#else

struct V {
  float x[16];
};
template <class F>
TANDEM_V V vmap(F f) {
  V r;
  for (int i = 0; i < 16; ++i) r.x[i] = f(i);
  return r;
}
TANDEM_V V vset(float x) {
  return vmap([&](int) { return x; });
}
TANDEM_V V vload(const float* p) {
  return vmap([&](int i) { return p[i]; });
}
TANDEM_V void vstore(float* p, V x) {
  for (int i = 0; i < 16; ++i) p[i] = x.x[i];
}
TANDEM_V V vload_n(const float* p, std::int64_t n) {
  return vmap([&](int i) { return i < n ? p[i] : 0.0f; });
}
TANDEM_V void vstore_n(float* p, std::int64_t n, V x) {
  for (int i = 0; i < n; ++i) p[i] = x.x[i];
}
// Not fused where the processor cannot fuse: still one fixed rounding per step.
TANDEM_V V vfma(V a, V b, V c) {
  return vmap([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
}
TANDEM_V V vadd(V a, V b) {
  return vmap([&](int i) { return a.x[i] + b.x[i]; });
}
TANDEM_V V vsub(V a, V b) {
  return vmap([&](int i) { return a.x[i] - b.x[i]; });
}
TANDEM_V V vmul(V a, V b) {
  return vmap([&](int i) { return a.x[i] * b.x[i]; });
}
TANDEM_V V vdiv(V a, V b) {
  return vmap([&](int i) { return a.x[i] / b.x[i]; });
}
TANDEM_V V vmax(V a, V b) {
  return vmap([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
TANDEM_V V vmin(V a, V b) {
  return vmap([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
}
TANDEM_V V vround(V a) {
  return vmap([&](int i) { return std::nearbyint(a.x[i]); });
}
TANDEM_V V vscale2(V x, V n) {
  return vmap([&](int i) { return std::ldexp(x.x[i], static_cast<int>(n.x[i])); });
}
TANDEM_V V vzero_below(V a, V b, V x) {
  return vmap([&](int i) { return a.x[i] < b.x[i] ? 0.0f : x.x[i]; });
}
TANDEM_V V vkeep(V x, std::int64_t lo, std::int64_t hi, V other) {
  return vmap([&](int i) { return i >= lo && i < hi ? x.x[i] : other.x[i]; });
}
TANDEM_V V vload_bf16(const bf16* p) {
  return vmap([&](int i) {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(p[i].bits) << 16);
  });
}

#endif

#if defined(__AVX2__)
TANDEM_V float vsum(V x) {
  const __m256 a = vfold_add(x);
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  b = _mm_add_ss(b, _mm_shuffle_ps(b, b, 1));
  return _mm_cvtss_f32(b);
}
TANDEM_V float vlargest(V x) {
  const __m256 a = vfold_max(x);
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  b = _mm_max_ss(b, _mm_shuffle_ps(b, b, 1));
  return _mm_cvtss_f32(b);
}
#else
TANDEM_V float vsum(V x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.x[i] += x.x[i + half];
  return x.x[0];
}
TANDEM_V float vlargest(V x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.x[i] = x.x[i] > x.x[i + half] ? x.x[i] : x.x[i + half];
  return x.x[0];
}
#endif

/// e^x within 2 ulp for x in [-87, 88]; exactly 1 at 0; 0 below -87 (and at -inf). Cody-Waite
/// reduction by ln 2 in two parts, then the degree-6 polynomial of Cephes' expf (Moshier).
TANDEM_V V vexp(V x) {
  const V low = vset(-87.0f);
  const V c = vmax(vmin(x, vset(88.0f)), low);
  const V n = vround(vmul(c, vset(1.44269504088896341f)));
  V r = vfma(n, vset(-0.693359375f), c);
  r = vfma(n, vset(2.12194440e-4f), r);
  V p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vadd(vfma(vmul(r, r), p, r), vset(1.0f));
  return vzero_below(x, low, vscale2(p, n));
}

}  // namespace
}  // namespace tandem::kernels::cpu
