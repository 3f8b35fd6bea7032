// Private to kernels/cpu: the bodies of row_kernels.h, included by one file per instruction set.
// Everything is in an unnamed namespace; nothing of std's inline functions is used, so that no code
// of one instruction set is linked into another's file.
#pragma once

#include "kernels/cpu/row_kernels.h"
#include "kernels/cpu/simd16.h"

#if !defined(__AVX2__)
#include <cmath>
#endif

namespace tandem::kernels::cpu {
namespace {

// -- lanes from and to f32 or bf16 memory ---------------------------------------------------------

#if defined(__AVX512F__)
TANDEM_V V vsqrt(V x) {
  return _mm512_sqrt_ps(x);
}
/// The nearest bf16, ties to even, NaN kept, still as f32: the bits of to_bf16.
TANDEM_V V vround_bf16(V x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u,
                           _mm512_set1_epi32(0x400000));
  return _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32(-65536)));
}
TANDEM_V void vstore_rounded(bf16* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16)));
}
#elif defined(__AVX2__)
TANDEM_V V vsqrt(V x) {
  return {_mm256_sqrt_ps(x.lo), _mm256_sqrt_ps(x.hi)};
}
TANDEM_V __m256 vround_bf16_8(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(r), _mm256_castsi256_ps(nan),
                                         _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_and_ps(chosen, _mm256_castsi256_ps(_mm256_set1_epi32(-65536)));
}
TANDEM_V V vround_bf16(V x) {
  return {vround_bf16_8(x.lo), vround_bf16_8(x.hi)};
}
TANDEM_V void vstore_rounded(bf16* p, V x) {
  const __m256i lo = _mm256_srli_epi32(_mm256_castps_si256(x.lo), 16);
  const __m256i hi = _mm256_srli_epi32(_mm256_castps_si256(x.hi), 16);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}
#else
TANDEM_V V vsqrt(V x) {
  return vmap([&](int i) { return std::sqrt(x.x[i]); });
}
TANDEM_V V vround_bf16(V x) {
  return vmap([&](int i) {
    std::uint32_t u = __builtin_bit_cast(std::uint32_t, x.x[i]);
    u = (u & 0x7fffffffu) > 0x7f800000u ? u | 0x400000u : u + 0x7fffu + ((u >> 16) & 1u);
    return __builtin_bit_cast(float, u & 0xffff0000u);
  });
}
TANDEM_V void vstore_rounded(bf16* p, V x) {
  for (int i = 0; i < 16; ++i)
    p[i].bits = static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, x.x[i]) >> 16);
}
#endif

/// What storing x as T and reading it back gives.
template <class T>
TANDEM_V V as_stored(V x);
template <>
TANDEM_V V as_stored<float>(V x) {
  return x;
}
template <>
TANDEM_V V as_stored<bf16>(V x) {
  return vround_bf16(x);
}

TANDEM_V V get(const float* p) {
  return vload(p);
}
TANDEM_V V get(const bf16* p) {
  return vload_bf16(p);
}
/// x must be as_stored.
TANDEM_V void put(float* p, V x) {
  vstore(p, x);
}
TANDEM_V void put(bf16* p, V x) {
  vstore_rounded(p, x);
}
/// The first n < 16 elements, zeros behind: the tail goes through the body's own code.
template <class T>
TANDEM_V V get_n(const T* p, std::int64_t n) {
  T padded[kLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return get(padded);
}
template <class T>
TANDEM_V void put_n(T* p, std::int64_t n, V x) {
  T padded[kLanes];
  put(padded, x);
  for (std::int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

/// f(j, count) with count = 16 for whole vectors, then once for what is left.
template <class F>
TANDEM_V void for_lanes(std::int64_t n, F f) {
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) f(j, kLanes);
  if (j < n) f(j, n - j);
}
template <class T>
TANDEM_V V load(const T* p, std::int64_t count) {
  return count == kLanes ? get(p) : get_n(p, count);
}
template <class T>
TANDEM_V void store(T* p, std::int64_t count, V x) {
  if (count == kLanes)
    put(p, x);
  else
    put_n(p, count, x);
}

// -- norms ----------------------------------------------------------------------------------------

TANDEM_V float root(float x) {
#if defined(__AVX2__)
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
  return std::sqrt(x);
#endif
}

template <class T>
float add_rms_norm(T* residual, const T* delta, const T* weight, float eps, T* y, std::int64_t c) {
  V sum = vset(0.0f);
  for_lanes(
      c, [&](std::int64_t j, std::int64_t n) __attribute__((always_inline)) {
        V x = load(residual + j, n);
        if (delta != nullptr) {
          x = as_stored<T>(vadd(x, load(delta + j, n)));
          store(residual + j, n, x);
        }
        sum = vfma(x, x, sum);
      });
  const float rstd = 1.0f / root(vsum(sum) / static_cast<float>(c) + eps);
  const V r = vset(rstd);
  for_lanes(
      c, [&](std::int64_t j, std::int64_t n) __attribute__((always_inline)) {
        const V x = vmul(load(residual + j, n), r);
        store(y + j, n, as_stored<T>(vmul(x, load(weight + j, n))));
      });
  return rstd;
}

// With n = r x, x the residual, r = rstd: dx = r (w dy - x r^2 mean(w dy x)).
template <class T>
void rms_norm_grad(const T* dy, const T* x, const T* weight, float rstd, T* dx, std::int64_t c) {
  V sum = vset(0.0f);
  for_lanes(
      c, [&](std::int64_t j, std::int64_t n) __attribute__((always_inline)) {
        const V wd = vmul(load(dy + j, n), load(weight + j, n));
        sum = vfma(wd, load(x + j, n), sum);
      });
  const V scale = vset(-(vsum(sum) * rstd * rstd / static_cast<float>(c))), r = vset(rstd);
  for_lanes(
      c, [&](std::int64_t j, std::int64_t n) __attribute__((always_inline)) {
        const V wd = vmul(load(dy + j, n), load(weight + j, n));
        const V g = vfma(load(x + j, n), scale, wd);
        store(dx + j, n, as_stored<T>(vfma(r, g, load(dx + j, n))));
      });
}

// -- the gated activation -------------------------------------------------------------------------

TANDEM_V V vsigmoid(V x) {
  const V one = vset(1.0f);
  return vdiv(one, vadd(one, vexp(vsub(vset(0.0f), x))));
}

template <class T>
void silu_mul(const T* gate, const T* up, T* out, std::int64_t f) {
  for_lanes(
      f, [&](std::int64_t j, std::int64_t n) __attribute__((always_inline)) {
        const V g = load(gate + j, n);
        store(out + j, n, as_stored<T>(vmul(vmul(g, vsigmoid(g)), load(up + j, n))));
      });
}

template <class T>
void silu_mul_grad(const T* dout, const T* gate, const T* up, T* dgate, T* dup, std::int64_t f) {
  for_lanes(
      f, [&](std::int64_t j, std::int64_t n) __attribute__((always_inline)) {
        const V g = load(gate + j, n), u = load(up + j, n), d = load(dout + j, n);
        const V s = vsigmoid(g), one = vset(1.0f);
        const V slope = vmul(s, vfma(g, vsub(one, s), one));
        store(dgate + j, n, as_stored<T>(vmul(vmul(d, u), slope)));
        store(dup + j, n, as_stored<T>(vmul(d, vmul(g, s))));
      });
}

// -- rope -----------------------------------------------------------------------------------------

template <class T>
void rotate(T* heads_at, std::int64_t heads, std::int64_t half, const float* cosines,
            const float* sines) {
  for (std::int64_t h = 0; h < heads; ++h) {
    T* x = heads_at + h * 2 * half;
    for_lanes(
        half, [&](std::int64_t j, std::int64_t n) __attribute__((always_inline)) {
          const V lo = load(x + j, n), hi = load(x + half + j, n);
          const V c = load(cosines + j, n), s = load(sines + j, n);
          const V minus_s = vsub(vset(0.0f), s);
          store(x + j, n, as_stored<T>(vfma(hi, minus_s, vmul(lo, c))));
          store(x + half + j, n, as_stored<T>(vfma(lo, s, vmul(hi, c))));
        });
  }
}

#if defined(__AVX2__)
/// sin and cos within 2 ulp of 1 for |x| < 2^18: reduction by pi/2 in three f32 parts, each step a
/// fused one, then the polynomials of Cephes' sinf and cosf (Moshier) on [-pi/4, pi/4].
TANDEM_V void vsincos(V x, V& sine, V& cosine) {
  const V n = vround(vmul(x, vset(0.63661977236758134f)));
  V r = vfma(n, vset(-1.57079637050628662e+00f), x);
  r = vfma(n, vset(4.37113900018624283e-08f), r);
  r = vfma(n, vset(-1.71512451445180945e-15f), r);
  const V z = vmul(r, r);
  V s = vfma(z, vset(-1.9515295891e-4f), vset(8.3321608736e-3f));
  s = vfma(s, z, vset(-1.6666654611e-1f));
  s = vfma(vmul(s, z), r, r);
  V c = vfma(z, vset(2.443315711809948e-5f), vset(-1.388731625493765e-3f));
  c = vfma(c, z, vset(4.166664568298827e-2f));
  c = vfma(vmul(c, z), z, vfma(z, vset(-0.5f), vset(1.0f)));
  // n = 4 q + 2 turn + odd, all by exact arithmetic on small whole numbers.
  const V half = vset(0.5f), quarter = vset(-0.25f), two = vset(2.0f), one = vset(1.0f);
  const V h = vround(vfma(n, half, quarter));
  const V odd = vfma(h, vset(-2.0f), n);
  const V turn = vfma(vround(vfma(h, half, quarter)), vset(-2.0f), h);
  const V even = vsub(one, odd), sign = vsub(one, vmul(two, turn));
  sine = vmul(sign, vfma(c, odd, vmul(s, even)));
  cosine = vmul(vmul(sign, vsub(one, vmul(two, odd))), vfma(s, odd, vmul(c, even)));
}
#endif

void angles(float position, const float* inv_freq, std::int64_t half, float factor, float sign,
            float* cosines, float* sines) {
#if defined(__AVX2__)
  for_lanes(
      half, [&](std::int64_t j, std::int64_t n) __attribute__((always_inline)) {
        V s, c;
        vsincos(vmul(vset(position), load(inv_freq + j, n)), s, c);
        store(cosines + j, n, vmul(c, vset(factor)));
        store(sines + j, n, vmul(s, vset(factor * sign)));
      });
#else  // without fused steps the reduction would lose digits
  for (std::int64_t j = 0; j < half; ++j) {
    cosines[j] = std::cos(position * inv_freq[j]) * factor;
    sines[j] = std::sin(position * inv_freq[j]) * (factor * sign);
  }
#endif
}

// -- logits ---------------------------------------------------------------------------------------

RowStatistics statistics(const float* logits, std::int64_t n) {
  RowStatistics r;
  r.top = -__builtin_inff();
  std::int64_t block = 0;
  for (std::int64_t begin = 0; begin < n; begin += kSumBlock) {
    const std::int64_t count = n - begin < kSumBlock ? n - begin : kSumBlock;
    V most = vset(logits[begin]);
    for_lanes(
        count, [&](std::int64_t j, std::int64_t m) __attribute__((always_inline)) {
          const V x = load(logits + begin + j, m);
          most = vmax(most, m == kLanes ? x : vkeep(x, 0, m, most));
        });
    const float top = vlargest(most);
    if (top > r.top) r.top = top, block = begin;
  }
  r.argmax = block;
  while (r.argmax + 1 < n && logits[r.argmax] != r.top) ++r.argmax;
  V sum = vset(0.0f);
  const V top = vset(r.top);
  for_lanes(
      n, [&](std::int64_t j, std::int64_t m) __attribute__((always_inline)) {
        const V e = vexp(vsub(load(logits + j, m), top));
        sum = vadd(sum, m == kLanes ? e : vkeep(e, 0, m, vset(0.0f)));
      });
  r.sum = vsum(sum);
  return r;
}

template <class T>
void softmax_gradient(float* logits, std::int64_t v, float top, float scale) {
  // Going up, element j of T never lies beyond logit j: nothing unread is overwritten.
  T* out = reinterpret_cast<T*>(logits);
  const V t = vset(top), s = vset(scale);
  for_lanes(
      v, [&](std::int64_t j, std::int64_t n) __attribute__((always_inline)) {
        store(out + j, n, as_stored<T>(vmul(s, vexp(vsub(load(logits + j, n), t)))));
      });
}

void weights(const float* logits, std::int64_t n, float top, float inverse_temperature,
             float* out) {
  const V t = vset(top), inverse = vset(inverse_temperature);
  for_lanes(
      n, [&](std::int64_t j, std::int64_t m) __attribute__((always_inline)) {
        store(out + j, m, vexp(vmul(vsub(load(logits + j, m), t), inverse)));
      });
}

float sum(const float* x, std::int64_t n) {
  V s = vset(0.0f);
  for_lanes(
      n, [&](std::int64_t j, std::int64_t m)
             __attribute__((always_inline)) { s = vadd(s, load(x + j, m)); });
  return vsum(s);
}

// -- optimizer ------------------------------------------------------------------------------------

void adamw(const AdamWStep& a, const float* grad, float* m, float* v, float* param,
           std::int64_t n) {
  const V clip = vset(a.clip), new1 = vset(1.0f - a.beta1), old2 = vset(a.beta2);
  const V new2 = vset(1.0f - a.beta2), eps = vset(a.eps), keep = vset(a.keep);
  const V step = vset(-a.step_size), root2 = vset(1.0f / a.root2);
  for_lanes(
      n, [&](std::int64_t j, std::int64_t count) __attribute__((always_inline)) {
        const V g = vmul(load(grad + j, count), clip), m_old = load(m + j, count);
        const V m_new = vfma(new1, vsub(g, m_old), m_old);
        const V v_new = vfma(new2, vmul(g, g), vmul(old2, load(v + j, count)));
        const V update = vdiv(m_new, vfma(vsqrt(v_new), root2, eps));
        store(m + j, count, m_new);
        store(v + j, count, v_new);
        store(param + j, count, vfma(step, update, vmul(load(param + j, count), keep)));
      });
}

void round_bf16(const float* x, bf16* out, std::int64_t n) {
  for_lanes(
      n, [&](std::int64_t j, std::int64_t count) __attribute__((always_inline)) {
        store(out + j, count, vround_bf16(load(x + j, count)));
      });
}

template <class T>
constexpr RowKernelsOf<T> kKernelsOf = {add_rms_norm<T>,  rms_norm_grad<T>, silu_mul<T>,
                                        silu_mul_grad<T>, rotate<T>,        softmax_gradient<T>};

constexpr RowKernels kKernels = {
    kKernelsOf<float>, kKernelsOf<bf16>, angles, statistics, weights, sum, adamw, round_bf16};

}  // namespace
}  // namespace tandem::kernels::cpu
