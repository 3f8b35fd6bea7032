// Private to kernels/cuda: a packed batch cut into tiles of rows that never cross a sequence. The
// host knows only a bound on their number (T / rows + S).
#pragma once

#include <cstdint>

namespace tandem::kernels::cuda {

/// Rows [begin, begin + rows) of the sequence that starts at row `sequence` and has `length` rows;
/// begin counts from the sequence's start. rows 0: there is no such tile.
struct RowTile {
  int sequence = 0, length = 0, begin = 0, rows = 0;
};

/// Tile `index` in order of sequences. Every lane of the warp calls it and gets the answer.
__device__ inline RowTile find_tile(const std::int32_t* offsets, int sequences, int tile_rows,
                                    int index) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int before = 0;
  for (int base = 0; base < sequences; base += 32) {
    const int s = base + lane;
    const int begin = s < sequences ? offsets[s] : 0;
    const int length = s < sequences ? offsets[s + 1] - begin : 0;
    const int tiles = (length + tile_rows - 1) / tile_rows;
    int through = tiles;  // inclusive sum over lanes
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, through, step);
      if (lane >= step) through += other;
    }
    const int total = __shfl_sync(0xffffffffu, through, 31);
    if (index < before + total) {
      const int in_chunk = index - before;
      const unsigned hit = __ballot_sync(0xffffffffu, in_chunk < through);
      const int owner = __ffs(static_cast<int>(hit)) - 1;
      RowTile tile;
      tile.sequence = __shfl_sync(0xffffffffu, begin, owner);
      tile.length = __shfl_sync(0xffffffffu, length, owner);
      tile.begin = (in_chunk - __shfl_sync(0xffffffffu, through - tiles, owner)) * tile_rows;
      tile.rows = min(tile_rows, tile.length - tile.begin);
      return tile;
    }
    before += total;
  }
  return {};
}

}  // namespace tandem::kernels::cuda
