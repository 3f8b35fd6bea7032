// Paged attention for sequences with few new rows: reads each key and value once, through a ring of
// stages in shared memory that each warp fills for itself. Keys are the tensor cores' rows (16 at a
// time), pairs of query row and head their columns (8 at a time). Blocks of 16 keys go round robin
// over the warps of a cluster; each warp keeps a softmax of its own, and they are merged in one
// order.
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/paged_attention.cuh"
#include "kernels/cuda/shared_tiles.cuh"
#include "kernels/device_profile.h"

#include <cooperative_groups.h>

namespace tandem::kernels::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kColumns = 8;  ///< pairs of query row and head of one tile
constexpr int kKeys = 16;    ///< that a warp takes at a time
constexpr int kSplitsMax = 8;
/// Two blocks of a multiprocessor, each warp with so many stages on their way, keep memory busy.
constexpr int kBlocks = 2;
template <int kDim>
constexpr int kStages = kDim == 64 ? 4 : 3;
constexpr std::int64_t kManyKeys = 2048;  ///< of a block: with lengths that differ, it ends late

/// The transpose of an 8 x 8 matrix of 16-bit elements: lane (g, q) gives row g, columns 2q and 2q
/// + 1.
__device__ inline std::uint32_t transpose_8x8(std::uint32_t x) {
  std::uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

/// Sixteen keys and their values in shared memory, see chunk_at().
template <class E, int kDim>
struct Stage {
  E keys[kKeys * kDim], values[kKeys * kDim];
};

/// Begins to fill a stage, from the place of its first key; values from key `present` on are zeros.
template <class E, int kDim>
__device__ inline void fill(Stage<E, kDim>& stage, const E* keys, const E* values, int present,
                            int lane) {
  constexpr int kChunks = kDim / 8;  // of 16 bytes in a row
#pragma unroll
  for (int i = 0; i < kKeys * kChunks / 32; ++i) {
    const int chunk = lane + 32 * i, row = chunk / kChunks;
    copy_16_async(stage.keys + chunk_at<kDim>(row, chunk % kChunks), keys + 8 * chunk, true);
  }
#pragma unroll
  for (int i = 0; i < kKeys * kChunks / 32; ++i) {
    const int chunk = lane + 32 * i, row = chunk / kChunks;
    copy_16_async(stage.values + chunk_at<kDim>(row, chunk % kChunks), values + 8 * chunk,
                  row < present);
  }
}

/// Keys of a stage as the tensor cores' A, head dim along k: lane (g, q) holds elements
/// 32 s + 8 q .. + 8 of keys g and g + 8.
template <class E, int kDim>
struct KeyFragments {
  uint4 low[kDim / 32], high[kDim / 32];
  __device__ void load(const E* keys, int g, int q) {
#pragma unroll
    for (int s = 0; s < kDim / 32; ++s) {
      low[s] = *reinterpret_cast<const uint4*>(keys + chunk_at<kDim>(g, 4 * s + q));
      high[s] = *reinterpret_cast<const uint4*>(keys + chunk_at<kDim>(g + 8, 4 * s + q));
    }
  }
};

/// Values of the same keys: lane (g, q) holds elements 64 h + 8 g .. + 8 of keys 2q, 2q + 1,
/// 2q + 8 and 2q + 9.
template <class E, int kDim>
struct ValueFragments {
  uint4 at[kDim / 64][4];
  __device__ void load(const E* values, int g, int q) {
#pragma unroll
    for (int h = 0; h < kDim / 64; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        at[h][i] = *reinterpret_cast<const uint4*>(
            values + chunk_at<kDim>(2 * q + i % 2 + 8 * (i / 2), 8 * h + g));
  }
};

__device__ inline std::uint32_t word(const uint4& x, int j) {
  return j == 0 ? x.x : j == 1 ? x.y : j == 2 ? x.z : x.w;
}

/// What one warp makes of its keys: of columns 2q and 2q + 1 the largest exponent, the sum of
/// powers (this lane's keys only) and the sum of values, o[h][j]: elements 64 h + 8 g + 2 j and
/// + 1, as {even of 2q, even of 2q + 1, odd of 2q, odd of 2q + 1}.
template <class E, int kDim>
struct WarpState {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float o[kDim / 64][4][4] = {};

  /// x: exponents of {key g, column 2q}, {g, 2q + 1}, {g + 8, 2q}, {g + 8, 2q + 1}; -inf: unseen.
  __device__ void add(const float (&x)[4], const ValueFragments<E, kDim>& values) {
    float factor[2], p[4];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float most = fmaxf(x[c], x[c + 2]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
      most = fmaxf(top[c], most);
      const float base = most == -INFINITY ? 0.0f : most;
      factor[c] = exp2_fast(top[c] - base);
      p[c] = exp2_fast(x[c] - base);
      p[c + 2] = exp2_fast(x[c + 2] - base);
      top[c] = most;
      sum[c] = sum[c] * factor[c] + (p[c] + p[c + 2]);
    }
    const std::uint32_t b0 = transpose_8x8(pack<E>(p[0], p[1]));
    const std::uint32_t b1 = transpose_8x8(pack<E>(p[2], p[3]));
#pragma unroll
    for (int h = 0; h < kDim / 64; ++h)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[h][j][e] *= factor[e % 2];
        const std::uint32_t w0 = word(values.at[h][0], j), w1 = word(values.at[h][1], j);
        const std::uint32_t w2 = word(values.at[h][2], j), w3 = word(values.at[h][3], j);
        mma<E>(o[h][j], __byte_perm(w0, w1, 0x5410), __byte_perm(w0, w1, 0x7632),
               __byte_perm(w2, w3, 0x5410), __byte_perm(w2, w3, 0x7632), b0, b1);
      }
  }
};

/// What a block, then a cluster, has merged: of each column.
template <int kDim>
struct Merged {
  float o[kWarps][kColumns][kDim];  ///< [0]: the block's
  float top[kWarps][kColumns], sum[kWarps][kColumns];
  float block_top[kColumns], block_sum[kColumns];
};

template <class E, int kDim>
__device__ void merge_warps(Merged<kDim>& m, const WarpState<E, kDim>& state) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float sum = state.sum[c];
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (g == 0) {
      m.top[warp][2 * q + c] = state.top[c];
      m.sum[warp][2 * q + c] = sum;
    }
#pragma unroll
    for (int h = 0; h < kDim / 64; ++h)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        *reinterpret_cast<float2*>(&m.o[warp][2 * q + c][64 * h + 8 * g + 2 * j]) = {
            state.o[h][j][c], state.o[h][j][c + 2]};
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < kColumns * kDim; e += kThreads) {
    const int c = e / kDim, d = e % kDim;
    float top = m.top[0][c], o = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, m.top[w][c]);
    const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = exp2_fast(m.top[w][c] - base);
      o += factor * m.o[w][c][d];
      sum += factor * m.sum[w][c];
    }
    m.o[0][c][d] = o;
    if (d == 0) {
      m.block_top[c] = top;
      m.block_sum[c] = sum;
    }
  }
}

/// Block (split, tile, kv head and part of its group); the splits of a tile are one cluster.
template <class E, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks) decode_kernel(const PagedView v) {
  launch_dependents();
  constexpr int kRing = kStages<kDim>;
  extern __shared__ __align__(128) unsigned char memory[];
  auto& merged = *reinterpret_cast<Merged<kDim>*>(memory);  // once all keys are through
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  const int head_tiles = (v.group + kColumns - 1) / kColumns;
  const int kv_head = static_cast<int>(blockIdx.z) / head_tiles;
  const int head0 = static_cast<int>(blockIdx.z) % head_tiles * kColumns;
  const int heads = min(kColumns, v.group - head0), tile_rows = kColumns / heads;
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x);
  // Every part of a group walks tiles of as many rows as the first part's.
  const QueryTile tile =
      find_query_tile(v, kColumns / min(kColumns, v.group), static_cast<int>(blockIdx.y));
  const int columns = tile.rows * heads;
  const int first_head = kv_head * v.group + head0;
  (void)tile_rows;

  const int keys = tile.position + tile.rows;
  const int stride = kWarps * splits, own = split * kWarps + warp;
  const int first = max(0, tile.position - v.window + 1) / kKeys, end = (keys + kKeys - 1) / kKeys;
  int block = first + (own - first % stride + stride) % stride;
  const std::int32_t* table = v.tables + static_cast<std::int64_t>(tile.sequence) * v.blocks_max;
  const auto* k = static_cast<const E*>(v.k);
  const auto* values = static_cast<const E*>(v.v);
  auto* ring = reinterpret_cast<Stage<E, kDim>*>(memory) + warp * kRing;
  // Blocks are asked for `filled` in a row, `places` has 32 of them, one a lane.
  int filled = 0, next = block;
  std::int64_t places = 0;
  const auto ask = [&] {
    if (next < end) {
      if (filled % 32 == 0)
        if (const int b = next + lane * stride; b < end)
          places = v.key_at(table, b * kKeys, kv_head);
      const std::int64_t place = __shfl_sync(0xffffffffu, places, filled % 32);
      fill<E, kDim>(ring[filled % kRing], k + place, values + place, keys - next * kKeys, lane);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    ++filled;
    next += stride;
  };
  // Offsets, lengths and tables come by an upload, behind which no kernel starts early: they, and
  // keys that were there before this step, may be read before the kernel before has ended.
  if (tile.rows > 0) {
    const int known = tile.position - (tile.row - v.q_offsets[tile.sequence]);
    while (filled < kRing && next < end && (next + 1) * kKeys <= known) ask();
  }
  wait_for_inputs();
  if (head0 == 0)
    zero_inert_rows<E>(v, kv_head, static_cast<int>(blockIdx.y) * splits + split,
                       static_cast<int>(gridDim.y) * splits);
  if (tile.rows == 0) return;

  uint4 query[kDim / 32];
#pragma unroll
  for (int s = 0; s < kDim / 32; ++s) {
    query[s] = {0, 0, 0, 0};
    if (g < columns)
      query[s] = *reinterpret_cast<const uint4*>(
          static_cast<const E*>(v.q) + v.q_at(tile.row + g / heads, first_head + g % heads) +
          32 * s + 8 * q);
  }
  int position[2];  // of this lane's columns; -1: sees nothing
#pragma unroll
  for (int c = 0; c < 2; ++c)
    position[c] = 2 * q + c < columns ? tile.position + (2 * q + c) / heads : -1;

  WarpState<E, kDim> state;
  while (filled < kRing) ask();
  for (int i = 0; block < end; ++i, block += stride) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kRing - 1) : "memory");
    __syncwarp();
    KeyFragments<E, kDim> key;
    ValueFragments<E, kDim> value;
    key.load(ring[i % kRing].keys, g, q);
    value.load(ring[i % kRing].values, g, q);
    __syncwarp();
    ask();
    float x[4] = {};
#pragma unroll
    for (int s = 0; s < kDim / 32; ++s) {
      mma<E>(x, key.low[s].x, key.high[s].x, key.low[s].y, key.high[s].y, query[s].x, query[s].y);
      mma<E>(x, key.low[s].z, key.high[s].z, key.low[s].w, key.high[s].w, query[s].z, query[s].w);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = block * kKeys + g + 8 * (e / 2), ahead = position[e % 2] - at;
      x[e] = ahead >= 0 && ahead < v.window ? exponent(v, x[e]) : -INFINITY;
    }
    state.add(x, value);
  }
  __syncthreads();  // no warp reads its stages any more
  merge_warps(merged, state);
#if __CUDA_ARCH__ >= 900
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
#else
  __syncthreads();
#endif
  for (int e = split * kThreads + static_cast<int>(threadIdx.x); e < columns * kDim;
       e += splits * kThreads) {
    const int c = e / kDim, d = e % kDim;
    float o = merged.o[0][c][d], sum = merged.block_sum[c];
#if __CUDA_ARCH__ >= 900
    if (splits > 1) {
      float top = -INFINITY;
      for (int b = 0; b < splits; ++b)
        top = fmaxf(top, cluster.map_shared_rank(&merged, static_cast<unsigned>(b))->block_top[c]);
      o = sum = 0.0f;
      for (int b = 0; b < splits; ++b) {
        const Merged<kDim>& other = *cluster.map_shared_rank(&merged, static_cast<unsigned>(b));
        const float factor = exp2_fast(other.block_top[c] - top);
        o += factor * other.o[0][c][d];
        sum += factor * other.block_sum[c];
      }
    }
#endif
    static_cast<E*>(v.out)[v.out_at(tile.row + c / heads, first_head + c % heads) + d] =
        store_as<E>(o / sum);
  }
#if __CUDA_ARCH__ >= 900
  cluster.sync();  // a block's memory lives until all have read it
#endif
}

unsigned decode_tiles(const PagedView& v) {
  return query_tiles_max(v, kColumns / std::min(kColumns, v.group));
}
unsigned head_parts(const PagedView& v) {
  return static_cast<unsigned>(v.kv_heads * ((v.group + kColumns - 1) / kColumns));
}

template <class E, int kDim>
void launch(cudaStream_t stream, const PagedView& v, int splits) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};
  config.gridDim = dim3(static_cast<unsigned>(splits), decode_tiles(v), head_parts(v));
  config.blockDim = dim3(kThreads);
  constexpr std::size_t kBytes =
      std::max(kWarps * kStages<kDim> * sizeof(Stage<E, kDim>), sizeof(Merged<kDim>));
  static const cudaError_t allowed = cudaFuncSetAttribute(
      decode_kernel<E, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check_cuda(allowed, "decode_kernel: shared memory");
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
  config.attrs = attributes;
  config.numAttrs = starts_early() ? 2 : 0;  // one compute capability for both
  TANDEM_CUDA(cudaLaunchKernelEx(&config, decode_kernel<E, kDim>, v));
}

}  // namespace

// Enough blocks for every multiprocessor, each with at least one block of keys a warp: more cost
// more than they balance, as long as no block has many keys. A function of bounds alone.
int paged_decode_splits(const PagedView& v, std::int64_t kv_len_max, const DeviceProfile& profile) {
  if (profile.compute_capability < 90) return 1;
  const std::int64_t blocks = std::int64_t{decode_tiles(v)} * head_parts(v);
  const auto wanted = [&](int splits) {
    const std::int64_t halves = kv_len_max > splits * kManyKeys ? 12 : 3;
    return halves * profile.sm_count / 2;
  };
  int splits = 1;
  while (splits < kSplitsMax && splits * blocks < wanted(splits) &&
         2 * splits * kWarps * kKeys <= kv_len_max)
    splits *= 2;
  return splits;
}

void paged_decode(cudaStream_t stream, const PagedView& v, DType dtype, int splits) {
  with_element(dtype, [&]<class E>(E) {
    v.dim == 64 ? launch<E, 64>(stream, v, splits) : launch<E, 128>(stream, v, splits);
  });
}

}  // namespace tandem::kernels::cuda
