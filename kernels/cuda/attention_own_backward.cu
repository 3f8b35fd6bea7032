// Backward attention on Hopper in two kernels, neither of which adds into memory: one walks the
// keys of a tile of queries and owns dq, the other walks the queries of a tile of keys, over all
// query heads that share it, and owns dk and dv. Scores are computed twice; in exchange nothing
// depends on the order in which blocks finish and there is no f32 copy of dq.
#include "kernels/cuda/attention_own.cuh"

#include <cmath>

namespace tandem::kernels::cuda {
namespace own {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

struct BackwardParams {
  const RowTile* tiles;
  const std::int32_t* tile_count;
  const float *lse, *delta;  ///< [T, H]
  void* dqkv;
  int heads, kv_heads, window;
  float scale;

  __device__ int width(int dim) const { return (heads + 2 * kv_heads) * dim; }
};

// -- dq
// ---------------------------------------------------------------------------------------------

template <int kDim>
struct DqShape {
  static constexpr int kKeys = 128, kStages = kDim == 128 ? 2 : 4;
  using Q = SharedTile<kTileRows, kDim>;
  using K = SharedTile<kKeys, kDim>;
  static constexpr int kDout = Q::kBytes, kK = 2 * Q::kBytes, kV = kK + kStages * K::kBytes;
  static constexpr int kBytes = kV + kStages * K::kBytes + 1024;
};
template <int kStages>
struct DqBarriers {
  std::uint64_t q_full, q_empty, full[kStages], empty[kStages];
};

template <int kDim>
__device__ void dq_produce(const CUtensorMap* qkv_map, const CUtensorMap* dout_map,
                           const BackwardParams& p, std::uint32_t shared,
                           DqBarriers<DqShape<kDim>::kStages>& bars) {
  using S = DqShape<kDim>;
  const int items = *p.tile_count * p.heads;
  Ring<S::kStages> ring;
  std::uint32_t q_phase = 0;
  for (int round = 0; round * static_cast<int>(gridDim.x) < items; ++round) {
    const int item = item_of(round);
    if (item >= items) continue;
    const RowTile tile = load_tile_entry(p.tiles, item / p.heads);
    const int head = item % p.heads, kv_head = head / (p.heads / p.kv_heads);
    const int k_column = (p.heads + kv_head) * kDim, v_column = k_column + p.kv_heads * kDim;
    const int row0 = tile.sequence + tile.begin;
    barrier_wait(&bars.q_empty, q_phase ^ 1);
    q_phase ^= 1;
    barrier_expect(&bars.q_full, 2 * S::Q::kBytes);
    copy_tile<kTileRows, kDim>(shared, qkv_map, &bars.q_full, head * kDim, row0);
    copy_tile<kTileRows, kDim>(shared + S::kDout, dout_map, &bars.q_full, head * kDim, row0);
    const int low = p.window == 0 ? 0 : max(0, tile.begin - p.window + 1) / S::kKeys;
    for (int n = (tile.begin + tile.rows - 1) / S::kKeys; n >= low; --n) {
      const int row = tile.sequence + n * S::kKeys, s = ring.stage;
      barrier_wait(&bars.empty[s], ring.phase ^ 1);
      barrier_expect(&bars.full[s], 2 * S::K::kBytes);
      copy_tile<S::kKeys, kDim>(shared + S::kK + s * S::K::kBytes, qkv_map, &bars.full[s], k_column,
                                row);
      copy_tile<S::kKeys, kDim>(shared + S::kV + s * S::K::kBytes, qkv_map, &bars.full[s], v_column,
                                row);
      ring.next();
    }
  }
}

template <class E, int kDim>
__device__ void dq_consume(const BackwardParams& p, std::uint32_t shared,
                           DqBarriers<DqShape<kDim>::kStages>& bars) {
  using S = DqShape<kDim>;
  const int group = warpgroup() - 1;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = group * 64 + static_cast<int>(threadIdx.x % 128) / 32 * 16 + lane / 4;
  const float scale_log2 = p.scale * kLog2E;
  const std::uint32_t q = shared + group * 64 * 128, dout = q + S::kDout;
  const int items = *p.tile_count * p.heads;
  Ring<S::kStages> ring;
  std::uint32_t q_phase = 0;
  for (int round = 0; round * static_cast<int>(gridDim.x) < items; ++round) {
    const int item = item_of(round);
    if (item >= items) continue;
    const RowTile tile = load_tile_entry(p.tiles, item / p.heads);
    const int head = item % p.heads;
    const int first = tile.begin + group * 64, query = tile.begin + row;
    float offset[2], delta[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool lives = row + 8 * h < tile.rows;
      const std::int64_t at =
          static_cast<std::int64_t>(tile.sequence + query + 8 * h) * p.heads + head;
      offset[h] = lives ? p.lse[at] * kLog2E : INFINITY;
      delta[h] = lives ? p.delta[at] : 0.0f;
    }
    float dq[kDim / 2];
    const int low = p.window == 0 ? 0 : max(0, tile.begin - p.window + 1) / S::kKeys;
    const int high = (tile.begin + tile.rows - 1) / S::kKeys;
    barrier_wait(&bars.q_full, q_phase);
    q_phase ^= 1;
    for (int n = high; n >= low; --n) {
      const std::uint32_t k = shared + S::kK + ring.stage * S::K::kBytes,
                          v = shared + S::kV + ring.stage * S::K::kBytes;
      barrier_wait(&bars.full[ring.stage], ring.phase);
      if ((n + 1) * S::kKeys > tile.length) {
        zero_rows<S::kKeys, kDim>(k, tile.length - n * S::kKeys);
        zeroed(group);
      }
      float s[S::kKeys / 2], dp[S::kKeys / 2];
      wgmma_fence();
      product_rows<E, kDim, S::Q::kPanel, S::K::kPanel>(s, q, k);
      wgmma_commit();
      product_rows<E, kDim, S::Q::kPanel, S::K::kPanel>(dp, dout, v);
      wgmma_commit();
      const bool partly = (n + 1) * S::kKeys - 1 > first ||
                          (p.window != 0 && first + 63 - n * S::kKeys >= p.window);
      wgmma_wait<1>();
      pin(s);
      if (partly) {
#pragma unroll
        for (int i = 0; i < S::kKeys / 2; ++i) {
          const int at = query + i % 4 / 2 * 8,
                    key = n * S::kKeys + 2 * (lane % 4) + i / 4 * 8 + i % 2;
          if (key > at || (p.window != 0 && at - key >= p.window)) s[i] = -INFINITY;
        }
      }
#pragma unroll
      for (int i = 0; i < S::kKeys / 2; ++i)
        s[i] = exp2_fast(fmaf(s[i], scale_log2, -offset[i % 4 / 2]));
      wgmma_wait<0>();
      pin(dp);
      if (n == low) {
        __syncwarp();
        if (lane == 0) barrier_arrive(&bars.q_empty);
      }
#pragma unroll
      for (int i = 0; i < S::kKeys / 2; ++i) s[i] *= dp[i] - delta[i % 4 / 2];
      if (partly) {  // dp may be NaN where the keys are not ours
#pragma unroll
        for (int i = 0; i < S::kKeys / 2; ++i) {
          const int at = query + i % 4 / 2 * 8,
                    key = n * S::kKeys + 2 * (lane % 4) + i / 4 * 8 + i % 2;
          if (key > at) s[i] = 0.0f;
        }
      }
      std::uint32_t ds[S::kKeys / 16][4];
      as_operand<E, S::kKeys>(s, ds);
      wgmma_fence();
      product_columns<E, S::kKeys, S::K::kPanel>(dq, ds, k, n < high);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dq);
      __syncwarp();
      if (lane == 0) barrier_arrive(&bars.empty[ring.stage]);
      ring.next();
    }
    const std::int64_t stride = p.width(kDim);
    store_rows<kDim>(dq, p.scale, p.scale,
                     static_cast<E*>(p.dqkv) + (tile.sequence + first) * stride + head * kDim,
                     stride, tile.rows - group * 64);
  }
}

template <class E, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    dq_kernel(const __grid_constant__ CUtensorMap qkv_map,
              const __grid_constant__ CUtensorMap dout_map, const BackwardParams p) {
#ifdef TANDEM_HOPPER
  extern __shared__ std::uint8_t dynamic[];
  __shared__ DqBarriers<DqShape<kDim>::kStages> bars;
  const std::uint32_t shared = (shared_address(dynamic) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    prefetch_map(&qkv_map);
    prefetch_map(&dout_map);
    barrier_init(&bars.q_full, 1);
    barrier_init(&bars.q_empty, kConsumerWarps);
    for (int s = 0; s < DqShape<kDim>::kStages; ++s) {
      barrier_init(&bars.full[s], 1);
      barrier_init(&bars.empty[s], kConsumerWarps);
    }
    barrier_init_done();
  }
  __syncthreads();
  wait_for_inputs();
  if (warpgroup() == 0) {
    registers_down<kProducerRegisters>();
    if (threadIdx.x == 0) dq_produce<kDim>(&qkv_map, &dout_map, p, shared, bars);
  } else {
    registers_up<kConsumerRegisters>();
    dq_consume<E, kDim>(p, shared, bars);
  }
#endif
}

// -- dk and dv
// --------------------------------------------------------------------------------------

template <int kDim>
struct DkvShape {
  static constexpr int kQueries = 64, kStages = 3;
  using K = SharedTile<kTileRows, kDim>;
  using Q = SharedTile<kQueries, kDim>;
  static constexpr int kV = K::kBytes, kQ = 2 * K::kBytes, kDout = kQ + kStages * Q::kBytes;
  static constexpr int kBytes = kDout + kStages * Q::kBytes + 1024;
};
template <int kQueries, int kStages>
struct DkvBarriers {
  std::uint64_t kv_full, kv_empty, full[kStages], empty[kStages];
  /// Per query: its lse in base 2 and its delta.
  alignas(16) float2 statistics[kStages][kQueries];
};
template <int kDim>
using DkvBarriersOf = DkvBarriers<DkvShape<kDim>::kQueries, DkvShape<kDim>::kStages>;

/// Blocks of queries [first, last) that see some key of the tile.
__device__ inline int2 query_blocks(const RowTile& tile, int window, int queries) {
  const int end = window == 0 ? tile.length : min(tile.length, tile.begin + tile.rows - 1 + window);
  return make_int2(tile.begin / queries, (end + queries - 1) / queries);
}

/// By one whole warp.
template <int kDim>
__device__ void dkv_produce(const CUtensorMap* kv_map, const CUtensorMap* q_map,
                            const CUtensorMap* dout_map, const BackwardParams& p,
                            std::uint32_t shared, DkvBarriersOf<kDim>& bars) {
  using S = DkvShape<kDim>;
  const int lane = static_cast<int>(threadIdx.x);
  const int items = *p.tile_count * p.kv_heads, group = p.heads / p.kv_heads;
  Ring<S::kStages> ring;
  std::uint32_t kv_phase = 0;
  for (int round = 0; round * static_cast<int>(gridDim.x) < items; ++round) {
    const int item = item_of(round);
    if (item >= items) continue;
    const RowTile tile = load_tile_entry(p.tiles, item / p.kv_heads);
    const int kv_head = item % p.kv_heads;
    const int k_column = (p.heads + kv_head) * kDim, v_column = k_column + p.kv_heads * kDim;
    barrier_wait(&bars.kv_empty, kv_phase ^ 1);
    kv_phase ^= 1;
    if (lane == 0) {
      const int row0 = tile.sequence + tile.begin;
      barrier_expect(&bars.kv_full, 2 * S::K::kBytes);
      copy_tile<kTileRows, kDim>(shared, kv_map, &bars.kv_full, k_column, row0);
      copy_tile<kTileRows, kDim>(shared + S::kV, kv_map, &bars.kv_full, v_column, row0);
    }
    const int2 blocks = query_blocks(tile, p.window, S::kQueries);
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int b = blocks.x; b < blocks.y; ++b) {
        const int row = tile.sequence + b * S::kQueries, s = ring.stage;
        barrier_wait(&bars.empty[s], ring.phase ^ 1);
        if (lane == 0) {
          barrier_expect(&bars.full[s], 2 * S::Q::kBytes);
          copy_tile<S::kQueries, kDim>(shared + S::kQ + s * S::Q::kBytes, q_map, &bars.full[s],
                                       head * kDim, row);
          copy_tile<S::kQueries, kDim>(shared + S::kDout + s * S::Q::kBytes, dout_map,
                                       &bars.full[s], head * kDim, row);
        }
#pragma unroll
        for (int r = lane; r < S::kQueries; r += 32) {
          const bool lives = b * S::kQueries + r < tile.length;
          const std::int64_t at = static_cast<std::int64_t>(row + r) * p.heads + head;
          bars.statistics[s][r] =
              lives ? make_float2(p.lse[at] * kLog2E, p.delta[at]) : make_float2(INFINITY, 0.0f);
        }
        barrier_arrive(&bars.full[s]);
        ring.next();
      }
  }
}

template <class E, int kDim>
__device__ void dkv_consume(const BackwardParams& p, std::uint32_t shared,
                            DkvBarriersOf<kDim>& bars) {
  using S = DkvShape<kDim>;
  constexpr int kCount = S::kQueries / 2;
  const int group = warpgroup() - 1;
  const int lane = static_cast<int>(threadIdx.x % 32), column = 2 * (lane % 4);
  const int row = group * 64 + static_cast<int>(threadIdx.x % 128) / 32 * 16 + lane / 4;
  const float scale_log2 = p.scale * kLog2E;
  const std::uint32_t k = shared + group * 64 * 128, v = k + S::kV;
  const int items = *p.tile_count * p.kv_heads, heads = p.heads / p.kv_heads;
  Ring<S::kStages> ring;
  std::uint32_t kv_phase = 0;
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(&bars.empty[ring.stage]);
    ring.next();
  };
  for (int round = 0; round * static_cast<int>(gridDim.x) < items; ++round) {
    const int item = item_of(round);
    if (item >= items) continue;
    const RowTile tile = load_tile_entry(p.tiles, item / p.kv_heads);
    const int kv_head = item % p.kv_heads;
    const int first = tile.begin + group * 64, key = tile.begin + row;
    const int2 blocks = query_blocks(tile, p.window, S::kQueries);
    float dk[kDim / 2], dv[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) dk[i] = dv[i] = 0.0f;
    barrier_wait(&bars.kv_full, kv_phase);
    kv_phase ^= 1;
    int next = blocks.x;
    for (int step = heads * (blocks.y - blocks.x); step > 0; --step) {
      const int query0 = next * S::kQueries;
      next = next + 1 == blocks.y ? blocks.x : next + 1;
      barrier_wait(&bars.full[ring.stage], ring.phase);
      if (query0 + S::kQueries <= first) {  // no query sees this group's keys
        release();
        continue;
      }
      const std::uint32_t q = shared + S::kQ + ring.stage * S::Q::kBytes,
                          dout = shared + S::kDout + ring.stage * S::Q::kBytes;
      if (query0 + S::kQueries > tile.length) {
        zero_rows<S::kQueries, kDim>(q, tile.length - query0);
        zero_rows<S::kQueries, kDim>(dout, tile.length - query0);
        zeroed(group);
      }
      float s[kCount], dp[kCount];
      wgmma_fence();
      product_rows<E, kDim, S::K::kPanel, S::Q::kPanel>(s, k, q);
      wgmma_commit();
      product_rows<E, kDim, S::K::kPanel, S::Q::kPanel>(dp, v, dout);
      wgmma_commit();
      const float4* statistics =
          reinterpret_cast<const float4*>(&bars.statistics[ring.stage][column]);
      float delta[kCount / 2];
      wgmma_wait<1>();
      pin(s);
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        const float4 t = statistics[4 * j];  // of columns 8j + column, + 1
        delta[2 * j] = t.y;
        delta[2 * j + 1] = t.w;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[4 * j + i] = exp2_fast(fmaf(s[4 * j + i], scale_log2, -(i % 2 == 0 ? t.x : t.z)));
      }
      if (query0 < first + 63 || (p.window != 0 && query0 + S::kQueries - 1 - first >= p.window)) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int at = query0 + column + i / 4 * 8 + i % 2, own_key = key + i % 4 / 2 * 8;
          if (own_key > at || (p.window != 0 && at - own_key >= p.window)) s[i] = 0.0f;
        }
      }
      std::uint32_t weights[S::kQueries / 16][4];
      as_operand<E, S::kQueries>(s, weights);
      wgmma_fence();
      product_columns<E, S::kQueries, S::Q::kPanel>(dv, weights, dout, 1);
      wgmma_commit();
      wgmma_wait<1>();
      pin(dp);
#pragma unroll
      for (int i = 0; i < kCount; ++i) s[i] *= dp[i] - delta[i / 4 * 2 + i % 2];
      std::uint32_t ds[S::kQueries / 16][4];
      as_operand<E, S::kQueries>(s, ds);
      wgmma_fence();
      product_columns<E, S::kQueries, S::Q::kPanel>(dk, ds, q, 1);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dk);
      pin(dv);
      release();
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&bars.kv_empty);
    const std::int64_t stride = p.width(kDim);
    E* to = static_cast<E*>(p.dqkv) + (tile.sequence + first) * stride + (p.heads + kv_head) * kDim;
    store_rows<kDim>(dk, p.scale, p.scale, to, stride, tile.rows - group * 64);
    store_rows<kDim>(dv, 1.0f, 1.0f, to + p.kv_heads * kDim, stride, tile.rows - group * 64);
  }
}

template <class E, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    dkv_kernel(const __grid_constant__ CUtensorMap kv_map,
               const __grid_constant__ CUtensorMap q_map,
               const __grid_constant__ CUtensorMap dout_map, const BackwardParams p) {
#ifdef TANDEM_HOPPER
  extern __shared__ std::uint8_t dynamic[];
  __shared__ DkvBarriersOf<kDim> bars;
  const std::uint32_t shared = (shared_address(dynamic) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    barrier_init(&bars.kv_full, 1);
    barrier_init(&bars.kv_empty, kConsumerWarps);
    for (int s = 0; s < DkvShape<kDim>::kStages; ++s) {
      barrier_init(&bars.full[s], 1 + 32);
      barrier_init(&bars.empty[s], kConsumerWarps);
    }
    barrier_init_done();
  }
  __syncthreads();
  wait_for_inputs();
  if (warpgroup() == 0) {
    registers_down<kProducerRegisters>();
    if (threadIdx.x < 32) dkv_produce<kDim>(&kv_map, &q_map, &dout_map, p, shared, bars);
  } else {
    registers_up<kConsumerRegisters>();
    dkv_consume<E, kDim>(p, shared, bars);
  }
#endif
}

template <class E, int kDim>
void backward(const Queue& queue, const AttentionBackwardArgs& a, BackwardParams p,
              const RowTile* by_prefix, const RowTile* by_suffix) {
  const auto map = [](const Tensor& x, int box) {
    return make_tensor_map(Element<E>::kDType, x.data, x.dim(0), x.dim(1), box);
  };
  const CUtensorMap qkv = map(a.qkv, kTileRows), dout = map(a.dout, kTileRows);
  static_assert(DqShape<kDim>::kKeys == kTileRows, "one map serves both");
  p.tiles = by_prefix;
  launch(dq_kernel<E, kDim>, DqShape<kDim>::kBytes, queue, "attention dq", qkv, dout, p);
  constexpr int kQueries = DkvShape<kDim>::kQueries;
  p.tiles = by_suffix;
  launch(dkv_kernel<E, kDim>, DkvShape<kDim>::kBytes, queue, "attention dk dv", qkv,
         map(a.qkv, kQueries), map(a.dout, kQueries), p);
}

}  // namespace
}  // namespace own

void own_attention_backward(const Queue& queue, const AttentionBackwardArgs& a,
                            const AttentionBackwardLayout& layout, char* scratch) {
  auto* by_prefix = reinterpret_cast<RowTile*>(scratch + layout.query_tiles);
  auto* by_suffix = reinterpret_cast<RowTile*>(scratch + layout.key_tiles);
  auto* count = reinterpret_cast<std::int32_t*>(scratch + layout.count);
  auto* delta = reinterpret_cast<float*>(scratch + layout.delta);
  own::Prepare prepare{};
  prepare.offsets = static_cast<const std::int32_t*>(a.seq_offsets.data);
  prepare.sequences = static_cast<int>(a.seq_offsets.dim(0) - 1);
  prepare.by_prefix = by_prefix;
  prepare.by_suffix = by_suffix;
  prepare.count = count;
  prepare.tokens = a.qkv.dim(0);
  prepare.zero0 = static_cast<char*>(a.dqkv.data);
  prepare.zero0_bytes = a.dqkv.dim(1) * dtype_bytes(a.dqkv.dtype);
  prepare.delta_rows = a.qkv.dim(0) * a.spec.heads;
  prepare.lanes = static_cast<int>(a.spec.head_dim / 8);
  prepare.dtype = a.qkv.dtype;
  prepare.dout = a.dout.data;
  prepare.out = a.out.data;
  prepare.delta = delta;
  own::prepare(queue, prepare, a.seq_len_max);
  own::BackwardParams p{};
  p.tile_count = count;
  p.lse = static_cast<const float*>(a.lse.data);
  p.delta = delta;
  p.dqkv = a.dqkv.data;
  p.heads = static_cast<int>(a.spec.heads);
  p.kv_heads = static_cast<int>(a.spec.kv_heads);
  p.window = static_cast<int>(std::min<std::int64_t>(a.spec.window, 1 << 30));
  p.scale = a.spec.scale;
  with_element(a.qkv.dtype, [&]<class E>(E) {
    if (a.spec.head_dim == 128)
      own::backward<E, 128>(queue, a, p, by_prefix, by_suffix);
    else
      own::backward<E, 64>(queue, a, p, by_prefix, by_suffix);
  });
}

}  // namespace tandem::kernels::cuda
