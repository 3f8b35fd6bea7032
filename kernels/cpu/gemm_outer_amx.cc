// bf16 weight gradients on AMX tiles. Called only where isa() is kAmx.
//
// The long operand y is only zipped by pairs of rows into B tiles (two permutes per 64 elements);
// the short operand x, which must be transposed into A tiles, is small and packed once.
#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/simd_bf16.h"

#include <immintrin.h>
#include <omp.h>

namespace tandem::kernels::cpu {
namespace {

// Rows [row, row + 32) of x, columns [column, column + 16), as the A tile [16 columns, 32 rows].
void pack_few_tile(const Outer& o, std::int64_t row, std::int64_t column, char* tile) {
  const auto* x = static_cast<const std::uint16_t*>(o.x);
  const std::int64_t columns = min_of(16, o.few - column);
  const auto m = static_cast<__mmask32>(lane_mask(columns));
  __m512i r[16];  // dword c of r[i] is the pair (row 2 i, row 2 i + 1) of column c
  for (int i = 0; i < 16; ++i) {
    const std::int64_t at = row + 2 * i;
    const __m512i a =
        at < o.t ? _mm512_maskz_loadu_epi16(m, x + at * o.ldx + column) : _mm512_setzero_si512();
    const __m512i b = at + 1 < o.t ? _mm512_maskz_loadu_epi16(m, x + (at + 1) * o.ldx + column)
                                   : _mm512_setzero_si512();
    __m512i hi;
    zip_words(a, b, r[i], hi);
  }
  transpose_16x16(r);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, r[i]);
}

// Rows [row, end) of y, 32 columns from `column`: per 32 rows two B tiles. The lines to the right,
// next in turn, are fetched meanwhile: to the hardware this walk down a column looks like no stream
// at all.
void zip_rows(const Outer& o, std::int64_t row, std::int64_t end, std::int64_t column, char* to) {
  const auto* y = static_cast<const std::uint16_t*>(o.y) + column;
  const std::int64_t valid = min_of(32, o.many - column);
  const __mmask32 m = valid >= 32 ? ~__mmask32{0} : ((__mmask32{1} << valid) - 1);
  for (std::int64_t i = row; i < row + round_up(end - row, 32); i += 2) {
    const __m512i a = i < end ? _mm512_maskz_loadu_epi16(m, y + i * o.ldy) : _mm512_setzero_si512();
    const __m512i b =
        i + 1 < end ? _mm512_maskz_loadu_epi16(m, y + (i + 1) * o.ldy) : _mm512_setzero_si512();
    _mm_prefetch(reinterpret_cast<const char*>(y + i * o.ldy + 32), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(y + (i + 1) * o.ldy + 32), _MM_HINT_T1);
    __m512i lo, hi;
    zip_words(a, b, lo, hi);
    char* at = to + (i - row) / 32 * 2048 + (i - row) % 32 * 32;
    _mm512_store_si512(at, lo);
    _mm512_store_si512(at + 1024, hi);
  }
}

// sums[16 or 32, 32] (+)= A tiles (per 32 rows two, `few_step` apart) times the zipped rows.
template <bool kSecond>
void add_tiles(const char* a, std::int64_t few_step, const char* b, std::int64_t steps, bool load,
               float* sums, std::int64_t stride) {
  if (load) {
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + 16, stride);
    if constexpr (kSecond) _tile_loadd(2, sums + 4 * stride, stride);
    if constexpr (kSecond) _tile_loadd(3, sums + 4 * stride + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kSecond) _tile_zero(2);
    if constexpr (kSecond) _tile_zero(3);
  }
  for (std::int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 1024, 64);
    if constexpr (kSecond) _tile_loadd(5, a + 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSecond) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kSecond) _tile_dpbf16ps(3, 5, 7);
    a += few_step;
    b += 2048;
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + 16, stride);
  if constexpr (kSecond) _tile_stored(2, sums + 4 * stride, stride);
  if constexpr (kSecond) _tile_stored(3, sums + 4 * stride + 16, stride);
}

void add_to_output(const Outer& o, std::int64_t column, std::int64_t stride) {
  const std::int64_t columns = min_of(kOuterColumns, o.many - column);
  for (std::int64_t i = 0; i < o.few; ++i) {
    const float* sums = o.sums + i * stride + column;
    if (o.transposed) {
      for (std::int64_t j = 0; j < columns; ++j) {
        float* c = o.c + (column + j) * o.ldc + i;
        *c = __builtin_fmaf(o.alpha, sums[j], *c);
      }
      continue;
    }
    float* c = o.c + i * o.ldc + column;
    for (std::int64_t j = 0; j < columns; ++j) c[j] = __builtin_fmaf(o.alpha, sums[j], c[j]);
  }
}

}  // namespace

void outer_bf16_amx(const Outer& o) {
  const std::int64_t few_tiles = round_up(o.few, 32) / 16, few_step = few_tiles * 1024;
  const std::int64_t steps = ceil_div(o.t, 32), groups = ceil_div(o.many, kOuterColumns);
  const std::int64_t stride = groups * kOuterColumns;
#pragma omp parallel
  {
    load_tile_config(16, 16);
    char* zipped = o.per_thread + omp_get_thread_num() * kOuterBytesPerThread;
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < steps; ++i)
      for (std::int64_t j = 0; j < few_tiles; ++j)
        pack_few_tile(o, i * 32, j * 16, o.few_packed + i * few_step + j * 1024);
    const std::int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    const std::int64_t begin = groups * id / threads, end = groups * (id + 1) / threads;
    for (std::int64_t row = 0; row < o.t; row += kOuterRows) {
      const std::int64_t rows_end = min_of(o.t, row + kOuterRows);
      for (std::int64_t group = begin; group < end; ++group) {
        zip_rows(o, row, rows_end, group * kOuterColumns, zipped);
        for (std::int64_t j = 0; j < few_tiles; j += 2) {
          const char* x = o.few_packed + row / 32 * few_step + j * 1024;
          float* sums = o.sums + j * 16 * stride + group * kOuterColumns;
          const std::int64_t some = ceil_div(rows_end - row, 32);
          o.few > j * 16 + 16
              ? add_tiles<true>(x, few_step, zipped, some, row > 0, sums, stride * 4)
              : add_tiles<false>(x, few_step, zipped, some, row > 0, sums, stride * 4);
        }
      }
    }
    for (std::int64_t group = begin; group < end; ++group)
      add_to_output(o, group * kOuterColumns, stride);
    _tile_release();
  }
}

}  // namespace tandem::kernels::cpu
