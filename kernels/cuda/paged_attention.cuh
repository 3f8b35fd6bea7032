// Private to kernels/cuda: paged attention has four kernels with one meaning.
//   simple  any dtype, head dim and block size; a row's sums run in the order of the simple packed
//           kernel's (attention_simple.cu), so in f32 both give the same bits
//   tiles   bf16 and f16, head dim 64 or 128: many query rows of a sequence share each tile of
//           keys. A row's bits depend on its own keys alone
//   decode  as tiles, for sequences with few new rows: keys are split over warps and blocks, so
//           that few sequences still fill the device
//   ordered for sequences with few new rows under kInvariant on Hopper: the bits of training's
//           kernel (attention_own_forward.cu), which takes the others
#pragma once

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.cuh"
#include "kernels/device_profile.h"
#include "kernels/exec.h"
#include "kernels/op_args.h"

#include <algorithm>
#include <climits>

namespace tandem::kernels::cuda {

/// PagedAttentionArgs as kernels see them.
struct PagedView {
  const void *q, *k, *v;
  void* out;
  const std::int32_t *q_offsets, *kv_lens, *tables;
  int t, sequences, blocks_max, block_size;
  int heads, kv_heads, group;  ///< group: heads of one kv head
  int dim;
  std::int64_t width;       ///< of qkv
  std::int64_t cache_rows;  ///< of k and v, each of `dim`
  float scale, soft_cap;
  int window;              ///< INT_MAX: all keys
  int rows_min, rows_max;  ///< sequences with so many new rows are this kernel's

  [[nodiscard]] __device__ std::int64_t out_at(std::int64_t row, int head) const {
    return (row * heads + head) * dim;
  }
  [[nodiscard]] __device__ std::int64_t q_at(std::int64_t row, int head) const {
    return row * width + static_cast<std::int64_t>(head) * dim;
  }
  /// Element offset of a key's row in k and v; `table` is its sequence's.
  [[nodiscard]] __device__ std::int64_t key_at(const std::int32_t* table, int key,
                                               int kv_head) const {
    const std::int64_t block = table[key / block_size];
    return ((block * kv_heads + kv_head) * block_size + key % block_size) * dim;
  }
};

inline PagedView paged_view(const PagedAttentionArgs& a) {
  PagedView v{};
  v.q = a.qkv.data;
  v.k = a.cache->k.data;
  v.v = a.cache->v.data;
  v.out = a.out.data;
  v.q_offsets = a.q_offsets.as<std::int32_t>();
  v.kv_lens = a.kv_lens.as<std::int32_t>();
  v.tables = a.block_tables.as<std::int32_t>();
  v.t = static_cast<int>(a.qkv.dim(0));
  v.sequences = static_cast<int>(a.kv_lens.dim(0));
  v.blocks_max = static_cast<int>(a.block_tables.dim(1));
  v.block_size = static_cast<int>(a.cache->block_size);
  v.heads = static_cast<int>(a.spec.heads);
  v.kv_heads = static_cast<int>(a.spec.kv_heads);
  v.group = v.heads / v.kv_heads;
  v.dim = static_cast<int>(a.spec.head_dim);
  v.width = a.qkv.dim(1);
  v.cache_rows = a.cache->k.elements() / v.dim;
  v.scale = a.spec.scale;
  v.soft_cap = a.spec.soft_cap;
  v.window = a.spec.window == 0 ? INT_MAX
                                : static_cast<int>(std::min<std::int64_t>(a.spec.window, INT_MAX));
  v.rows_min = 1;
  v.rows_max = INT_MAX;
  return v;
}

/// Rows [row, row + rows) of one sequence; the first stands at `position`. rows 0: no such tile.
struct QueryTile {
  int sequence = 0, row = 0, rows = 0, position = 0;
};

/// Of tiles of `tile_rows` rows of one sequence each no batch has more.
inline unsigned query_tiles_max(const PagedView& v, int tile_rows) {
  const std::int64_t rows = std::min(v.t, v.rows_max);
  const std::int64_t each = std::int64_t{v.sequences} * ((rows + tile_rows - 1) / tile_rows);
  const std::int64_t all = std::min(v.t, v.t / tile_rows + v.sequences);
  return static_cast<unsigned>(std::max<std::int64_t>(1, std::min(each, all)));
}

/// Tile `index` in order of sequences. Called by whole warps.
__device__ inline QueryTile find_query_tile(const PagedView& v, int tile_rows, int index) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0; first < v.sequences; first += 32) {
    const int s = first + lane;
    const int begin = s < v.sequences ? v.q_offsets[s] : 0;
    const int rows = s < v.sequences ? v.q_offsets[s + 1] - begin : 0;
    if (rows < 0 || begin + rows > v.t) __trap();
    const bool mine = rows >= v.rows_min && rows <= v.rows_max;
    const int tiles = mine ? (rows + tile_rows - 1) / tile_rows : 0;
    int running = tiles;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int below = __shfl_up_sync(kAll, running, offset);
      if (lane >= offset) running += below;
    }
    const unsigned beyond = __ballot_sync(kAll, running > index);
    if (beyond != 0) {
      const int at = __ffs(static_cast<int>(beyond)) - 1;
      const int skipped = (index - (running - tiles)) * tile_rows;
      QueryTile tile;
      tile.sequence = first + at;
      tile.row = __shfl_sync(kAll, begin + skipped, at);
      tile.rows = __shfl_sync(kAll, min(tile_rows, rows - skipped), at);
      tile.position = v.kv_lens[tile.sequence] - __shfl_sync(kAll, rows - skipped, at);
      if (tile.position < 0 || v.kv_lens[tile.sequence] > v.blocks_max * v.block_size) __trap();
      return tile;
    }
    index -= __shfl_sync(kAll, running, 31);
  }
  return {};
}

/// Zeroes one kv head's part of the inert rows, part `part` of `parts` of them.
template <class T>
__device__ inline void zero_inert_rows(const PagedView& v, int kv_head, int part, int parts) {
  const int columns = v.group * v.dim;
  for (int row = v.q_offsets[v.sequences] + part; row < v.t; row += parts) {
    T* out = static_cast<T*>(v.out) + v.out_at(row, kv_head * v.group);
    for (int c = static_cast<int>(threadIdx.x); c < columns; c += static_cast<int>(blockDim.x))
      out[c] = store_as<T>(0.0f);
  }
}

inline constexpr float kLog2E = 1.4426950408889634f;

/// q k as the exponent of 2.
__device__ inline float exponent(const PagedView& v, float dot) {
  const float score = dot * v.scale;
  return kLog2E * (v.soft_cap > 0.0f ? v.soft_cap * tanhf(score / v.soft_cap) : score);
}

void paged_simple(cudaStream_t stream, const PagedView& view, DType dtype);
/// paged_tiles.cu
void paged_tiles(cudaStream_t stream, const PagedView& view, DType dtype);
/// paged_ordered.cu, and how many rows of a sequence it takes at a time. `splits`: blocks that
/// share the segments of a tile's keys, a power of two up to 8; no bit depends on it.
void paged_ordered(cudaStream_t stream, const PagedView& view, DType dtype, int splits);
int paged_ordered_rows(const PagedView& view);
int paged_ordered_splits(const PagedView& view, std::int64_t kv_len_max,
                         const DeviceProfile& profile);
/// paged_decode.cu. `splits`: blocks that share the keys of a tile, a power of two up to 8.
void paged_decode(cudaStream_t stream, const PagedView& view, DType dtype, int splits);
int paged_decode_splits(const PagedView& view, std::int64_t kv_len_max,
                        const DeviceProfile& profile);

}  // namespace tandem::kernels::cuda
