// Private to kernels/cpu: the packed layouts.
//
// A weight W [n, k] is cut into panels of 32 rows (n padded with zeros).
//   f32:  panel[j][i], j < k, i < 32: the 32 weights that meet one x[j] lie together.
//   bf16: k is padded to 32 with zeros; per 32 k two AMX tiles of 1 KiB, for rows 0-15 and 16-31 of
//     the panel: tile[j / 2][i][j % 2]. That is the B operand of TDPBF16PS and of VDPBF16PS, and
//     the two tiles of one k step follow each other, so a panel is one sequential stream.
#pragma once

#include "protocol/base/dtype.h"

#include <cstdint>

namespace tandem::kernels::cpu {

inline constexpr std::int64_t kPanel = 32;     ///< output columns per panel
inline constexpr std::int64_t kTileK = 32;     ///< reduction elements per bf16 tile
inline constexpr std::int64_t kTileRows = 16;  ///< rows of an AMX tile, columns of one accumulator
inline constexpr std::int64_t kTileElements = 512;  ///< bf16 elements of one 1 KiB tile

constexpr std::int64_t round_up(std::int64_t x, std::int64_t to) {
  return (x + to - 1) / to * to;
}

constexpr std::int64_t panel_bytes(DType format, std::int64_t k) {
  return format == DType::kF32 ? k * kPanel * 4 : round_up(k, kTileK) * kPanel * 2;
}

/// Element (i, j) of a bf16 panel.
constexpr std::int64_t bf16_panel_index(std::int64_t i, std::int64_t j) {
  return (j / kTileK) * 2 * kTileElements + (i / kTileRows) * kTileElements +
         (j % kTileK) / 2 * 2 * kTileRows + (i % kTileRows) * 2 + j % 2;
}

}  // namespace tandem::kernels::cpu
