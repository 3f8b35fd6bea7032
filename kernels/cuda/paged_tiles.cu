// Paged attention for sequences with many new rows: 128 pairs of query row and head share tiles of
// 64 keys, which are copied to shared memory one tile ahead. Sequences with few rows fill half as
// many pairs at most, and then two blocks a multiprocessor; a row's bits are the same in both.
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/paged_attention.cuh"
#include "kernels/cuda/shared_tiles.cuh"

namespace tandem::kernels::cuda {
namespace {

/// Warps of a block; each has 16 pairs of query row and head.
constexpr int kWide = 8, kNarrow = 4;
constexpr int kKeys = 64;

/// Copies a tile of keys and of values; rows from `end` on are zero.
template <int kDim, int kThreads, class E>
__device__ inline void copy_tile(const PagedView& v, const std::int32_t* table, int kv_head,
                                 int key0, int end, E* keys, E* values) {
  constexpr int kChunks = kDim / 8;
#pragma unroll
  for (int i = 0; i < kKeys * kChunks / kThreads; ++i) {
    const int e = static_cast<int>(threadIdx.x) + i * kThreads;
    const int r = e / kChunks, c = e % kChunks, key = key0 + r;
    const bool present = key < end;
    const std::int64_t from = present ? v.key_at(table, key, kv_head) + 8 * c : 0;
    const int to = chunk_at<kDim>(r, c);
    copy_16_async(keys + to, static_cast<const E*>(v.k) + from, present);
    copy_16_async(values + to, static_cast<const E*>(v.v) + from, present);
  }
  asm volatile("cp.async.commit_group;\n" ::);
}

/// One warp's 16 pairs: lane (g, q) has pairs g and g + 8, columns 2q and 2q + 1 of products.
template <class E, int kDim>
struct WarpRows {
  std::uint32_t query[kDim / 16][4];
  float o[kDim / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  int position[2];  ///< -1: not a pair

  /// x = exponents of the tile's keys.
  __device__ void scores(const E* keys, float (&x)[kKeys / 8][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      const int r = 16 * n + lane / 16 * 8 + lane % 8;
#pragma unroll
      for (int s = 0; s < kDim / 16; ++s) {
        std::uint32_t b[4];
        load_matrices(b, keys + chunk_at<kDim>(r, 2 * s + lane / 8 % 2));
        mma<E>(x[2 * n], query[s][0], query[s][1], query[s][2], query[s][3], b[0], b[1]);
        mma<E>(x[2 * n + 1], query[s][0], query[s][1], query[s][2], query[s][3], b[2], b[3]);
      }
    }
  }

  /// x becomes powers of 2 over the new largest exponent; what was summed before shrinks to it.
  __device__ void soften(float (&x)[kKeys / 8][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = top[i];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) most = fmaxf(most, fmaxf(x[n][2 * i], x[n][2 * i + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float base = most == -INFINITY ? 0.0f : most;
      const float factor = exp2_fast(top[i] - base);
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        x[n][2 * i] = exp2_fast(x[n][2 * i] - base);
        x[n][2 * i + 1] = exp2_fast(x[n][2 * i + 1] - base);
        added += x[n][2 * i] + x[n][2 * i + 1];
      }
      sum[i] = sum[i] * factor + added;
      top[i] = most;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        o[n][2 * i] *= factor;
        o[n][2 * i + 1] *= factor;
      }
    }
  }

  __device__ void add_values(const float (&x)[kKeys / 8][4], const E* values) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int t = 0; t < kKeys / 16; ++t) {
      const std::uint32_t a0 = pack<E>(x[2 * t][0], x[2 * t][1]);
      const std::uint32_t a1 = pack<E>(x[2 * t][2], x[2 * t][3]);
      const std::uint32_t a2 = pack<E>(x[2 * t + 1][0], x[2 * t + 1][1]);
      const std::uint32_t a3 = pack<E>(x[2 * t + 1][2], x[2 * t + 1][3]);
      const int r = 16 * t + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        std::uint32_t b[4];
        load_matrices_transposed(b, values + chunk_at<kDim>(r, 2 * n + lane / 16));
        mma<E>(o[2 * n], a0, a1, a2, a3, b[0], b[1]);
        mma<E>(o[2 * n + 1], a0, a1, a2, a3, b[2], b[3]);
      }
    }
  }
};

/// Block (tile of rows, kv head); the longest come first.
template <class E, int kDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps == kNarrow ? 2 : 1)
    tiles_kernel(const PagedView v, bool zero_inert) {
  constexpr int kThreads = 32 * kWarps, kPairs = 16 * kWarps;
  extern __shared__ __align__(128) unsigned char memory[];
  auto* shared = reinterpret_cast<E*>(memory);
  constexpr int kTile = kKeys * kDim;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4, kv_head = static_cast<int>(blockIdx.y);
  if (zero_inert)
    zero_inert_rows<E>(v, kv_head, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  const QueryTile tile =
      find_query_tile(v, kPairs / v.group, static_cast<int>(gridDim.x - 1 - blockIdx.x));
  if (tile.rows == 0) return;
  const int pairs = tile.rows * v.group, end = tile.position + tile.rows;
  const std::int32_t* table = v.tables + static_cast<std::int64_t>(tile.sequence) * v.blocks_max;
  const int first = max(0, tile.position - v.window + 1) / kKeys, last = (end - 1) / kKeys;
  copy_tile<kDim, kThreads>(v, table, kv_head, first * kKeys, end, shared, shared + 2 * kTile);

  WarpRows<E, kDim> rows;
  std::int64_t out_at[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pair = 16 * warp + g + 8 * i;
    const bool present = pair < pairs;
    rows.position[i] = present ? tile.position + pair / v.group : -1;
    const int head = kv_head * v.group + pair % v.group, row = tile.row + pair / v.group;
    const E* from = static_cast<const E*>(v.q) + (present ? v.q_at(row, head) : 0);
    out_at[i] = v.out_at(row, head);
#pragma unroll
    for (int s = 0; s < kDim / 16; ++s)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        rows.query[s][i + 2 * h] =
            present ? *reinterpret_cast<const std::uint32_t*>(from + 16 * s + 8 * h + 2 * q) : 0;
  }
  // Of the warp's pairs: those with no key in a tile leave its rows as they are.
  const int pair0 = 16 * warp, pair1 = min(pairs, pair0 + 16) - 1;
  const int lowest = tile.position + pair0 / v.group, highest = tile.position + pair1 / v.group;
  for (int n = first; n <= last; ++n) {
    const int stage = (n - first) % 2, key0 = n * kKeys;
    if (n < last) {
      copy_tile<kDim, kThreads>(v, table, kv_head, key0 + kKeys, end, shared + (1 - stage) * kTile,
                                shared + (3 - stage) * kTile);
      asm volatile("cp.async.wait_group 1;\n" ::);
    } else {
      asm volatile("cp.async.wait_group 0;\n" ::);
    }
    __syncthreads();
    if (pair0 < pairs && key0 <= highest && lowest - (key0 + kKeys - 1) < v.window) {
      float x[kKeys / 8][4] = {};
      rows.scores(shared + stage * kTile, x);
      const bool all = key0 + kKeys - 1 <= lowest && highest - key0 < v.window && pair1 % 16 == 15;
#pragma unroll
      for (int c = 0; c < kKeys / 8; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int ahead = rows.position[e / 2] - (key0 + 8 * c + 2 * q + e % 2);
          x[c][e] = all || (ahead >= 0 && ahead < v.window) ? exponent(v, x[c][e]) : -INFINITY;
        }
      rows.soften(x);
      rows.add_values(x, shared + (2 + stage) * kTile);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = rows.sum[i];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (rows.position[i] < 0) continue;
    auto* out = static_cast<E*>(v.out) + out_at[i];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
      *reinterpret_cast<std::uint32_t*>(out + 8 * n + 2 * q) =
          pack<E>(rows.o[n][2 * i] / sum, rows.o[n][2 * i + 1] / sum);
  }
}

template <class E, int kDim, int kWarps>
void launch(cudaStream_t stream, const PagedView& v, bool zero_inert) {
  constexpr int kBytes = 4 * kKeys * kDim * kElementBytes;
  constexpr auto kKernel = tiles_kernel<E, kDim, kWarps>;
  TANDEM_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const dim3 grid(query_tiles_max(v, 16 * kWarps / v.group), static_cast<unsigned>(v.kv_heads));
  kKernel<<<grid, 32 * kWarps, kBytes, stream>>>(v, zero_inert);
  TANDEM_LAUNCHED("paged tiles_kernel");
}

template <class E, int kDim>
void run(cudaStream_t stream, const PagedView& all) {
  const bool zero_inert = all.rows_min == 1;
  const int few = 16 * kNarrow / all.group;  // rows of a narrow tile
  PagedView v = all;
  v.rows_max = std::min(all.rows_max, few);
  if (v.rows_min <= v.rows_max) launch<E, kDim, kNarrow>(stream, v, zero_inert);
  v.rows_max = all.rows_max;
  v.rows_min = std::max(all.rows_min, few + 1);
  if (v.t > few) launch<E, kDim, kWide>(stream, v, zero_inert && few == 0);
}

}  // namespace

void paged_tiles(cudaStream_t stream, const PagedView& v, DType dtype) {
  with_element(dtype,
               [&]<class E>(E) { v.dim == 64 ? run<E, 64>(stream, v) : run<E, 128>(stream, v); });
}

}  // namespace tandem::kernels::cuda
