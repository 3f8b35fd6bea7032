// Paged attention of few new rows under Numerics::kInvariant, on Hopper: a row gets the bits that
// attention_own_forward.cu gives it. Keys come in the same blocks, from the row's own block down to
// the first; scores and values are summed in steps of 16 in ascending order, as wgmma does
// (mma.sync adds up alike: a test holds one against the other); attention_softmax.cuh is shared.
//
// A block of threads has up to 16 pairs of query row and head of one kv head. One warp drives the
// copy engine; four make a quarter of the keys' scores each, exchange them, exponentiate all of
// them, and sum a quarter of the head's columns each. Blocks of a cluster take segments of the keys
// in turns, from the last down, and add them up in that order through one another's memory.
#include "kernels/cuda/attention_softmax.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/paged_attention.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda_workspace.h"

#include <cooperative_groups.h>

namespace tandem::kernels::cuda {
namespace ordered {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = 4, kConsumers = 32 * kWarps, kThreads = kConsumers + 32;
constexpr int kPairs = 16;
constexpr int kKeys = kAttentionTileRows, kHalf = kKeys / 2;  ///< of a softmax step; of a stage
constexpr int kStages = 5;  ///< keys twice, values twice, and the next step's first keys
constexpr int kSplitsMax = 8;
constexpr int kSegmentBlocks = kSegmentKeys / kKeys;

/// Of a segment: what each pair has; its values lie where the scores did. Then how they are added.
struct Exchange {
  float top[kPairs], sum[kPairs][4];  ///< each lane's part of the sum
  SegmentFactors factors[kSplitsMax][kPairs];
  float inverse[kPairs];
};

template <int kDim>
struct Shared {
  static constexpr int kPanel = kHalf * 128, kPanels = kDim / 64;  ///< see hopper.cuh
  static constexpr int kStage = kPanel * kPanels;
  static constexpr int kScoreRow = kKeys + 8;  ///< f32: rows of a fragment in different banks
  static constexpr int kScores = kStages * kStage;
  static constexpr int kQuery = kScores + kPairs * kScoreRow * 4;  ///< chunks: see query_chunk()
  static constexpr int kSums = kQuery + kPairs * kDim * 2;         ///< f32: values of all segments
  static constexpr int kExchange = kSums + kPairs * kDim * 4;
  static constexpr int kBytes = kExchange + static_cast<int>(sizeof(Exchange)) + 1024;
};
/// Two blocks share a multiprocessor.
static_assert(2 * (Shared<128>::kBytes + 1024 + 256) <= 228 * 1024);

struct Barriers {
  std::uint64_t full[kStages], empty[kStages];
};

/// Blocks of keys [low, high] that a tile of rows sees.
struct KeyBlocks {
  int low, high;
  [[nodiscard]] __device__ int last_segment() const { return high / kSegmentBlocks; }
  [[nodiscard]] __device__ int segments() const {
    return last_segment() - low / kSegmentBlocks + 1;
  }
  [[nodiscard]] __device__ KeyBlocks of_segment(int s) const {
    return {max(low, s * kSegmentBlocks), min(high, s * kSegmentBlocks + kSegmentBlocks - 1)};
  }
};
__device__ inline KeyBlocks key_blocks(const PagedView& v, const QueryTile& tile) {
  return {max(0, tile.position - v.window + 1) / kKeys, (tile.position + tile.rows - 1) / kKeys};
}

/// All threads of the cluster, where there is one.
__device__ inline void cluster_sync(int splits) {
#if __CUDA_ARCH__ >= 900
  if (splits > 1) cg::this_cluster().sync();
#endif
}

/// By one warp: of each step's keys and values two halves each; keys beyond `end` stay away.
template <int kDim>
__device__ void produce(const PagedView& v, const CUtensorMap* k_map, const CUtensorMap* v_map,
                        const QueryTile& tile, int kv_head, int split, int splits,
                        std::uint32_t shared, Barriers& bars) {
  using S = Shared<kDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int32_t* table = v.tables + static_cast<std::int64_t>(tile.sequence) * v.blocks_max;
  const int end = tile.position + tile.rows, rows = min(v.block_size, kHalf);  // of a box
  const KeyBlocks blocks = key_blocks(v, tile);
  const int panel = lane % S::kPanels, box = lane / S::kPanels;
  int stage = 0;
  std::uint32_t phase = 0;
  for (int first = 0; first < blocks.segments(); first += splits) {
    const KeyBlocks own = blocks.of_segment(blocks.last_segment() - first - split);
    for (int n = own.high; n >= own.low; --n) {
      int place[2];
      bool present[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = n * kKeys + half * kHalf + box * rows;
        present[half] = box * rows < kHalf && key < end;
        place[half] = present[half]
                          ? (table[key / v.block_size] * v.kv_heads + kv_head) * v.block_size +
                                key % v.block_size
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
    __syncwarp();
    cluster_sync(splits);  // as consume()
    cluster_sync(splits);
  }
}

/// Chunk `chunk` of 8 columns of a row.
template <int kDim>
__device__ inline std::uint32_t chunk_address(std::uint32_t stage, int row, int chunk) {
  return stage + chunk / 8 * Shared<kDim>::kPanel + row * 128 + (chunk % 8 ^ row % 8) * 16;
}
/// The same of the pairs' queries, rows of kDim.
template <int kDim>
__device__ inline std::uint32_t query_chunk(std::uint32_t query, int row, int chunk) {
  return query + row * kDim * 2 + (chunk ^ row % 8) * 16;
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

template <class E, int kDim>
__device__ void consume(const PagedView& v, const QueryTile& tile, int first_head, int heads,
                        int split, int splits, std::uint32_t shared, float* scores, float* sums,
                        Exchange& exchange, Barriers& bars) {
  using S = Shared<kDim>;
  constexpr int kOwnKeys = kKeys / kWarps, kOwnColumns = kDim / kWarps;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  const int pairs = tile.rows * heads, end = tile.position + tile.rows;
  const float scale_log2 = v.scale * 1.44269504088896340736f;
  const int window = v.window == INT_MAX ? 0 : v.window;

  int position[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    position[i] = tile.position + (g + 8 * i < pairs ? (g + 8 * i) / heads : 0);
  const std::uint32_t query = shared + S::kQuery;
  for (int e = static_cast<int>(threadIdx.x); e < kPairs * kDim / 8; e += kConsumers) {
    const int pair = e / (kDim / 8), chunk = e % (kDim / 8);
    uint4 x{};
    if (pair < pairs)
      x = *reinterpret_cast<const uint4*>(
          static_cast<const E*>(v.q) + v.q_at(tile.row + pair / heads, first_head + pair % heads) +
          8 * chunk);
    asm volatile(
        "st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(query_chunk<kDim>(query, pair, chunk)),
        "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
        : "memory");
  }
  named_sync(1, kConsumers);

  float* fragments = scores + g * S::kScoreRow + 2 * q;
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
  // Of all segments so far: thread (pair, lane) of the first 64 has a part of a row's sum, every
  // thread some of the values, every stride-th of the cluster's; no other thread touches them.
  const KeyBlocks blocks = key_blocks(v, tile);
  const int thread = static_cast<int>(threadIdx.x);
  const int values_count = pairs * kDim, stride = splits * kConsumers;
  const int first_value = split * kConsumers + thread;
  float top = -INFINITY, sum = 0.0f;
  for (int e = first_value; e < values_count; e += stride) sums[e] = 0.0f;
  for (int first = 0; first < blocks.segments(); first += splits) {
    const KeyBlocks own = blocks.of_segment(blocks.last_segment() - first - split);
    RowState state;
    float o[kOwnColumns / 8][4] = {}, shrink[2];
    for (int n = own.high; n >= own.low; --n) {
      {
        const std::uint32_t keys = wait(warp / 2);
        float x[kOwnKeys / 8][4] = {};
#pragma unroll
        for (int s = 0; s < kDim / 16; ++s) {
          std::uint32_t a[4];
          load_rows(a, query_chunk<kDim>(query, lane % 16, 2 * s + lane / 16));
#pragma unroll
          for (int t = 0; t < kOwnKeys / 16; ++t) {
            const int row = warp % 2 * kOwnKeys + 16 * t + lane / 16 * 8 + lane % 8;
            std::uint32_t b[4];
            load_rows(b, chunk_address<kDim>(keys, row, 2 * s + lane / 8 % 2));
            mma<E>(x[2 * t], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma<E>(x[2 * t + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
          }
        }
        release();
        release();
#pragma unroll
        for (int t = 0; t < kOwnKeys / 8; ++t)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            *reinterpret_cast<float2*>(fragments + 8 * i * S::kScoreRow + warp * kOwnKeys +
                                       8 * t) = {x[t][2 * i], x[t][2 * i + 1]};
      }
      named_sync(1, kConsumers);
      float s[kKeys / 2];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 x =
              *reinterpret_cast<const float2*>(fragments + 8 * i * S::kScoreRow + 8 * j);
          s[4 * j + 2 * i] = x.x;
          s[4 * j + 2 * i + 1] = x.y;
        }
      named_sync(1, kConsumers);
      mask_scores(s, position[0], position[1], n * kKeys + 2 * q, window);
      exponentiate(s, state, scale_log2, shrink);
      std::uint32_t weights[kKeys / 16][4];
      as_operand<E, kKeys>(s, weights);
#pragma unroll
      for (int c = 0; c < kOwnColumns / 8; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[c][e] = __fmul_rn(o[c][e], shrink[e / 2]);
      const bool whole = (n + 1) * kKeys <= end;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t at = wait(0);
#pragma unroll
        for (int t = 0; t < kHalf / 16; ++t) {
          const std::uint32_t(&a)[4] = weights[half * (kHalf / 16) + t];
#pragma unroll
          for (int c = 0; c < kOwnColumns / 16; ++c) {
            const int row = 16 * t + lane / 8 % 2 * 8 + lane % 8;
            std::uint32_t b[4];
            load_columns(
                b, chunk_address<kDim>(at, row, warp * (kOwnColumns / 8) + 2 * c + lane / 16));
            if (!whole) {  // nobody wrote what lies beyond: it may be NaN, and 0 * NaN is NaN
              const int present = end - (n * kKeys + half * kHalf + 16 * t + 2 * q);
#pragma unroll
              for (int j = 0; j < 4; ++j) b[j] = first_of_pair(b[j], present - j % 2 * 8);
            }
            mma<E>(o[2 * c], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma<E>(o[2 * c + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
          }
        }
        release();
      }
    }
    named_sync(1, kConsumers);  // all have read the last scores
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = g + 8 * i;
#pragma unroll
      for (int c = 0; c < kOwnColumns / 8; ++c)
        *reinterpret_cast<float2*>(fragments + 8 * i * S::kScoreRow + warp * kOwnColumns +
                                   8 * c) = {o[c][2 * i], o[c][2 * i + 1]};
      if (warp == 0) exchange.sum[pair][q] = state.sum[i];
      if (warp == 0 && q == 0) exchange.top[pair] = state.top[i];
    }
    cluster_sync(splits);
    named_sync(1, kConsumers);
    const int count = min(splits, blocks.segments() - first);
    const auto of = [&](auto* own_part, int s) {
      return splits > 1 ? cg::this_cluster().map_shared_rank(own_part, static_cast<unsigned>(s))
                        : own_part;
    };
    if (thread < 4 * kPairs)
      for (int s = 0; s < count; ++s) {
        const Exchange& next = *of(&exchange, s);
        const SegmentFactors f = add_segment(top, sum, next.top[thread / 4],
                                             next.sum[thread / 4][thread % 4], scale_log2);
        if (thread % 4 == 0) exchange.factors[s][thread / 4] = f;
      }
    named_sync(1, kConsumers);
    for (int s = 0; s < count; ++s) {
      const float* next = of(scores, s);
#pragma unroll 4
      for (int e = first_value; e < values_count; e += stride)
        sums[e] = add_values(sums[e], next[e / kDim * S::kScoreRow + e % kDim],
                             exchange.factors[s][e / kDim]);
    }
    cluster_sync(splits);  // all have read the segments
    named_sync(1, kConsumers);
  }
  if (thread < 4 * kPairs) {
    const float inverse = 1.0f / row_sum(sum);
    if (thread % 4 == 0) exchange.inverse[thread / 4] = inverse;
  }
  named_sync(1, kConsumers);
  for (int e = first_value; e < values_count; e += stride) {
    const int pair = e / kDim;
    static_cast<E*>(
        v.out)[v.out_at(tile.row + pair / heads, first_head + pair % heads) + e % kDim] =
        store_as<E>(sums[e] * exchange.inverse[pair]);
  }
}

/// Block (split, tile of rows, kv head and part of its group); a tile's splits are one cluster.
template <class E, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    ordered_kernel(const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const PagedView v) {
#ifdef TANDEM_HOPPER
  extern __shared__ std::uint8_t dynamic[];
  __shared__ Barriers bars;
  const std::uint32_t base = shared_address(dynamic), shared = (base + 1023) & ~1023u;
  auto* scores = reinterpret_cast<float*>(dynamic + (shared - base) + Shared<kDim>::kScores);
  auto* sums = reinterpret_cast<float*>(dynamic + (shared - base) + Shared<kDim>::kSums);
  auto& exchange =
      *reinterpret_cast<Exchange*>(dynamic + (shared - base) + Shared<kDim>::kExchange);
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
  const int parts = (v.group + kPairs - 1) / kPairs;
  const int kv_head = static_cast<int>(blockIdx.z) / parts;
  const int head0 = static_cast<int>(blockIdx.z) % parts * kPairs;
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x);
  const int heads = min(kPairs, v.group - head0);
  // Every part of a group walks tiles of as many rows as the first part's. Offsets and lengths come
  // by an upload, behind which no kernel starts early: they may be read now.
  const QueryTile tile =
      find_query_tile(v, kPairs / min(kPairs, v.group), static_cast<int>(blockIdx.y));
  wait_for_inputs();
  if (head0 == 0)
    zero_inert_rows<E>(v, kv_head, static_cast<int>(blockIdx.y) * splits + split,
                       static_cast<int>(gridDim.y) * splits);
  if (tile.rows == 0) return;
  if (threadIdx.x >= kConsumers)
    produce<kDim>(v, &k_map, &v_map, tile, kv_head, split, splits, shared, bars);
  else
    consume<E, kDim>(v, tile, kv_head * v.group + head0, heads, split, splits, shared, scores, sums,
                     exchange, bars);
#endif
}

unsigned head_parts(const PagedView& v) {
  return static_cast<unsigned>(v.kv_heads * ((v.group + kPairs - 1) / kPairs));
}

template <class E, int kDim>
void launch(cudaStream_t stream, const PagedView& v, int splits) {
  constexpr auto kKernel = ordered_kernel<E, kDim>;
  constexpr int kBytes = Shared<kDim>::kBytes;
  TANDEM_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(splits), query_tiles_max(v, paged_ordered_rows(v)), head_parts(v));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  const int rows = std::min(v.block_size, kHalf);
  const auto map = [&](const void* data) {
    return make_tensor_map(Element<E>::kDType, data, v.cache_rows, kDim, rows);
  };
  check_cuda(cudaLaunchKernelEx(&config, kKernel, map(v.k), map(v.v), v), "paged ordered_kernel");
}

}  // namespace
}  // namespace ordered

int paged_ordered_rows(const PagedView& v) {
  return ordered::kPairs / std::min(ordered::kPairs, v.group);
}

// As long as blocks do not fill the device, a segment each.
int paged_ordered_splits(const PagedView& v, std::int64_t kv_len_max,
                         const DeviceProfile& profile) {
  const std::int64_t segments = (kv_len_max + kSegmentKeys - 1) / kSegmentKeys;
  const std::int64_t blocks =
      std::int64_t{query_tiles_max(v, paged_ordered_rows(v))} * ordered::head_parts(v);
  int splits = 1;
  while (splits < ordered::kSplitsMax && splits < segments &&
         splits * blocks < 2 * profile.sm_count)
    splits *= 2;
  return splits;
}

void paged_ordered(cudaStream_t stream, const PagedView& v, DType dtype, int splits) {
  with_element(dtype, [&]<class E>(E) {
    v.dim == 64 ? ordered::launch<E, 64>(stream, v, splits)
                : ordered::launch<E, 128>(stream, v, splits);
  });
}

}  // namespace tandem::kernels::cuda
