// Forward attention on Hopper, as FlashAttention-3 orders it: while a block of scores is being
// exponentiated, the tensor cores work on the next scores and on the last block's values, and the
// two multiplying warpgroups take turns.
#include "kernels/cuda/attention_own.cuh"
#include "kernels/cuda/attention_softmax.cuh"

#include <cmath>

namespace tandem::kernels::cuda {
namespace own {
namespace {

struct ForwardParams {
  const RowTile* tiles;
  const std::int32_t* tile_count;
  void* out;
  float* lse;  ///< may be null
  int heads, kv_heads, window;
  float scale;
  /// Paged: keys of sequence s lie in the cache's blocks tables[s][0 .. blocks_max).
  const std::int32_t* tables;
  int blocks_max, block_size;
};
/// Where queries, keys and values come from; packed: all from q's matrix.
struct ForwardMaps {
  CUtensorMap q, k, v;
};

constexpr int kKeys = 128;  ///< of one block
constexpr int kStages = 2;
/// Named barriers 1 and 2 are zeroed()'s.
constexpr int kTurn = 3;

template <int kDim>
struct ForwardShared {
  using Q = SharedTile<kTileRows, kDim>;
  using K = SharedTile<kKeys, kDim>;
  static constexpr int kK = Q::kBytes, kV = kK + kStages * K::kBytes;
  static constexpr int kSums = kV + kStages * K::kBytes;  ///< f32 [rows, kDim]: see Segments
  static constexpr int kBytes = kSums + 1024, kBytesSegments = kBytes + kTileRows * kDim * 4;
};

struct ForwardBarriers {
  std::uint64_t q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages],
      v_empty[kStages];
};

/// Blocks of keys [low, high] that a tile of queries sees.
struct KeyBlocks {
  int low, high;
};
__device__ inline KeyBlocks key_blocks(const RowTile& tile, int window, int keys) {
  return {window == 0 ? 0 : max(0, tile.begin - window + 1) / keys,
          (tile.begin + tile.rows - 1) / keys};
}

/// One block of keys or values of a sequence as the copy engine's lanes bring it: by one lane from
/// the packed rows, or box by box, a lane each, from the cache.
template <int kDim, bool kPaged>
class KeySource {
 public:
  using Tile = SharedTile<kKeys, kDim>;
  __device__ KeySource(const ForwardParams& p, const RowTile& tile, int sequence, int kv_head)
      : p_(p),
        tile_(tile),
        table_(kPaged ? p.tables + static_cast<std::int64_t>(sequence) * p.blocks_max : nullptr),
        kv_head_(kv_head) {}
  /// Block n comes next.
  __device__ void seek(int n) {
    n_ = n;
    if (!kPaged) return;
    const int lane = static_cast<int>(threadIdx.x);
    const int box = lane / Tile::kPanels, key = n * kKeys + box * p_.block_size;
    present_ = box * p_.block_size < kKeys && key < tile_.length;
    if (present_) row_ = (table_[key / p_.block_size] * p_.kv_heads + kv_head_) * p_.block_size;
    bytes_ = __popc(__ballot_sync(0xffffffffu, present_)) * p_.block_size * 128;
  }
  /// `column`: of the packed rows.
  __device__ void copy(std::uint32_t to, const CUtensorMap* map, std::uint64_t* barrier,
                       int column) const {
    const int lane = static_cast<int>(threadIdx.x);
    if (!kPaged) {
      barrier_expect(barrier, Tile::kBytes);
      copy_tile<kKeys, kDim>(to, map, barrier, column, tile_.sequence + n_ * kKeys);
      return;
    }
    if (lane == 0) barrier_expect(barrier, bytes_);
    __syncwarp();
    const int panel = lane % Tile::kPanels, box = lane / Tile::kPanels;
    if (present_)
      copy_box(to + panel * Tile::kPanel + box * p_.block_size * 128, map, barrier, panel * 64,
               row_);
  }

 private:
  const ForwardParams& p_;
  const RowTile tile_;
  const std::int32_t* table_;
  const int kv_head_;
  int n_ = 0, row_ = 0, bytes_ = 0;
  bool present_ = false;
};

/// Called by one lane, paged by a whole warp.
template <int kDim, bool kPaged>
__device__ void produce(const ForwardMaps& maps, const ForwardParams& p, std::uint32_t shared,
                        ForwardBarriers& bars) {
  using S = ForwardShared<kDim>;
  const int items = *p.tile_count * p.heads;
  Ring<kStages> ring;
  std::uint32_t q_phase = 0;
  for (int round = 0; round * static_cast<int>(gridDim.x) < items; ++round) {
    const int item = item_of(round);
    if (item >= items) continue;
    const RowTile tile = load_tile_entry(p.tiles, item / p.heads);
    const int head = item % p.heads, kv_head = head / (p.heads / p.kv_heads);
    const int k_column = (p.heads + kv_head) * kDim, v_column = k_column + p.kv_heads * kDim;
    KeySource<kDim, kPaged> keys(p, tile, load_tile_sequence(p.tiles, item / p.heads), kv_head);
    barrier_wait(&bars.q_empty, q_phase ^ 1);
    q_phase ^= 1;
    if (!kPaged || threadIdx.x == 0) {
      barrier_expect(&bars.q_full, S::Q::kBytes);
      copy_tile<kTileRows, kDim>(shared, &maps.q, &bars.q_full, head * kDim,
                                 tile.sequence + tile.begin);
    }
    const KeyBlocks blocks = key_blocks(tile, p.window, kKeys);
    for (int n = blocks.high; n >= blocks.low; --n) {
      const int s = ring.stage;
      keys.seek(n);
      barrier_wait(&bars.k_empty[s], ring.phase ^ 1);
      keys.copy(shared + S::kK + s * S::K::kBytes, kPaged ? &maps.k : &maps.q, &bars.k_full[s],
                k_column);
      barrier_wait(&bars.v_empty[s], ring.phase ^ 1);
      keys.copy(shared + S::kV + s * S::K::kBytes, kPaged ? &maps.v : &maps.q, &bars.v_full[s],
                v_column);
      ring.next();
    }
  }
}

template <int kDim>
__device__ inline void rescale(float (&o)[kDim / 2], const float (&shrink)[2]) {
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) o[4 * j + i] *= shrink[i / 2];
}

/// Block n is the first, from above, of a segment.
__device__ inline bool begins_segment(int n) {
  return (n + 1) % (kSegmentKeys / kKeys) == 0;
}

/// A multiplying thread's sums over the segments of keys above the one it is at: its own values in
/// shared memory, which no other thread touches.
template <int kDim>
class Segments {
 public:
  /// `sums`: the block's; see ForwardShared.
  __device__ explicit Segments(float4* sums) : at_(sums + threadIdx.x - 128) {}
  __device__ void clear() { any_ = false; }
  /// Adds what the next segment down has.
  __device__ void add(const RowState& state, const float (&o)[kDim / 2], float scale_log2) {
    if (!any_) {
      state_ = state;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
        at_[j * kConsumers] = make_float4(o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]);
      any_ = true;
      return;
    }
    const SegmentFactors f0 = factors(state, 0, scale_log2), f1 = factors(state, 1, scale_log2);
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      float4 x = at_[j * kConsumers];
      x.x = add_values(x.x, o[4 * j], f0);
      x.y = add_values(x.y, o[4 * j + 1], f0);
      x.z = add_values(x.z, o[4 * j + 2], f1);
      x.w = add_values(x.w, o[4 * j + 3], f1);
      at_[j * kConsumers] = x;
    }
  }
  /// The lowest segment's state and values become those of all.
  __device__ void finish(RowState& state, float (&o)[kDim / 2], float scale_log2) {
    if (!any_) return;
    add(state, o, scale_log2);
    state = state_;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const float4 x = at_[j * kConsumers];
      o[4 * j] = x.x;
      o[4 * j + 1] = x.y;
      o[4 * j + 2] = x.z;
      o[4 * j + 3] = x.w;
    }
  }

 private:
  static constexpr int kConsumers = 32 * kConsumerWarps;
  __device__ SegmentFactors factors(const RowState& next, int h, float scale_log2) {
    return add_segment(state_.top[h], state_.sum[h], next.top[h], next.sum[h], scale_log2);
  }
  float4* const at_;
  RowState state_;
  bool any_ = false;
};

template <class E, int kDim, bool kTurns, bool kSegments>
__device__ void consume(const ForwardParams& p, std::uint32_t shared, float4* sums,
                        ForwardBarriers& bars) {
  using S = ForwardShared<kDim>;
  const int group = warpgroup() - 1;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = group * 64 + static_cast<int>(threadIdx.x % 128) / 32 * 16 + lane / 4;
  const int column = 2 * (lane % 4);
  const float scale_log2 = p.scale * 1.44269504088896340736f;
  const std::uint32_t q = shared + group * 64 * 128;
  const int items = *p.tile_count * p.heads;
  const auto release = [&](std::uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  };
  Ring<kStages> k_ring, v_ring;
  Segments<kDim> segments(sums);
  std::uint32_t q_phase = 0;
  if (kTurns && group == 1) named_arrive(kTurn, 256);
  for (int round = 0; round * static_cast<int>(gridDim.x) < items; ++round) {
    const int item = item_of(round);
    if (item >= items) continue;
    const RowTile tile = load_tile_entry(p.tiles, item / p.heads);
    const int head = item % p.heads;
    const KeyBlocks blocks = key_blocks(tile, p.window, kKeys);
    const int query = tile.begin + row;
    // Some row of the group does not see some key of block n.
    const auto partly = [&](int n) {
      const int first = tile.begin + group * 64;
      return (n + 1) * kKeys - 1 > first || (p.window != 0 && first + 63 - n * kKeys >= p.window);
    };
    const auto scores = [&](float(&s)[kKeys / 2]) {
      product_rows<E, kDim, S::Q::kPanel, S::K::kPanel>(
          s, q, shared + S::kK + k_ring.stage * S::K::kBytes);
      wgmma_commit();
    };
    float o[kDim / 2], shrink[2];
    RowState state;
    if (kSegments) segments.clear();
    // Whether block n's values are added to those of the block above.
    const auto goes_on = [&](int n) {
      return n < blocks.high && !(kSegments && begins_segment(n));
    };
    std::uint32_t weights[kKeys / 16][4];
    const auto values = [&](int n, bool accumulate) {
      const std::uint32_t v = shared + S::kV + v_ring.stage * S::K::kBytes;
      barrier_wait(&bars.v_full[v_ring.stage], v_ring.phase);
      if ((n + 1) * kKeys > tile.length) {
        zero_rows<kKeys, kDim>(v, tile.length - n * kKeys);
        zeroed(group);
      }
      wgmma_fence();
      product_columns<E, kKeys, S::K::kPanel>(o, weights, v, accumulate);
      wgmma_commit();
    };

    barrier_wait(&bars.q_full, q_phase);
    q_phase ^= 1;
    {
      float s[kKeys / 2];
      barrier_wait(&bars.k_full[k_ring.stage], k_ring.phase);
      wgmma_fence();
      scores(s);
      wgmma_wait<0>();
      pin(s);
      release(&bars.k_empty[k_ring.stage]);
      k_ring.next();
      if (partly(blocks.high))
        mask_scores(s, query, query + 8, blocks.high * kKeys + column, p.window);
      exponentiate(s, state, scale_log2, shrink);
      as_operand<E, kKeys>(s, weights);
    }
    for (int n = blocks.high - 1; n >= blocks.low; --n) {
      float s[kKeys / 2];
      barrier_wait(&bars.k_full[k_ring.stage], k_ring.phase);
      if (kTurns) named_sync(kTurn + group, 256);
      wgmma_fence();
      scores(s);
      values(n + 1, goes_on(n + 1));
      if (kTurns) named_arrive(kTurn + 1 - group, 256);
      wgmma_wait<1>();
      pin(s);
      release(&bars.k_empty[k_ring.stage]);
      k_ring.next();
      if (partly(n)) mask_scores(s, query, query + 8, n * kKeys + column, p.window);
      const bool begins = kSegments && begins_segment(n);
      const RowState above = state;
      if (begins) state = {};
      exponentiate(s, state, scale_log2, shrink);
      wgmma_wait<0>();
      pin(o);
      release(&bars.v_empty[v_ring.stage]);
      v_ring.next();
      if (begins)
        segments.add(above, o, scale_log2);
      else
        rescale<kDim>(o, shrink);
      as_operand<E, kKeys>(s, weights);
    }
    release(&bars.q_empty);
    values(blocks.low, goes_on(blocks.low));
    wgmma_wait<0>();
    pin(o);
    release(&bars.v_empty[v_ring.stage]);
    v_ring.next();
    if (kSegments) segments.finish(state, o, scale_log2);

    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = row_sum(state.sum[h]);
      inverse[h] = 1.0f / sum;
      const int r = row + 8 * h;
      if (p.lse != nullptr && lane % 4 == 0 && r < tile.rows)
        p.lse[static_cast<std::int64_t>(tile.sequence + tile.begin + r) * p.heads + head] =
            state.top[h] * p.scale + logf(sum);
    }
    const std::int64_t stride = std::int64_t{p.heads} * kDim;
    store_rows<kDim>(
        o, inverse[0], inverse[1],
        static_cast<E*>(p.out) + (tile.sequence + tile.begin + group * 64) * stride + head * kDim,
        stride, tile.rows - group * 64);
  }
}

template <class E, int kDim, bool kTurns, bool kPaged, bool kSegments>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardMaps maps, const ForwardParams p) {
#ifdef TANDEM_HOPPER
  extern __shared__ std::uint8_t dynamic[];
  __shared__ ForwardBarriers bars;
  const std::uint32_t shared = (shared_address(dynamic) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    prefetch_map(&maps.q);
    barrier_init(&bars.q_full, 1);
    barrier_init(&bars.q_empty, kConsumerWarps);
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&bars.k_full[s], 1);
      barrier_init(&bars.v_full[s], 1);
      barrier_init(&bars.k_empty[s], kConsumerWarps);
      barrier_init(&bars.v_empty[s], kConsumerWarps);
    }
    barrier_init_done();
  }
  __syncthreads();
  wait_for_inputs();
  if (warpgroup() == 0) {
    registers_down<kProducerRegisters>();
    if (threadIdx.x < (kPaged ? 32 : 1)) produce<kDim, kPaged>(maps, p, shared, bars);
  } else {
    registers_up<kConsumerRegisters>();
    auto* sums = reinterpret_cast<float4*>(dynamic + (shared - shared_address(dynamic)) +
                                           ForwardShared<kDim>::kSums);
    consume<E, kDim, kTurns, kSegments>(p, shared, sums, bars);
  }
#endif
}

template <int kDim, bool kSegments>
constexpr int kSharedBytes =
    kSegments ? ForwardShared<kDim>::kBytesSegments : ForwardShared<kDim>::kBytes;

template <class E, int kDim, bool kSegments>
void forward(const Queue& queue, const AttentionArgs& a, const ForwardParams& p) {
  static_assert(kTileRows == kKeys, "one map serves both");
  const ForwardMaps maps{
      make_tensor_map(Element<E>::kDType, a.qkv.data, a.qkv.dim(0), a.qkv.dim(1), kTileRows),
      {},
      {}};
  launch(forward_kernel<E, kDim, true, false, kSegments>, kSharedBytes<kDim, kSegments>, queue,
         "attention forward", maps, p);
}

template <class E, int kDim, bool kSegments>
void paged_forward(const Queue& queue, const PagedAttentionArgs& a, const ForwardParams& p) {
  const std::int64_t rows = a.cache->k.elements() / kDim;
  const ForwardMaps maps{
      make_tensor_map(Element<E>::kDType, a.qkv.data, a.qkv.dim(0), a.qkv.dim(1), kTileRows),
      make_tensor_map(Element<E>::kDType, a.cache->k.data, rows, kDim, p.block_size),
      make_tensor_map(Element<E>::kDType, a.cache->v.data, rows, kDim, p.block_size)};
  launch(forward_kernel<E, kDim, true, true, kSegments>, kSharedBytes<kDim, kSegments>, queue,
         "paged attention forward", maps, p);
}

}  // namespace
}  // namespace own

void own_attention_forward(const Queue& queue, Numerics numerics, const AttentionArgs& a,
                           const AttentionForwardLayout& layout, char* scratch) {
  auto* tiles = reinterpret_cast<RowTile*>(scratch + layout.tiles);
  auto* count = reinterpret_cast<std::int32_t*>(scratch + layout.count);
  own::Prepare prepare{};
  prepare.offsets = static_cast<const std::int32_t*>(a.seq_offsets.data);
  prepare.dtype = a.qkv.dtype;
  prepare.sequences = static_cast<int>(a.seq_offsets.dim(0) - 1);
  prepare.by_prefix = tiles;
  prepare.count = count;
  prepare.tokens = a.qkv.dim(0);
  prepare.zero0 = static_cast<char*>(a.out.data);
  prepare.zero0_bytes = a.out.dim(1) * dtype_bytes(a.out.dtype);
  prepare.zero1 = static_cast<char*>(a.lse.data);
  prepare.zero1_bytes = a.spec.heads * 4;
  own::prepare(queue, prepare, a.seq_len_max);
  const own::ForwardParams p{tiles,
                             count,
                             a.out.data,
                             static_cast<float*>(a.lse.data),
                             static_cast<int>(a.spec.heads),
                             static_cast<int>(a.spec.kv_heads),
                             static_cast<int>(std::min<std::int64_t>(a.spec.window, 1 << 30)),
                             a.spec.scale,
                             nullptr,
                             0,
                             0};
  const bool segments = numerics == Numerics::kInvariant, wide = a.spec.head_dim == 128;
  with_element(a.qkv.dtype, [&]<class E>(E) {
    const auto run = wide ? (segments ? own::forward<E, 128, true> : own::forward<E, 128, false>)
                          : (segments ? own::forward<E, 64, true> : own::forward<E, 64, false>);
    run(queue, a, p);
  });
}

void own_paged_forward(const Queue& queue, Numerics numerics, const PagedAttentionArgs& a,
                       const PagedAttentionLayout& layout, char* scratch, int rows_min) {
  auto* tiles = reinterpret_cast<RowTile*>(scratch + layout.tiles);
  auto* count = reinterpret_cast<std::int32_t*>(scratch + layout.count);
  own::Prepare prepare{};
  prepare.offsets = static_cast<const std::int32_t*>(a.q_offsets.data);
  prepare.kv_lens = static_cast<const std::int32_t*>(a.kv_lens.data);
  prepare.rows_min = rows_min;
  prepare.dtype = a.qkv.dtype;
  prepare.sequences = static_cast<int>(a.kv_lens.dim(0));
  prepare.by_prefix = tiles;
  prepare.count = count;
  prepare.tokens = a.qkv.dim(0);
  prepare.zero0 = static_cast<char*>(a.out.data);
  prepare.zero0_bytes = a.out.dim(1) * dtype_bytes(a.out.dtype);
  own::prepare(queue, prepare, a.kv_len_max);
  const own::ForwardParams p{tiles,
                             count,
                             a.out.data,
                             nullptr,
                             static_cast<int>(a.spec.heads),
                             static_cast<int>(a.spec.kv_heads),
                             static_cast<int>(std::min<std::int64_t>(a.spec.window, 1 << 30)),
                             a.spec.scale,
                             static_cast<const std::int32_t*>(a.block_tables.data),
                             static_cast<int>(a.block_tables.dim(1)),
                             static_cast<int>(a.cache->block_size)};
  const bool segments = numerics == Numerics::kInvariant, wide = a.spec.head_dim == 128;
  with_element(a.qkv.dtype, [&]<class E>(E) {
    const auto run =
        wide ? (segments ? own::paged_forward<E, 128, true> : own::paged_forward<E, 128, false>)
             : (segments ? own::paged_forward<E, 64, true> : own::paged_forward<E, 64, false>);
    run(queue, a, p);
  });
}

}  // namespace tandem::kernels::cuda
