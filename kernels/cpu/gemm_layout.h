// Private to kernels/cpu: the packed layouts and block sizes.
//
// A weight W [n, k] is cut into panels of 32 rows (n padded with zeros).
//   f32:  panel[j][i], j < k, i < 32: the 32 weights that meet one x[j] lie together.
//   bf16: k is padded to 32 with zeros; per 32 k two AMX tiles of 1 KiB, for rows 0-15 and 16-31 of
//     the panel: tile[j / 2][i][j % 2]. That is the B operand of TDPBF16PS and of VDPBF16PS, and
//     the two tiles of one k step follow each other, so a panel is one sequential stream.
// The same layout with the roles exchanged (panels of 32 k, reduction over n) serves the input
// gradient; it is made in scratch.
//
// Files compiled for one instruction set include this header, so its functions must never be
// emitted out of line: the linker would keep one copy, perhaps the one with AVX-512 in it.
#pragma once

#include "protocol/base/dtype.h"

#include <cstdint>

#define TANDEM_ALWAYS_INLINE inline __attribute__((always_inline))

// Before a loop. Not under sanitizers, which check each access of an unrolled loop on its own: one
// file took seven minutes to compile.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TANDEM_UNROLL(n)
#else
#define TANDEM_PRAGMA(text) _Pragma(#text)
#define TANDEM_UNROLL(n) TANDEM_PRAGMA(GCC unroll n)
#endif

namespace tandem::kernels::cpu {

inline constexpr std::int64_t kPanel = 32;          ///< output columns per panel
inline constexpr std::int64_t kTileK = 32;          ///< reduction elements per bf16 tile
inline constexpr std::int64_t kTileRows = 16;       ///< rows of an AMX tile; columns of its product
inline constexpr std::int64_t kTileElements = 512;  ///< bf16 elements of one 1 KiB tile
inline constexpr std::int64_t kCacheLine = 64;

/// Rows of x that one task keeps in L2, and reduction elements walked before the sums are parked.
inline constexpr std::int64_t kRowBlock = 256;
inline constexpr std::int64_t kReductionBlock = 640;
/// Columns of one task where the reduction is longer than kReductionBlock: parked sums stay in L2.
inline constexpr std::int64_t kParkedColumns = 256;

/// Work (bytes of weights walked, or about as many multiply-adds) below which waking the other
/// threads costs more than it brings.
inline constexpr std::int64_t kParallelMin = 1 << 16;

TANDEM_ALWAYS_INLINE constexpr std::int64_t min_of(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
TANDEM_ALWAYS_INLINE constexpr std::int64_t max_of(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}
TANDEM_ALWAYS_INLINE constexpr std::int64_t ceil_div(std::int64_t x, std::int64_t by) {
  return (x + by - 1) / by;
}
TANDEM_ALWAYS_INLINE constexpr std::int64_t round_up(std::int64_t x, std::int64_t to) {
  return ceil_div(x, to) * to;
}
TANDEM_ALWAYS_INLINE constexpr std::int64_t panel_bytes(DType format, std::int64_t k) {
  return format == DType::kF32 ? k * kPanel * 4 : round_up(k, kTileK) * kPanel * 2;
}
/// Element (i, j) of a bf16 panel.
TANDEM_ALWAYS_INLINE constexpr std::int64_t bf16_panel_index(std::int64_t i, std::int64_t j) {
  return (j / kTileK) * 2 * kTileElements + (i / kTileRows) * kTileElements +
         (j % kTileK) / 2 * 2 * kTileRows + (i % kTileRows) * 2 + j % 2;
}

}  // namespace tandem::kernels::cpu
