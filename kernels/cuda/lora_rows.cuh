// Private to kernels/cuda: which rows carry which adapter, read from the device's lists by each
// block for itself, and the dropout of one adapter site, the same in forward and backward.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/op_args.h"
#include "protocol/base/random.h"

#include <algorithm>
#include <climits>

namespace tandem::kernels::cuda {

/// Sites of one launch; more go in several.
inline constexpr int kSitesMax = 4;

struct SiteView {
  const LoraEntry* entries;
  int slots;
  int n_begin, n;
  int column;  ///< its first of u and du
  std::uint64_t dropout_stream;
};
struct SegmentsView {
  const std::int32_t *offsets, *slots;
  int segments, t, rank_max;
  int columns;  ///< of u and du: all sites of the linear
  std::uint64_t dropout_seed;
  std::uint32_t dropout_threshold;  ///< of 65536; 0: no dropout
  float dropout_scale;
  int sites;
  SiteView site[kSitesMax];
};

/// Sites [first, first + kSitesMax) of a call.
inline SegmentsView segments_view(const std::vector<LoraSite>& sites, std::size_t first,
                                  const AdapterRows& rows, std::int64_t t) {
  SegmentsView v{};
  v.offsets = rows.segment_offsets.as<std::int32_t>();
  v.slots = rows.segment_slots.as<std::int32_t>();
  v.segments = static_cast<int>(rows.segments_max);
  v.t = static_cast<int>(t);
  v.rank_max = static_cast<int>(rows.rank_max);
  v.columns = static_cast<int>(static_cast<std::int64_t>(sites.size()) * rows.rank_max);
  v.dropout_seed = rows.dropout_seed;
  v.dropout_threshold = static_cast<std::uint32_t>(rows.dropout * 65536.0f + 0.5f);
  v.dropout_scale = 1.0f / (1.0f - static_cast<float>(v.dropout_threshold) / 65536.0f);
  for (std::size_t s = first; s < std::min(sites.size(), first + kSitesMax); ++s)
    v.site[v.sites++] = {
        static_cast<const LoraEntry*>(sites[s].entries.data),
        static_cast<int>(sites[s].entries.bytes() / static_cast<std::int64_t>(sizeof(LoraEntry))),
        static_cast<int>(sites[s].n_begin),
        static_cast<int>(sites[s].n),
        static_cast<int>(static_cast<std::int64_t>(s) * rows.rank_max),
        sites[s].dropout_stream};
  return v;
}

/// Tiles of up to `rows` rows of one segment each: no batch has more.
inline unsigned tiles_max(const SegmentsView& v, int rows) {
  return static_cast<unsigned>(std::min<std::int64_t>(v.t, v.t / rows + v.segments + 1));
}

/// How u of few rows is added up: of I in pieces, one after another by each warp of a cluster of
/// blocks, then over a block's warps, then over blocks. Of I alone, so that a row's sum depends on
/// nothing else; enough blocks that a decode step's few adapters occupy the device.
inline constexpr int kShrinkWarps = 8, kShrinkPiece = 128, kShrinkBlocksMax = 8;
__host__ __device__ constexpr unsigned shrink_blocks(std::int64_t i) {
  unsigned blocks = 1;
  while (blocks < kShrinkBlocksMax && 2 * blocks * kShrinkWarps * kShrinkPiece <= i) blocks *= 2;
  return blocks;
}

/// Consecutive rows of one segment; slot -1: without adapter. begin == end: there is none.
struct AdapterTile {
  int begin, end, slot;
};

/// Tile `index` of all in ascending order. Called by whole warps. Rows behind the last offset are
/// a last segment without adapter.
template <int kRows>
__device__ inline AdapterTile find_adapter_tile(const SegmentsView& v, int index) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int before = 0;
  for (int first = 0; first <= v.segments; first += 32) {
    const int i = first + lane;
    int begin = v.t, end = v.t, slot = -1;
    if (i <= v.segments) begin = load_kept(v.offsets + i);
    if (i < v.segments) end = load_kept(v.offsets + i + 1), slot = load_kept(v.slots + i);
    if (begin > end || end > v.t) __trap();
    const int tiles = (end - begin + kRows - 1) / kRows;
    int running = tiles;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int below = __shfl_up_sync(kAll, running, offset);
      if (lane >= offset) running += below;
    }
    const unsigned beyond = __ballot_sync(kAll, before + running > index);
    if (beyond != 0) {
      const int at = __ffs(static_cast<int>(beyond)) - 1;
      const int skipped = index - before - (running - tiles);
      const int from = begin + skipped * kRows;
      const int to = min(end, from + kRows);
      return {__shfl_sync(kAll, from, at), __shfl_sync(kAll, to, at), __shfl_sync(kAll, slot, at)};
    }
    before += __shfl_sync(kAll, running, 31);
  }
  return {v.t, v.t, -1};
}

/// The adapter of a slot at a site; rank 0 where there is none.
__device__ inline LoraEntry find_entry(const SegmentsView& v, const SiteView& site, int slot) {
  if (slot < 0) return {};
  if (slot >= site.slots) __trap();
  const LoraEntry* from = site.entries + slot;
  const LoraEntry entry{load_kept(&from->a),    load_kept(&from->b),    from->da, from->db,
                        load_kept(&from->rank), load_kept(&from->scale)};
  if (entry.rank < 0 || entry.rank > v.rank_max) __trap();
  return entry;
}

/// Element (row, column) is dropped when its 16 random bits are below p * 65536 and scaled by
/// 1/(1-p) otherwise; four columns share one draw.
class DropoutMask {
 public:
  __device__ DropoutMask(const SegmentsView& v, const SiteView& site, int columns)
      : key_(mix64(mix64(v.dropout_seed) ^ site.dropout_stream)),
        groups_((columns + kGroup - 1) / kGroup),
        threshold_(v.dropout_threshold),
        scale_(v.dropout_scale) {}
  __device__ bool drops() const { return threshold_ > 0; }
  /// 0 or 1/(1-p).
  __device__ float factor(std::int64_t row, int column) const {
    return kept(bits(row, column), column % kGroup);
  }
  /// x[0 .. 4) *= the factors of columns [column, column + 4), a multiple of 4.
  __device__ void apply_group(std::int64_t row, int column, float* x) const {
    const std::uint64_t draw = bits(row, column);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) x[j] *= kept(draw, j);
  }

 private:
  static constexpr int kGroup = 4;
  __device__ std::uint64_t bits(std::int64_t row, int column) const {
    return mix64(key_ ^ static_cast<std::uint64_t>(row * groups_ + column / kGroup));
  }
  __device__ float kept(std::uint64_t draw, int j) const {
    return ((draw >> (16 * j)) & 0xffff) < threshold_ ? 0.0f : scale_;
  }
  std::uint64_t key_;
  std::int64_t groups_;
  std::uint32_t threshold_;
  float scale_;
};

}  // namespace tandem::kernels::cuda
