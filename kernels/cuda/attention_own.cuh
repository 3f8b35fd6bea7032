// Private to kernels/cuda: what the forward and backward kernels of the own fast path share. All
// have one producer warpgroup, which drives the copy engine, and two warpgroups of 64 rows each
// that multiply; blocks stay and take work items from a list that is sorted longest first.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/tensor_map.h"

namespace tandem::kernels::cuda::own {

inline constexpr int kThreads = 384;
inline constexpr int kTileRows = 128;  ///< of a work item, 64 for each multiplying warpgroup
inline constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
inline constexpr int kConsumerWarps = 8;
static_assert(kTileRows == kAttentionTileRows);

/// 0 produces, 1 and 2 multiply; through a shuffle, so that the compiler knows it is one number for
/// the warp and keeps what follows from it in uniform registers.
__device__ inline int warpgroup() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
}

/// Tiles in shared memory: `kRows` rows of kDim as panels of 64 columns.
template <int kRows, int kDim>
struct SharedTile {
  static constexpr int kPanel = kRows * 128;  ///< bytes
  static constexpr int kPanels = kDim / 64;
  static constexpr int kBytes = kPanel * kPanels;
};

/// Copies columns [column, column + kDim) of kRows rows from `row` on.
template <int kRows, int kDim>
__device__ inline void copy_tile(std::uint32_t to, const CUtensorMap* map, std::uint64_t* barrier,
                                 int column, int row) {
#pragma unroll
  for (int p = 0; p < kDim / 64; ++p)
    copy_box(to + p * SharedTile<kRows, kDim>::kPanel, map, barrier, column + p * 64, row);
}

/// Rows from `first` on become zero, by the 128 threads of a warpgroup, each group for itself: what
/// lies behind a sequence's end belongs to others and may be NaN, and 0 * NaN is NaN.
template <int kRows, int kDim>
__device__ inline void zero_rows(std::uint32_t tile, int first) {
  const int chunks = (kRows - first) * 8;
  for (int i = static_cast<int>(threadIdx.x % 128); i < chunks; i += 128)
#pragma unroll
    for (int p = 0; p < kDim / 64; ++p)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                       tile + p * SharedTile<kRows, kDim>::kPanel + first * 128 + i * 16),
                   "r"(0)
                   : "memory");
}
/// After zero_rows, before the group's products.
__device__ inline void zeroed(int group) {
  fence_async();
  named_sync(1 + group, 128);
}

/// Where a ring of stages stands.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t phase = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

/// The block's item of a round, or a number >= items. Odd rounds run backwards, so that blocks with
/// the longest item of one round get the shortest of the next.
__device__ inline int item_of(int round) {
  const int blocks = static_cast<int>(gridDim.x), b = static_cast<int>(blockIdx.x);
  return round * blocks + (round % 2 == 0 ? b : blocks - 1 - b);
}

/// A list's entry holds its sequence's number above the rows.
inline constexpr int kTileRowsBits = 8;
__device__ inline RowTile load_tile_entry(const RowTile* tiles, int index) {
  const int4 v = __ldg(reinterpret_cast<const int4*>(tiles) + index);
  return {v.x, v.y, v.z, v.w & ((1 << kTileRowsBits) - 1)};
}
__device__ inline int load_tile_sequence(const RowTile* tiles, int index) {
  return __ldg(&tiles[index].rows) >> kTileRowsBits;
}

/// One accumulator [64, kDim] of a warpgroup, times per-row factors, to rows of `to` (the address
/// of the group's first row at its first column) of which `rows` exist.
template <int kDim, class E>
__device__ inline void store_rows(const float (&acc)[kDim / 2], float factor0, float factor1, E* to,
                                  std::int64_t row_stride, int rows) {
  const int lane = static_cast<int>(threadIdx.x % 32), quad = lane % 4;
  const int row = static_cast<int>(threadIdx.x % 128) / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half == 0 ? factor0 : factor1;
    const int r = row + 8 * half;
#pragma unroll
    for (int g = 0; g < kDim / 32; ++g) {
      std::uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (4 * g + j) + 2 * half;
        v[j] = pack<E>(acc[at] * factor, acc[at + 1] * factor);
      }
      transpose_quad(v, quad);
      if (r < rows)
        *reinterpret_cast<uint4*>(to + r * row_stride + (4 * g + quad) * 8) =
            make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}

/// Work lists, zeroed inert rows and, for backward, delta; see attention_own.cu.
struct Prepare {
  const std::int32_t* offsets;
  /// Paged: keys of each sequence, of which its rows are the last; null: rows are all.
  const std::int32_t* kv_lens;
  int rows_min;  ///< shorter sequences are left out
  int sequences, shift;
  /// Sorted by rows up to the tile's end (queries) and from its start (keys); null: not wanted.
  RowTile *by_prefix, *by_suffix;
  std::int32_t* count;
  char *zero0, *zero1;  ///< rows to zero, of these bytes; null: none
  std::int64_t tokens, zero0_bytes, zero1_bytes;
  /// delta [delta_rows] f32 = sums of dout * out over rows of 8 * lanes; null: not wanted.
  DType dtype;  ///< of them
  const void *dout, *out;
  float* delta;
  std::int64_t delta_rows;
  int lanes;
};
void prepare(cudaStream_t stream, const Prepare& args, std::int64_t seq_len_max);

int multiprocessors();

/// One block on each of the queue's multiprocessors, which may start while the kernel before it
/// still runs: the kernel calls wait_for_inputs().
template <class Kernel, class... Args>
void launch(Kernel* kernel, int shared_bytes, const Queue& queue, const char* name,
            const Args&... args) {
  TANDEM_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  launch_early(name, kernel, dim3(static_cast<unsigned>(queue.multiprocessors)), dim3(kThreads),
               static_cast<std::size_t>(shared_bytes), queue, args...);
}

}  // namespace tandem::kernels::cuda::own
