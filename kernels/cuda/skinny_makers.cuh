// Private to skinny.cu: blocks of its grid that make u while the others stream the weight. The
// products of a decode step leave some multiprocessors without a tile; there u costs no time of its
// own, and no kernel stands between what makes x and the first weights. A, read once, is asked for
// before x is there, far ahead: beside the stream an access to memory takes microseconds.
#pragma once

#include "kernels/cuda/skinny_adapters.cuh"

namespace tandem::kernels::cuda::skinny_product {

/// What the blocks of one kernel tell each other, in device memory; zeros between the kernels of a
/// queue. Blocks that make u come first in the grid and wait for no other block, so that those
/// which wait for them never keep them from running.
struct Handover {
  unsigned ready;  ///< blocks that made their part of u
  unsigned read;   ///< other blocks that saw all of it; the last one writes zeros
};

/// A part of u: up to eight rows of one adapter, sixteen ranks of one site.
struct MadeItem {
  const std::uint16_t* a;  ///< [ranks, I], elements as their bits
  float scale;
  std::int32_t row, rows;      ///< of x and u; rows 0: there are no more items
  std::int32_t ranks;          ///< that the adapter has; 0: zeros are written
  std::int32_t column, width;  ///< of u, which is written there; zeros from `ranks` on
};

inline constexpr int kMadeRows = 8, kMadeRanks = 16, kMadeOut = kMadeRows * kMadeRanks;
inline constexpr int kMadePiece = kShrinkPiece;                   ///< of I: a warp's at a time
inline constexpr int kMadeColumns = kConsumerWarps * kMadePiece;  ///< of I in one stage
inline constexpr int kMadeRowBytes = kMadeColumns * 2 + 64;       ///< rows in different banks
inline constexpr int kMadeItemsMax = 32;                          ///< of one block
inline constexpr int kFactorStagesMax = 8, kInputStages = 3;
inline constexpr int kFactorBytes = kMadeRanks * kMadeRowBytes,
                     kInputBytes = kMadeRows * kMadeRowBytes;
inline constexpr int kSumBytes = kMadeOut * 4;

struct MakerControl {
  std::uint64_t factor_full[kFactorStagesMax], factor_empty[kFactorStagesMax];
  std::uint64_t input_full[kInputStages], input_empty[kInputStages];
  MadeItem item[kMadeItemsMax];
};

/// What a maker has in `bytes` of shared memory, I being `i`: control, the sums of each warp of
/// shrink_few_kernel, and the stages.
struct MakerMemory {
  int sums, factors, inputs;  ///< bytes from its begin
  int factor_stages;
};
__host__ __device__ constexpr MakerMemory maker_memory(int i, int bytes) {
  MakerMemory m{};
  m.sums = (static_cast<int>(sizeof(MakerControl)) + 127) / 128 * 128;
  m.inputs = m.sums + kShrinkWarps * static_cast<int>(shrink_blocks(i)) * kSumBytes;
  m.factors = m.inputs + kInputStages * kInputBytes;
  const int fit = (bytes - m.factors) / kFactorBytes;
  m.factor_stages = fit < kFactorStagesMax ? fit : kFactorStagesMax;
  return m;
}

/// Lists this block's items, every `makers`-th of all.
__device__ inline void list_items(const Params& p, MakerControl& c, int warp, int lane) {
  const SegmentsView& v = p.adapters;
  const int groups = (v.rank_max + kMadeRanks - 1) / kMadeRanks, of_tile = v.sites * groups;
  for (int j = warp; j < kMadeItemsMax; j += kThreads / 32) {
    const int index = static_cast<int>(blockIdx.x) + j * p.makers;
    const AdapterTile tile = find_adapter_tile<kMadeRows>(v, index / of_tile);
    const SiteView& site = v.site[index % v.sites];
    const int first_rank = index % of_tile / v.sites * kMadeRanks;
    const bool is = tile.begin < tile.end;
    const LoraEntry entry = is ? find_entry(v, site, tile.slot) : LoraEntry{};
    if (lane == 0)
      c.item[j] = {static_cast<const std::uint16_t*>(entry.a) +
                       static_cast<std::int64_t>(first_rank) * p.inputs,
                   entry.scale,
                   tile.begin,
                   tile.end - tile.begin,
                   max(0, min(kMadeRanks, entry.rank - first_rank)),
                   site.column + first_rank,
                   min(kMadeRanks, v.rank_max - first_rank)};
    if (!is) break;
  }
}

/// `rows` rows of `columns` numbers each, which lie p.inputs apart, into one stage. By a whole
/// warp.
__device__ inline void copy_rows(const Params& p, const std::uint16_t* from, int rows, int columns,
                                 unsigned char* to, std::uint64_t* full, int lane) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(from) % 16 == 0;
  if (!aligned)
    for (int r = 0; r < rows; ++r)
      for (int e = lane; e < columns; e += 32)
        reinterpret_cast<std::uint16_t*>(to + r * kMadeRowBytes)[e] =
            from[static_cast<std::int64_t>(r) * p.inputs + e];
  fence_async();
  __syncwarp();
  if (lane == 0) barrier_expect(full, aligned ? rows * columns * 2 : 0);
  __syncwarp();
  if (aligned && lane < rows)
    copy_bytes(shared_address(to + lane * kMadeRowBytes),
               from + static_cast<std::int64_t>(lane) * p.inputs, columns * 2, full);
}

/// Calls f(item, first column, columns) for all pieces of what there is to multiply.
template <class F>
__device__ inline void for_stages(const Params& p, const MakerControl& c, const F& f) {
  for (int j = 0; j < kMadeItemsMax && c.item[j].rows > 0; ++j)
    for (int column = 0; c.item[j].ranks > 0 && column < p.inputs; column += kMadeColumns)
      f(c.item[j], column, min(kMadeColumns, p.inputs - column));
}

/// The body of one of the first p.makers blocks, in `bytes` of shared memory. The sums are those
/// of shrink_few_kernel, addend by addend.
template <class E>
__device__ inline void make_u(const Params& p, unsigned char* memory, int bytes) {
  MakerControl& c = *reinterpret_cast<MakerControl*>(memory);
  const MakerMemory m = maker_memory(p.inputs, bytes);
  unsigned char *factors = memory + m.factors, *inputs = memory + m.inputs;
  auto* sum_of = reinterpret_cast<float*>(memory + m.sums);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < m.factor_stages; ++s) {
      barrier_init(&c.factor_full[s], 1);
      barrier_init(&c.factor_empty[s], kConsumerWarps);
    }
    for (int s = 0; s < kInputStages; ++s) {
      barrier_init(&c.input_full[s], 1);
      barrier_init(&c.input_empty[s], kConsumerWarps);
    }
    barrier_init_done();
  }
  list_items(p, c, warp, lane);
  __syncthreads();
  struct {
    int stage = 0;
    std::uint32_t phase = 0;
  } factor;
  Ring<kInputStages> input;
  const auto next_factor = [&] {
    if (++factor.stage == m.factor_stages) factor.stage = 0, factor.phase ^= 1;
  };
  if (warp == kProducer) {
    for_stages(p, c, [&](const MadeItem& item, int column, int columns) {
      barrier_wait(&c.factor_empty[factor.stage], factor.phase ^ 1);
      copy_rows(p, item.a + column, item.ranks, columns, factors + factor.stage * kFactorBytes,
                &c.factor_full[factor.stage], lane);
      next_factor();
    });
    return;
  }
  wait_for_inputs();
  if (warp == kLister) {
    for_stages(p, c, [&](const MadeItem& item, int column, int columns) {
      barrier_wait(&c.input_empty[input.stage], input.phase ^ 1);
      copy_rows(p,
                static_cast<const std::uint16_t*>(p.x) +
                    static_cast<std::int64_t>(item.row) * p.inputs + column,
                item.rows, columns, inputs + input.stage * kInputBytes, &c.input_full[input.stage],
                lane);
      input.next();
    });
    return;
  }
  const int g = lane / 4, q = lane % 4, e = static_cast<int>(threadIdx.x);
  const int sums = kShrinkWarps * static_cast<int>(shrink_blocks(p.inputs));
  for (int j = 0; j < kMadeItemsMax && c.item[j].rows > 0; ++j) {
    const MadeItem& item = c.item[j];
    const int low_row = (g < item.ranks ? g : 0) * kMadeRowBytes,
              high_row = (g + 8 < item.ranks ? g + 8 : 0) * kMadeRowBytes,
              row = (g < item.rows ? g : 0) * kMadeRowBytes;
    int piece = warp;
    for (int column = 0; item.ranks > 0 && column < p.inputs; column += kMadeColumns) {
      barrier_wait(&c.factor_full[factor.stage], factor.phase);
      barrier_wait(&c.input_full[input.stage], input.phase);
      const unsigned char *a = factors + factor.stage * kFactorBytes,
                          *x = inputs + input.stage * kInputBytes;
      if (piece * kMadePiece < p.inputs) {
        float* own = sum_of + piece % sums * kMadeOut;
        float d[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (piece >= sums) d[i] = own[(2 * q + i % 2) * kMadeRanks + g + 8 * (i / 2)];
#pragma unroll
        for (int s = 0; s < kMadePiece / 32; ++s) {
          const int at = warp * kMadePiece + 32 * s + 8 * q;
          const auto load = [&](const unsigned char* from) {
            return column + at < p.inputs ? *reinterpret_cast<const uint4*>(from + at * 2)
                                          : uint4{0, 0, 0, 0};
          };
          const uint4 low = load(a + low_row), high = load(a + high_row), in = load(x + row);
          mma<E>(d, low.x, high.x, low.y, high.y, in.x, in.y);
          mma<E>(d, low.z, high.z, low.w, high.w, in.z, in.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) own[(2 * q + i % 2) * kMadeRanks + g + 8 * (i / 2)] = d[i];
      }
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(&c.factor_empty[factor.stage]);
        barrier_arrive(&c.input_empty[input.stage]);
      }
      next_factor(), input.next();
      piece += kConsumerWarps;
    }
    named_sync(1, kConsumers);
    float total = 0.0f;
    for (int first = 0; item.ranks > 0 && first * kMadePiece < p.inputs && first < sums;
         first += kShrinkWarps) {
      float sum = 0.0f;
      for (int w = first; w < first + kShrinkWarps && w * kMadePiece < p.inputs; ++w)
        sum += sum_of[w * kMadeOut + e];
      total = first == 0 ? sum : total + sum;
    }
    if (e / kMadeRanks < item.rows && e % kMadeRanks < item.width)
      static_cast<E*>(
          p.u)[static_cast<std::int64_t>(item.row + e / kMadeRanks) * p.adapters.columns +
               item.column + e % kMadeRanks] =
          store_as<E>(e % kMadeRanks < item.ranks ? item.scale * total : 0.0f);
    named_sync(1, kConsumers);
  }
  if (e == 0) {
    __threadfence();
    atomicAdd(&p.handover->ready, 1u);
  }
}

/// A warp of each of the other blocks waits until u is made; what it returns is for end_of_u(),
/// much later.
__device__ inline unsigned wait_for_u(const Params& p, int lane, int blocks) {
  unsigned read = 0;
  if (lane == 0) {
    unsigned ready = 0;
    do
      asm volatile("ld.acquire.gpu.u32 %0, [%1];"
                   : "=r"(ready)
                   : "l"(&p.handover->ready)
                   : "memory");
    while (ready < static_cast<unsigned>(p.makers));
    read = atomicInc(&p.handover->read, static_cast<unsigned>(blocks) - 1);
  }
  __syncwarp();
  return read;
}
__device__ inline void end_of_u(const Params& p, int lane, int blocks, unsigned read) {
  if (lane == 0 && read + 1 == static_cast<unsigned>(blocks)) p.handover->ready = 0;
}

}  // namespace tandem::kernels::cuda::skinny_product
