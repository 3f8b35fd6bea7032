// Private to kernels/cpu's AMX files: the tile configuration. Every thread loads it before its
// first tile instruction and releases its tiles after the last.
//
// GCC's _tile_loadconfig claims to read 8 of the 64 bytes, so that stores to the rest may be
// dropped; hence the asm with the whole object as operand.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tandem::kernels::cpu {
namespace {

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t column_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

/// Tiles 0-3 sums (0, 1: the first rows; 2, 3: the second), 4 and 5 the A operands, 6 and 7 the B
/// operands. first and second: rows of A and of the sums, 1 to 16.
inline __attribute__((always_inline)) void load_tile_config(int first, int second) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.column_bytes[i] = 64;
    config.rows[i] = 16;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<std::uint8_t>(first);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<std::uint8_t>(second);
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

}  // namespace
}  // namespace tandem::kernels::cpu
