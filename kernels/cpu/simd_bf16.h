// Private to kernels/cpu's AVX-512 files: 16 lanes from and to f32 or bf16 memory, and transposes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tandem::kernels::cpu {
namespace {

#define TANDEM_LANES inline __attribute__((always_inline))

/// The first n of 16 lanes (n <= 0: none, n >= 16: all).
TANDEM_LANES __mmask16 lane_mask(std::int64_t n) {
  return n >= 16  ? static_cast<__mmask16>(0xffff)
         : n <= 0 ? static_cast<__mmask16>(0)
                  : static_cast<__mmask16>((1u << n) - 1);
}

TANDEM_LANES __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
/// Round to nearest, ties to even, NaN kept quiet: what to_bf16 does.
TANDEM_LANES __m256i narrow(__m512 x) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
}

/// Lanes of element `at` and the 15 after it, masked-off ones 0.
TANDEM_LANES __m512 load_lanes(const void* data, bool is_bf16, std::int64_t at, __mmask16 m) {
  return is_bf16 ? widen(_mm256_maskz_loadu_epi16(m, static_cast<const std::uint16_t*>(data) + at))
                 : _mm512_maskz_loadu_ps(m, static_cast<const float*>(data) + at);
}
TANDEM_LANES void store_lanes(void* data, bool is_bf16, std::int64_t at, __mmask16 m, __m512 x) {
  if (is_bf16)
    _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(data) + at, m, narrow(x));
  else
    _mm512_mask_storeu_ps(static_cast<float*>(data) + at, m, x);
}

/// Transposes 16 rows of 16 dwords in place.
TANDEM_LANES void transpose_16x16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4 i + j] holds column 4 l + j of rows 4 i .. 4 i + 3 in its 128-bit lane l.
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

/// Two rows of 32 words to the B operand's order: lo = pairs (a[i], b[i]) for i < 16, hi for i
/// >= 16.
TANDEM_LANES void zip_words(__m512i a, __m512i b, __m512i& lo, __m512i& hi) {
  const __m512i base =
      _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a,
                       0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                       0x00230003, 0x00220002, 0x00210001, 0x00200000);
  lo = _mm512_permutex2var_epi16(a, base, b);
  hi = _mm512_permutex2var_epi16(a, _mm512_add_epi16(base, _mm512_set1_epi16(16)), b);
}

}  // namespace
}  // namespace tandem::kernels::cpu
