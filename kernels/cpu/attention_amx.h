// Private to kernels/cpu's AMX attention files: operands of tile products from rows of bf16.
#pragma once

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/simd_bf16.h"

#include <immintrin.h>

namespace tandem::kernels::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

/// 2^x within 2 ulp; 0 far below, inf above. Cephes' exp2f polynomial on [-1/2, 1/2].
TANDEM_LANES __m512 exp2_lanes(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887440266574e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357674640e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471162809e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791363012e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028550421e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

/// tanh(x) = 1 - 2 / (e^2x + 1).
TANDEM_LANES __m512 tanh_lanes(__m512 x) {
  const __m512 e = exp2_lanes(_mm512_mul_ps(x, _mm512_set1_ps(2.0f * kLog2E)));
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
}

/// 16 rows of 32 words at `from` (row stride in elements; rows past `count` are zero) as the B
/// operand whose columns are the rows: tile[word pair][row][2].
TANDEM_LANES void tile_of_columns(const std::uint16_t* from, std::int64_t stride,
                                  std::int64_t count, char* tile) {
  __m512i r[16];
  for (std::int64_t i = 0; i < 16; ++i)
    r[i] = i < count ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
  transpose_16x16(r);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, r[i]);
}

/// Two rows (b absent: zero) of 32 words as row `pair` of two neighbouring B tiles whose reduction
/// runs over the rows; the tiles are 1 KiB apart.
TANDEM_LANES void zip_into_tiles(const std::uint16_t* a, const std::uint16_t* b, std::int64_t pair,
                                 char* tiles) {
  __m512i lo, hi;
  zip_words(a != nullptr ? _mm512_loadu_si512(a) : _mm512_setzero_si512(),
            b != nullptr ? _mm512_loadu_si512(b) : _mm512_setzero_si512(), lo, hi);
  _mm512_store_si512(tiles + pair * 64, lo);
  _mm512_store_si512(tiles + 1024 + pair * 64, hi);
}

/// c [16 MT, 32] (row stride in bytes) = or += A B: A rows at a, the next 16 rows a_next further;
/// per step of 32 the A operand moves a_step, the B tiles (the second b_next further) b_step. All
/// in bytes.
template <int MT>
TANDEM_LANES void multiply_tiles(const char* a, std::int64_t a_stride, std::int64_t a_next,
                                 std::int64_t a_step, const char* b, std::int64_t b_next,
                                 std::int64_t b_step, std::int64_t steps, bool load, float* c,
                                 std::int64_t c_stride) {
  char* c2 = reinterpret_cast<char*>(c) + 16 * c_stride;
  if (load) {
    _tile_loadd(0, c, c_stride);
    _tile_loadd(1, c + 16, c_stride);
    if constexpr (MT > 1) _tile_loadd(2, c2, c_stride);
    if constexpr (MT > 1) _tile_loadd(3, c2 + 64, c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (MT > 1) _tile_zero(2);
    if constexpr (MT > 1) _tile_zero(3);
  }
  for (std::int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, a, a_stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + b_next, 64);
    if constexpr (MT > 1) _tile_loadd(5, a + a_next, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (MT > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (MT > 1) _tile_dpbf16ps(3, 5, 7);
    a += a_step;
    b += b_step;
  }
  _tile_stored(0, c, c_stride);
  _tile_stored(1, c + 16, c_stride);
  if constexpr (MT > 1) _tile_stored(2, c2, c_stride);
  if constexpr (MT > 1) _tile_stored(3, c2 + 64, c_stride);
}

}  // namespace
}  // namespace tandem::kernels::cpu
