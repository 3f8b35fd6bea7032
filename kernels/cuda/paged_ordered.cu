// Paged attention of few new rows under Numerics::kInvariant, on Hopper: a row gets the bits that
// attention_own_forward.cu gives it. Keys come in the same blocks, from the row's own block down to
// the first; scores and values are summed in steps of 16 in ascending order, as wgmma does
// (mma.sync adds up alike: a test holds one against the other); attention_softmax.cuh is shared.
//
// A block of threads has up to 16 pairs of query row and head of one kv head. One warp drives the
// copy engine; four make a quarter of the keys' scores each, exchange them, exponentiate all of
// them, and sum a quarter of the head's columns each.
#include "kernels/cuda/attention_softmax.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/paged_attention.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda_workspace.h"

namespace tandem::kernels::cuda {
namespace ordered {
namespace {

using bf16_t = __nv_bfloat16;

constexpr int kWarps = 4, kConsumers = 32 * kWarps, kThreads = kConsumers + 32;
constexpr int kPairs = 16;
constexpr int kKeys = kAttentionTileRows, kHalf = kKeys / 2;  ///< of a softmax step; of a stage
constexpr int kStages = 6;  ///< keys twice, values twice, and the next step's keys

template <int kDim>
struct Shared {
  static constexpr int kPanel = kHalf * 128, kPanels = kDim / 64;  ///< see hopper.cuh
  static constexpr int kStage = kPanel * kPanels;
  static constexpr int kScoreRow = kKeys + 8;  ///< f32: rows of a fragment in different banks
  static constexpr int kScores = kStages * kStage;
  static constexpr int kBytes = kScores + kPairs * kScoreRow * 4 + 1024;
};
/// Rings and scores of two blocks lie in a multiprocessor's 227 KiB.
static_assert(2 * (Shared<128>::kBytes + 1024 + 256) <= 228 * 1024);

struct Barriers {
  std::uint64_t full[kStages], empty[kStages];
};

/// Blocks of keys [low, high] that a tile of rows sees.
struct KeyBlocks {
  int low, high;
};
__device__ inline KeyBlocks key_blocks(const PagedView& v, const QueryTile& tile) {
  return {max(0, tile.position - v.window + 1) / kKeys, (tile.position + tile.rows - 1) / kKeys};
}

/// By one warp: of each step's keys and values two halves each; keys beyond `end` stay away.
template <int kDim>
__device__ void produce(const PagedView& v, const CUtensorMap* k_map, const CUtensorMap* v_map,
                        const QueryTile& tile, int kv_head, std::uint32_t shared, Barriers& bars) {
  using S = Shared<kDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int32_t* table = v.tables + static_cast<std::int64_t>(tile.sequence) * v.blocks_max;
  const int end = tile.position + tile.rows, rows = min(v.block_size, kHalf);  // of a box
  const KeyBlocks blocks = key_blocks(v, tile);
  const int panel = lane % S::kPanels, box = lane / S::kPanels;
  int stage = 0;
  std::uint32_t phase = 0;
  for (int n = blocks.high; n >= blocks.low; --n) {
    int place[2];
    bool present[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = n * kKeys + half * kHalf + box * rows;
      present[half] = box * rows < kHalf && key < end;
      place[half] = present[half] ? (table[key / v.block_size] * v.kv_heads + kv_head) *
                                            v.block_size + key % v.block_size
                                  : 0;
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int half = part % 2;
      barrier_wait(&bars.empty[stage], phase ^ 1);
      const int boxes = __popc(__ballot_sync(0xffffffffu, present[half]));
      if (lane == 0) barrier_expect(&bars.full[stage], boxes * rows * 128);
      __syncwarp();
      if (present[half])
        copy_box(shared + stage * S::kStage + panel * S::kPanel + box * rows * 128,
                 part < 2 ? k_map : v_map, &bars.full[stage], panel * 64, place[half]);
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  }
}

/// Chunk `chunk` of 8 columns of a row.
template <int kDim>
__device__ inline std::uint32_t chunk_address(std::uint32_t stage, int row, int chunk) {
  return stage + chunk / 8 * Shared<kDim>::kPanel + row * 128 + (chunk % 8 ^ row % 8) * 16;
}
__device__ inline void load_rows(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_columns(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
/// Of a pair of neighbouring keys' values, those of the first `present` keys.
__device__ inline std::uint32_t first_of_pair(std::uint32_t pair, int present) {
  return present >= 2 ? pair : present == 1 ? pair & 0xffffu : 0u;
}

template <int kDim>
__device__ void consume(const PagedView& v, const QueryTile& tile, int first_head, int heads,
                        std::uint32_t shared, float* scores, Barriers& bars) {
  using S = Shared<kDim>;
  constexpr int kOwnKeys = kKeys / kWarps, kOwnColumns = kDim / kWarps;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  const int pairs = tile.rows * heads, end = tile.position + tile.rows;
  const float scale_log2 = v.scale * 1.44269504088896340736f;
  const int window = v.window == INT_MAX ? 0 : v.window;

  std::uint32_t query[kDim / 16][4];
  int position[2];
  std::int64_t out_at[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pair = g + 8 * i;
    const bool present = pair < pairs;
    const int row = tile.row + pair / heads, head = first_head + pair % heads;
    position[i] = tile.position + (present ? pair / heads : 0);
    out_at[i] = present ? v.out_at(row, head) : -1;
    const bf16_t* from = static_cast<const bf16_t*>(v.q) + (present ? v.q_at(row, head) : 0);
#pragma unroll
    for (int s = 0; s < kDim / 16; ++s)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        query[s][i + 2 * h] =
            present ? *reinterpret_cast<const std::uint32_t*>(from + 16 * s + 8 * h + 2 * q) : 0;
  }

  int stage = 0;
  std::uint32_t phase = 0;
  const auto wait = [&](int ahead) {
    const int at = stage + ahead;
    barrier_wait(&bars.full[at < kStages ? at : at - kStages], at < kStages ? phase : phase ^ 1);
    return shared + (at < kStages ? at : at - kStages) * S::kStage;
  };
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(&bars.empty[stage]);
    if (++stage == kStages) stage = 0, phase ^= 1;
  };
  RowState state;
  float o[kOwnColumns / 8][4] = {}, shrink[2];
  const KeyBlocks blocks = key_blocks(v, tile);
  for (int n = blocks.high; n >= blocks.low; --n) {
    {
      const std::uint32_t keys = wait(warp / 2);
      float x[kOwnKeys / 8][4] = {};
#pragma unroll
      for (int s = 0; s < kDim / 16; ++s)
#pragma unroll
        for (int t = 0; t < kOwnKeys / 16; ++t) {
          const int row = warp % 2 * kOwnKeys + 16 * t + lane / 16 * 8 + lane % 8;
          std::uint32_t b[4];
          load_rows(b, chunk_address<kDim>(keys, row, 2 * s + lane / 8 % 2));
          mma_bf16(x[2 * t], query[s][0], query[s][1], query[s][2], query[s][3], b[0], b[1]);
          mma_bf16(x[2 * t + 1], query[s][0], query[s][1], query[s][2], query[s][3], b[2], b[3]);
        }
      release();
      release();
#pragma unroll
      for (int t = 0; t < kOwnKeys / 8; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          *reinterpret_cast<float2*>(scores + (g + 8 * i) * S::kScoreRow + warp * kOwnKeys + 8 * t +
                                     2 * q) = {x[t][2 * i], x[t][2 * i + 1]};
    }
    named_sync(1, kConsumers);
    float s[kKeys / 2];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 x =
            *reinterpret_cast<const float2*>(scores + (g + 8 * i) * S::kScoreRow + 8 * j + 2 * q);
        s[4 * j + 2 * i] = x.x;
        s[4 * j + 2 * i + 1] = x.y;
      }
    named_sync(1, kConsumers);
    mask_scores(s, position[0], position[1], n * kKeys + 2 * q, window);
    exponentiate(s, state, scale_log2, shrink);
    std::uint32_t weights[kKeys / 16][4];
    as_operand<kKeys>(s, weights);
#pragma unroll
    for (int c = 0; c < kOwnColumns / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[c][e] = __fmul_rn(o[c][e], shrink[e / 2]);
    const bool whole = (n + 1) * kKeys <= end;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t values = wait(0);
#pragma unroll
      for (int t = 0; t < kHalf / 16; ++t) {
        const std::uint32_t(&a)[4] = weights[half * (kHalf / 16) + t];
#pragma unroll
        for (int c = 0; c < kOwnColumns / 16; ++c) {
          const int row = 16 * t + lane / 8 % 2 * 8 + lane % 8;
          std::uint32_t b[4];
          load_columns(b, chunk_address<kDim>(values, row,
                                              warp * (kOwnColumns / 8) + 2 * c + lane / 16));
          if (!whole) {  // nobody wrote what lies beyond: it may be NaN, and 0 * NaN is NaN
            const int present = end - (n * kKeys + half * kHalf + 16 * t + 2 * q);
#pragma unroll
            for (int j = 0; j < 4; ++j) b[j] = first_of_pair(b[j], present - j % 2 * 8);
          }
          mma_bf16(o[2 * c], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma_bf16(o[2 * c + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
      release();
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float inverse = 1.0f / row_sum(state.sum[i]);
    if (out_at[i] < 0) continue;
    bf16_t* out = static_cast<bf16_t*>(v.out) + out_at[i] + warp * kOwnColumns + 2 * q;
#pragma unroll
    for (int c = 0; c < kOwnColumns / 8; ++c)
      *reinterpret_cast<std::uint32_t*>(out + 8 * c) =
          pack_bf16(o[c][2 * i] * inverse, o[c][2 * i + 1] * inverse);
  }
}

/// Block (tile of rows, kv head and part of its group).
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    ordered_kernel(const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const PagedView v) {
#ifdef TANDEM_HOPPER
  extern __shared__ std::uint8_t dynamic[];
  __shared__ Barriers bars;
  const std::uint32_t base = shared_address(dynamic), shared = (base + 1023) & ~1023u;
  auto* scores = reinterpret_cast<float*>(dynamic + (shared - base) + Shared<kDim>::kScores);
  launch_dependents();
  if (threadIdx.x == 0) {
    prefetch_map(&k_map);
    prefetch_map(&v_map);
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&bars.full[s], 1);
      barrier_init(&bars.empty[s], kWarps);
    }
    barrier_init_done();
  }
  __syncthreads();
  wait_for_inputs();
  const int parts = (v.group + kPairs - 1) / kPairs;
  const int kv_head = static_cast<int>(blockIdx.y) / parts;
  const int head0 = static_cast<int>(blockIdx.y) % parts * kPairs;
  const int heads = min(kPairs, v.group - head0);
  if (head0 == 0)
    zero_inert_rows<bf16_t>(v, kv_head, static_cast<int>(blockIdx.x),
                            static_cast<int>(gridDim.x));
  // Every part of a group walks tiles of as many rows as the first part's.
  const QueryTile tile =
      find_query_tile(v, kPairs / min(kPairs, v.group), static_cast<int>(blockIdx.x));
  if (tile.rows == 0) return;
  if (threadIdx.x >= kConsumers)
    produce<kDim>(v, &k_map, &v_map, tile, kv_head, shared, bars);
  else
    consume<kDim>(v, tile, kv_head * v.group + head0, heads, shared, scores, bars);
#endif
}

template <int kDim>
void launch(cudaStream_t stream, const PagedView& v) {
  constexpr auto kKernel = ordered_kernel<kDim>;
  constexpr int kBytes = Shared<kDim>::kBytes;
  TANDEM_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const int parts = (v.group + kPairs - 1) / kPairs, rows = std::min(v.block_size, kHalf);
  const dim3 grid(query_tiles_max(v, paged_ordered_rows(v)),
                  static_cast<unsigned>(v.kv_heads * parts));
  launch_early("paged ordered_kernel", kKernel, grid, dim3(kThreads), kBytes, stream,
               make_tensor_map(v.k, v.cache_rows, kDim, rows),
               make_tensor_map(v.v, v.cache_rows, kDim, rows), v);
}

}  // namespace
}  // namespace ordered

int paged_ordered_rows(const PagedView& v) {
  return ordered::kPairs / std::min(ordered::kPairs, v.group);
}

void paged_ordered(cudaStream_t stream, const PagedView& v) {
  v.dim == 64 ? ordered::launch<64>(stream, v) : ordered::launch<128>(stream, v);
}

}  // namespace tandem::kernels::cuda
