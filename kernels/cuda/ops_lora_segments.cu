// Low-rank products of rows with any mix of adapters, forward. In bf16 and f16 every row goes
// through the tensor cores in one order of sums, whatever else is in the batch; f32 is the plain
// form.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/lora_rows.cuh"
#include "kernels/cuda/mma.cuh"

#include <cooperative_groups.h>

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = kShrinkWarps, kThreads = 32 * kWarps;
constexpr int kRanks = 16;  ///< of A that a block computes at a time
constexpr int kPiece = kShrinkPiece;

template <class E>
__device__ uint4 drop_8(uint4 x, const DropoutMask& mask, std::int64_t row, int column) {
  std::uint32_t* pairs = &x.x;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float v[4] = {low_f32<E>(pairs[2 * h]), high_f32<E>(pairs[2 * h]), low_f32<E>(pairs[2 * h + 1]),
                  high_f32<E>(pairs[2 * h + 1])};
    mask.apply_group(row, column + 4 * h, v);
    pairs[2 * h] = pack<E>(v[0], v[1]);
    pairs[2 * h + 1] = pack<E>(v[2], v[3]);
  }
  return x;
}

/// u of kTiles * 8 rows of one segment and kRanks of one site. Block (part of I, tile, site and
/// ranks); blocks of a cluster are the parts. A is the tensor cores' A, rows their columns.
template <class E, int kTiles, bool kDrops>
__global__ void __launch_bounds__(kThreads, kTiles == 1 && !kDrops ? 3 : 1)
    shrink_kernel(const SegmentsView v, const E* x, int columns, E* u) {
  constexpr int kRows = 8 * kTiles, kOut = kRows * kRanks;
  __shared__ float parts[kWarps][kOut];
  __shared__ float sums[kOut];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  const SiteView& site = v.site[blockIdx.z % v.sites];
  const int first_rank = static_cast<int>(blockIdx.z) / v.sites * kRanks;
  const AdapterTile tile = find_adapter_tile<kRows>(v, static_cast<int>(blockIdx.y));
  if (tile.begin == tile.end) return;
  const LoraEntry entry = find_entry(v, site, tile.slot);
  E* out = u + static_cast<std::int64_t>(tile.begin) * v.columns + site.column + first_rank;
  const int rows = tile.end - tile.begin, ranks = min(kRanks, v.rank_max - first_rank);
  const auto* a = static_cast<const E*>(entry.a) + static_cast<std::int64_t>(first_rank) * columns;
  const E* a_low = a + static_cast<std::int64_t>(g) * columns;
  const E* a_high = a_low + static_cast<std::int64_t>(8) * columns;
  const int n_low = first_rank + g < entry.rank ? columns : 0;
  const int n_high = first_rank + g + 8 < entry.rank ? columns : 0;
  const E* x_rows = x + static_cast<std::int64_t>(tile.begin + g) * columns;
  const bool vectors = columns % 8 == 0 && reinterpret_cast<std::uintptr_t>(entry.a) % 16 == 0 &&
                       reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
  const DropoutMask mask(v, site, columns);
  constexpr int kSteps = kTiles == 1 ? kPiece / 32 : 1;  // whose loads are in flight together
  uint4 low[kSteps], high[kSteps];
  const auto load_factor = [&](int column) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      low[s] = load_8(a_low, column + 32 * s + 8 * q, n_low, vectors);
      high[s] = load_8(a_high, column + 32 * s + 8 * q, n_high, vectors);
    }
  };
  int column = kPiece * (kWarps * static_cast<int>(blockIdx.x) + warp);
  load_factor(column);  // lists and factors are older than the kernel before this one
  wait_for_inputs();
  launch_dependents();
  if (first_rank >= entry.rank) {
    if (blockIdx.x != 0) return;
    for (int e = static_cast<int>(threadIdx.x); e < rows * kRanks; e += kThreads)
      if (e % kRanks < ranks)
        out[static_cast<std::int64_t>(e / kRanks) * v.columns + e % kRanks] = store_as<E>(0);
    return;
  }
  float c[kTiles][4] = {};
  const int stride = kPiece * kWarps * static_cast<int>(gridDim.x);
  for (int step = 0; column < columns;) {
    uint4 in[kSteps][kTiles];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        in[s][t] = load_8(x_rows + static_cast<std::int64_t>(8 * t) * columns,
                          column + 32 * s + 8 * q, g + 8 * t < rows ? columns : 0, vectors);
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (kDrops)
          in[s][t] = drop_8<E>(in[s][t], mask, tile.begin + g + 8 * t, column + 32 * s + 8 * q);
        mma<E>(c[t], low[s].x, high[s].x, low[s].y, high[s].y, in[s][t].x, in[s][t].y);
        mma<E>(c[t], low[s].z, high[s].z, low[s].w, high[s].w, in[s][t].z, in[s][t].w);
      }
    column += 32 * kSteps;
    if ((step += kSteps) == kPiece / 32) step = 0, column += stride - kPiece;
    if (column < columns) load_factor(column);
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      parts[warp][(8 * t + 2 * q + j % 2) * kRanks + g + 8 * (j / 2)] = c[t][j];
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < kOut; e += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w][e];
    sums[e] = sum;
  }
#if __CUDA_ARCH__ >= 900
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
#else
  __syncthreads();
#endif
  if (blockIdx.x == 0) {
    for (int e = static_cast<int>(threadIdx.x); e < rows * kRanks; e += kThreads) {
      float sum = sums[e];
#if __CUDA_ARCH__ >= 900
      for (unsigned b = 1; b < gridDim.x; ++b) sum += cluster.map_shared_rank(sums, b)[e];
#endif
      if (e % kRanks < ranks)
        out[static_cast<std::int64_t>(e / kRanks) * v.columns + e % kRanks] =
            store_as<E>(entry.scale * sum);
    }
  }
#if __CUDA_ARCH__ >= 900
  cluster.sync();  // a block's memory lives until the first has read it
#endif
}

/// shrink_kernel for few rows on Hopper, with its sums. Its time is that of a few accesses to
/// memory one behind the other, those for code included: little code, no branches between loads,
/// all but x's asked for before x is there.
template <class E>
__global__ void __launch_bounds__(kThreads, 3)
    shrink_few_kernel(const SegmentsView v, const E* x, int columns, E* u) {
#ifdef TANDEM_HOPPER
  constexpr int kRows = 8, kOut = kRows * kRanks, kLoads = kPiece / 32;
  __shared__ float parts[kWarps][kOut];
  __shared__ float sums[kShrinkBlocksMax][kOut];
  __shared__ std::uint64_t sums_full;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  const SiteView& site = v.site[blockIdx.z % v.sites];
  const int first_rank = static_cast<int>(blockIdx.z) / v.sites * kRanks;
  const cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x == 0) {
    barrier_init(&sums_full, static_cast<int>(gridDim.x));
    barrier_init_done();
  }
  cluster_arrive();
  const AdapterTile tile = find_adapter_tile<kRows>(v, static_cast<int>(blockIdx.y));
  const bool is = tile.begin < tile.end;
  const LoraEntry entry = is ? find_entry(v, site, tile.slot) : LoraEntry{};
  const int rows = tile.end - tile.begin, ranks = min(kRanks, entry.rank - first_rank);
  const bool works = ranks > 0;
  const auto factor = [&](int r) {
    return static_cast<const E*>(entry.a) +
           static_cast<std::int64_t>(first_rank + (r < ranks ? r : 0)) * columns;
  };
  const E *a_low = factor(g), *a_high = factor(g + 8);
  const E* x_row = x + static_cast<std::int64_t>(tile.begin + (g < rows ? g : 0)) * columns;
  const int stride = kPiece * kWarps * static_cast<int>(gridDim.x);
  int column = kPiece * (kWarps * static_cast<int>(blockIdx.x) + warp) + 8 * q;
  uint4 low[kLoads], high[kLoads], in[kLoads];
  // Ranks, rows and columns that are not there: others, for nobody or zeroed.
  const auto load_factor = [&] {
#pragma unroll
    for (int s = 0; s < kLoads; ++s) {
      const int at = min(column + 32 * s, columns - 8);
      low[s] = __ldg(reinterpret_cast<const uint4*>(a_low + at));
      high[s] = __ldg(reinterpret_cast<const uint4*>(a_high + at));
    }
  };
  const bool aligned = reinterpret_cast<std::uintptr_t>(entry.a) % 16 == 0;
  if (works && aligned) load_factor();
  cluster_wait();
  wait_for_inputs();
  launch_dependents();
  float c[4] = {};
  for (; works && !aligned && column - 8 * q < columns; column += stride)
#pragma unroll 1
    for (int s = 0; s < kLoads; ++s) {
      const int at = column + 32 * s;
      const uint4 l = load_8(a_low, at, columns, false), h = load_8(a_high, at, columns, false);
      const uint4 i = load_8(x_row, at, columns, true);
      mma<E>(c, l.x, h.x, l.y, h.y, i.x, i.y);
      mma<E>(c, l.z, h.z, l.w, h.w, i.z, i.w);
    }
  while (works && column - 8 * q < columns) {
#pragma unroll
    for (int s = 0; s < kLoads; ++s)
      in[s] = *reinterpret_cast<const uint4*>(x_row + min(column + 32 * s, columns - 8));
#pragma unroll
    for (int s = 0; s < kLoads; ++s) {
      if (column + 32 * s >= columns) low[s] = high[s] = in[s] = {0, 0, 0, 0};
      mma<E>(c, low[s].x, high[s].x, low[s].y, high[s].y, in[s].x, in[s].y);
      mma<E>(c, low[s].z, high[s].z, low[s].w, high[s].w, in[s].z, in[s].w);
    }
    column += stride;
    if (column - 8 * q < columns) load_factor();
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) parts[warp][(2 * q + j % 2) * kRanks + g + 8 * (j / 2)] = c[j];
  __syncthreads();
  const int e = static_cast<int>(threadIdx.x);
  if (e < kOut) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w][e];
    *cluster.map_shared_rank(&sums[blockIdx.x][e], 0) = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) barrier_arrive_at(&sums_full, 0);
  if (blockIdx.x != 0) return;
  barrier_wait_cluster(&sums_full, 0);
  if (e >= kOut || e / kRanks >= rows || first_rank + e % kRanks >= v.rank_max) return;
  float sum = sums[0][e];
#pragma unroll 1
  for (unsigned b = 1; b < gridDim.x; ++b) sum += sums[b][e];
  u[static_cast<std::int64_t>(tile.begin + e / kRanks) * v.columns + site.column + first_rank +
    e % kRanks] = store_as<E>(e % kRanks < ranks ? entry.scale * sum : 0.0f);
#endif
}

/// One warp an element of u.
__global__ void __launch_bounds__(kThreads)
    shrink_f32_kernel(const SegmentsView v, const float* x, int columns, float* u) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(blockIdx.x);
  const SiteView& site = v.site[blockIdx.y];
  const LoraEntry entry = find_entry(v, site, find_adapter_tile<1>(v, row).slot);
  const DropoutMask mask(v, site, columns);
  x += static_cast<std::int64_t>(row) * columns;
  u += static_cast<std::int64_t>(row) * v.columns + site.column;
  for (int r = static_cast<int>(threadIdx.x) / 32; r < v.rank_max; r += kWarps) {
    float sum = 0.0f;
    if (r < entry.rank) {
      const float* a = static_cast<const float*>(entry.a) + static_cast<std::int64_t>(r) * columns;
      for (int i = lane; i < columns; i += 32)
        sum += a[i] * (mask.drops() ? x[i] * mask.factor(row, i) : x[i]);
      sum = entry.scale * warp_sum(sum);
    }
    if (lane == 0) u[r] = sum;
  }
}

constexpr int kOutputs = 64;  ///< that a warp of the expansion computes at a time
constexpr int kTileRows = 16;

/// y[0 .. 8) += sum, rounded once; kWrites: y is written.
template <bool kWrites, class Y>
__device__ void add_8(Y* y, const float (&sum)[8], int n, bool vectors) {
  if (n <= 0) return;
  if (vectors && n >= 8) {
    constexpr int kSize = Vec<Y>::kSize;
#pragma unroll
    for (int j = 0; j < 8; j += kSize) {
      Vec<Y> at{};
      if constexpr (!kWrites) at = load_vec(y + j);
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        at.at[e] = store_as<Y>(kWrites ? sum[j + e] : load_f32(at.at[e]) + sum[j + e]);
      store_vec(y + j, at);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j < n) y[j] = store_as<Y>(kWrites ? sum[j] : load_f32(y[j]) + sum[j]);
}

/// Site and first output of it of a block that computes `each` outputs.
struct Outputs {
  int site, first;
};
__device__ Outputs find_outputs(const SegmentsView& v, int each) {
  Outputs o{0, static_cast<int>(blockIdx.x) * each};
  for (; o.site + 1 < v.sites; ++o.site) {
    const int padded = (v.site[o.site].n + each - 1) / each * each;
    if (o.first < padded) break;
    o.first -= padded;
  }
  return o;
}

/// Each warp: one tile of rows and kOutputs outputs. Block (outputs, warps' tiles). Rows are the
/// tensor cores' A. Column g of product j is output 32 (j / 4) + 8 (g / 2) + 2 (j % 4) + g % 2, so
/// that a lane ends with 8 neighbours. kWrites: see add_8; all rows.
template <class E, class Y, bool kWrites>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(const SegmentsView v, const E* u, Y* y, int width, int tiles) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  const Outputs own = find_outputs(v, kOutputs);
  const SiteView& site = v.site[own.site];
  const int n0 = own.first;
  const bool y_vectors = width % 8 == 0 && (site.n_begin + n0) % 8 == 0 &&
                         reinterpret_cast<std::uintptr_t>(y) % 16 == 0;
  const bool u_vectors =
      v.columns % 4 == 0 && site.column % 4 == 0 && reinterpret_cast<std::uintptr_t>(u) % 8 == 0;
  for (int index = static_cast<int>(blockIdx.y) * kWarps + warp; index < tiles;
       index += static_cast<int>(gridDim.y) * kWarps) {
    const AdapterTile tile = find_adapter_tile<kTileRows>(v, index);
    if (tile.begin == tile.end) return;
    const LoraEntry entry = find_entry(v, site, tile.slot);
    const int rank = entry.rank, rows = tile.end - tile.begin;
    if (!kWrites && rank == 0) continue;
    const auto* b = static_cast<const E*>(entry.b) + static_cast<std::int64_t>(n0) * rank;
    const bool b_vectors = rank % 4 == 0 && reinterpret_cast<std::uintptr_t>(entry.b) % 8 == 0;
    const E* u_low = u + static_cast<std::int64_t>(tile.begin + g) * v.columns + site.column;
    const E* u_high = u_low + static_cast<std::int64_t>(8) * v.columns;
    float c[8][4] = {};
    for (int k = 0; k < rank; k += 16) {
      uint2 in[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int n = 32 * (j / 4) + 8 * (g / 2) + 2 * (j % 4) + g % 2;
        in[j] = load_4(b + n * rank, k + 4 * q, n0 + n < site.n ? rank : 0, b_vectors);
      }
      const uint2 low = load_4(u_low, k + 4 * q, g < rows ? rank : 0, u_vectors && b_vectors);
      const uint2 high = load_4(u_high, k + 4 * q, g + 8 < rows ? rank : 0, u_vectors && b_vectors);
#pragma unroll
      for (int j = 0; j < 8; ++j) mma<E>(c[j], low.x, high.x, low.y, high.y, in[j].x, in[j].y);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        if (g + 8 * half >= rows) continue;
        float sum[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] = c[4 * part + j / 2][2 * half + j % 2];
        const int n = n0 + 32 * part + 8 * q;
        add_8<kWrites>(
            y + static_cast<std::int64_t>(tile.begin + g + 8 * half) * width + site.n_begin + n,
            sum, site.n - n, y_vectors);
      }
  }
}

constexpr int kFewThreads = 128;
constexpr int kFewOutputs = 16 * kFewThreads / 32;  ///< of a block
constexpr int kTogether = 4;                        ///< items whose loads are in flight

/// Of the rows of a decode step: who carries what at one site, and the items of work: the first row
/// of each eight that carries an adapter.
template <class E>
struct FewRows {
  int slot[kFewRows], rank[kFewRows], item[kFewRows];
  const E* b[kFewRows];
  bool leads[kFewRows];
  int items;

  __device__ void load(const SegmentsView& v, const SiteView& site) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int t = thread; t < kFewRows; t += kFewThreads) slot[t] = -1;
    __syncthreads();
    for (int s = thread; s < v.segments; s += kFewThreads) {
      const int begin = v.offsets[s], end = v.offsets[s + 1], own = v.slots[s];
      if (begin < 0 || end > v.t) __trap();
      for (int t = begin; t < end; ++t) slot[t] = own;
    }
    __syncthreads();
    for (int t = thread; t < kFewRows; t += kFewThreads) {
      const LoraEntry entry = t < v.t ? find_entry(v, site, slot[t]) : LoraEntry{};
      rank[t] = entry.rank;
      b[t] = static_cast<const E*>(entry.b);
      leads[t] = entry.rank > 0;
      for (int other = t / 8 * 8; other < t; ++other) leads[t] = leads[t] && slot[other] != slot[t];
    }
    __syncthreads();
    if (thread >= 32) return;
    // In the order of the rows, so that all blocks count alike.
    int count = 0;
    for (int t = thread; t < kFewRows; t += 32) {
      const unsigned leading = __ballot_sync(0xffffffffu, leads[t]);
      if (leads[t]) item[count + __popc(leading & ((1u << thread) - 1))] = t;
      count += __popc(leading);
    }
    if (thread == 0) items = count;
  }
};

/// Each warp: 16 outputs, which are the tensor cores' rows, of its part of the items, whose eights
/// of rows are the columns. A row takes nothing from other rows' adapters, infinite ones included.
template <class E, class Y>
__global__ void __launch_bounds__(kFewThreads, 5)
    expand_few_kernel(const SegmentsView v, const E* u, Y* y, int width) {
  __shared__ FewRows<E> rows;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
  const Outputs own = find_outputs(v, kFewOutputs);
  const SiteView& site = v.site[own.site];
  const int n0 = own.first + static_cast<int>(threadIdx.x) / 32 * 16;
  rows.load(v, site);
  __syncthreads();
  for (int i = static_cast<int>(blockIdx.y) * kTogether; i < rows.items;
       i += static_cast<int>(gridDim.y) * kTogether) {
    float c[kTogether][4] = {}, old[kTogether][4];
    int at[kTogether][4];  // of y; -1: not this item's
    for (int k = 0; k < v.rank_max; k += 16) {
      uint2 low[kTogether], high[kTogether], in[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int t = i + j < rows.items ? rows.item[i + j] : -1;
        const int rank = t >= 0 ? rows.rank[t] : 0, n = n0 + g;
        const E* b = t >= 0 ? rows.b[t] : nullptr;
        const bool vectors = rank % 4 == 0 && reinterpret_cast<std::uintptr_t>(b) % 8 == 0;
        low[j] = load_4(b + static_cast<std::int64_t>(n) * rank, k + 4 * q, n < site.n ? rank : 0,
                        vectors);
        high[j] = load_4(b + static_cast<std::int64_t>(n + 8) * rank, k + 4 * q,
                         n + 8 < site.n ? rank : 0, vectors);
        const int column = t / 8 * 8 + g;
        const int own_rank = t >= 0 && column < v.t ? rows.rank[column] : 0;
        const E* own_u = u + static_cast<std::int64_t>(column) * v.columns + site.column;
        in[j] = load_4(own_u, k + 4 * q, own_rank,
                       own_rank % 4 == 0 && reinterpret_cast<std::uintptr_t>(own_u) % 8 == 0);
        if (k > 0) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = t / 8 * 8 + 2 * q + e % 2, m = n + 8 * (e / 2);
          const bool is = t >= 0 && row < v.t && m < site.n && rows.slot[row] == rows.slot[t];
          at[j][e] = is ? row * width + site.n_begin + m : -1;
          if (is) old[j][e] = load_f32(y[at[j][e]]);
        }
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        mma<E>(c[j], low[j].x, high[j].x, low[j].y, high[j].y, in[j].x, in[j].y);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (at[j][e] >= 0) y[at[j][e]] = store_as<Y>(old[j][e] + c[j][e]);
  }
}

/// One thread an output.
__global__ void __launch_bounds__(kThreads)
    expand_f32_kernel(const SegmentsView v, const float* u, float* y, int width) {
  const int row = static_cast<int>(blockIdx.x);
  const SiteView& site = v.site[blockIdx.z];
  const LoraEntry entry = find_entry(v, site, find_adapter_tile<1>(v, row).slot);
  const int n = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  if (n >= site.n || entry.rank == 0) return;
  const float* b = static_cast<const float*>(entry.b) + static_cast<std::int64_t>(n) * entry.rank;
  u += static_cast<std::int64_t>(row) * v.columns + site.column;
  float sum = 0.0f;
  for (int r = 0; r < entry.rank; ++r) sum += b[r] * u[r];
  y[static_cast<std::int64_t>(row) * width + site.n_begin + n] += sum;
}

int device_capability() {
  static const int capability = [] {
    int device = 0, major = 0, minor = 0;
    TANDEM_CUDA(cudaGetDevice(&device));
    TANDEM_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    TANDEM_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return 10 * major + minor;
  }();
  return capability;
}

template <class E, int kTiles, bool kDrops>
void launch_shrink(cudaStream_t stream, const SegmentsView& v, const Tensor& x, const Tensor& u,
                   bool early) {
  const auto ranks = static_cast<unsigned>((v.rank_max + kRanks - 1) / kRanks);
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};
  const unsigned blocks = device_capability() < 90 ? 1 : shrink_blocks(x.dim(1));
  config.gridDim = dim3(blocks, tiles_max(v, 8 * kTiles), ranks * static_cast<unsigned>(v.sites));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {blocks, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = device_capability() < 90 ? 0 : early ? 2 : 1;
  auto kernel = shrink_kernel<E, kTiles, kDrops>;
  if (kTiles == 1 && !kDrops && device_capability() == 90 && x.dim(1) % 8 == 0 &&
      reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0)
    kernel = shrink_few_kernel<E>;
  TANDEM_CUDA(cudaLaunchKernelEx(&config, kernel, v, x.as<const E>(), static_cast<int>(x.dim(1)),
                                 u.as<E>()));
}

template <class E, class Y, bool kWrites = false>
void launch_expand(cudaStream_t stream, dim3 grid, const SegmentsView& v, const Tensor& u,
                   const Tensor& y, int tiles) {
  expand_kernel<E, Y, kWrites>
      <<<grid, kThreads, 0, stream>>>(v, u.as<E>(), y.as<Y>(), static_cast<int>(y.dim(1)), tiles);
  TANDEM_LAUNCHED("expand_kernel");
}

template <class E, class Y>
void launch_expand_few(cudaStream_t stream, const SegmentsView& v, const Tensor& u,
                       const Tensor& y) {
  unsigned blocks = 0;
  for (int s = 0; s < v.sites; ++s)
    blocks += static_cast<unsigned>((v.site[s].n + kFewOutputs - 1) / kFewOutputs);
  // As many blocks as Hopper holds at once, as long as there are items for them.
  constexpr unsigned kWanted = 5 * 132;
  const unsigned groups = static_cast<unsigned>((v.t + kTogether - 1) / kTogether);
  const dim3 grid(blocks, std::clamp(kWanted / std::max(blocks, 1u), 1u, groups));
  expand_few_kernel<E, Y>
      <<<grid, kFewThreads, 0, stream>>>(v, u.as<E>(), y.as<Y>(), static_cast<int>(y.dim(1)));
  TANDEM_LAUNCHED("expand_few_kernel");
}

}  // namespace

void lora_segments_shrink(cudaStream_t stream, const std::vector<LoraSite>& sites,
                          const AdapterRows& rows, Tensor x, Tensor u, bool early) {
  for (std::size_t first = 0; first < sites.size(); first += kSitesMax) {
    const SegmentsView v = segments_view(sites, first, rows, x.dim(0));
    if (x.dtype == DType::kF32) {
      shrink_f32_kernel<<<dim3(static_cast<unsigned>(v.t), static_cast<unsigned>(v.sites)),
                          kThreads, 0, stream>>>(v, x.as<float>(), static_cast<int>(x.dim(1)),
                                                 u.as<float>());
      TANDEM_LAUNCHED("shrink_f32_kernel");
      continue;
    }
    with_element(x.dtype, [&]<class E>(E) {
      if (v.dropout_threshold > 0) return launch_shrink<E, 8, true>(stream, v, x, u, early);
      if (v.t <= kFewRows) return launch_shrink<E, 1, false>(stream, v, x, u, early);
      launch_shrink<E, 8, false>(stream, v, x, u, early);
    });
  }
}

void lora_segments_expand(cudaStream_t stream, const std::vector<LoraSite>& sites,
                          const AdapterRows& rows, Tensor u, Tensor y, bool writes) {
  for (std::size_t first = 0; first < sites.size(); first += kSitesMax) {
    const SegmentsView v = segments_view(sites, first, rows, y.dim(0));
    const int width = static_cast<int>(y.dim(1));
    unsigned blocks = 0, widest = 0;
    for (int s = 0; s < v.sites; ++s) {
      blocks += static_cast<unsigned>((v.site[s].n + kOutputs - 1) / kOutputs);
      widest = std::max(widest, static_cast<unsigned>((v.site[s].n + kThreads - 1) / kThreads));
    }
    if (u.dtype == DType::kF32) {
      expand_f32_kernel<<<dim3(static_cast<unsigned>(v.t), widest, static_cast<unsigned>(v.sites)),
                          kThreads, 0, stream>>>(v, u.as<float>(), y.as<float>(), width);
      TANDEM_LAUNCHED("expand_f32_kernel");
      continue;
    }
    with_element(u.dtype, [&]<class E>(E) {
      const bool wide = y.dtype == DType::kF32;
      if (v.t <= kFewRows)
        return (wide ? launch_expand_few<E, float> : launch_expand_few<E, E>)(stream, v, u, y);
      const unsigned tiles = tiles_max(v, kTileRows);
      const dim3 grid(blocks, std::min((tiles + kWarps - 1) / kWarps, 64u));
      const auto launch = writes ? launch_expand<E, E, true>
                          : wide ? launch_expand<E, float>
                                 : launch_expand<E, E>;
      launch(stream, grid, v, u, y, static_cast<int>(tiles));
    });
  }
}

}  // namespace tandem::kernels::cuda
