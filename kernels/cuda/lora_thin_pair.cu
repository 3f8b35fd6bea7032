// du = s dy B and dB += dy^T u in one pass over dy. A block takes neighbouring columns of one site
// and a part of the rows; its warps lie side by side over the columns, hold B there and the sum of
// dB in registers, and add up du of every few rows through shared memory. What blocks found lies in
// scratch, [block of columns][T, rank_max] of du and [part of the rows][N, rank_max] of dB, a few
// percent of dy's bytes, until a second launch adds it up in order.
// Where dy is the gradient of gate and up, the pass can make it: a block takes the same columns of
// both, half of its warps each, and writes what it makes before it multiplies it. What gate and up
// made in forward is then at hand too, so that dA of the linear that read it costs no pass: the
// warps lie side by side over its columns and hold its sum.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/lora_thin.cuh"

namespace tandem::kernels::cuda {
namespace thin {
namespace {

/// Of dy: read; the gradient of gate and up, made on the way; and with it the dA left to it.
enum class Dy { kGiven, kMade, kMadeWithLeft };

/// What a block holds: kColumns ranks, kWarpColumns of dy a warp, kRows rows a step. A stage is
/// dy's tile of each site of the block (before: gate's and up's), dout's (then: silu * up's), and
/// u's of each site and du's of the linear before.
template <int kColumns, int kWarpColumns, int kRows, Dy kDy>
struct Pair {
  static constexpr bool kMakes = kDy != Dy::kGiven, kLeft = kDy == Dy::kMadeWithLeft;
  static constexpr int kSites = kMakes ? 2 : 1, kSiteWarps = kWarps / kSites;
  static constexpr int kWidth = kSiteWarps * kWarpColumns;  ///< columns of one site
  static constexpr int kTile = kRows * kWidth;
  static constexpr int kFactors = kSites + (kLeft ? 1 : 0);
  static constexpr int kURow = kFactors * kColumns + kChunk;
  static constexpr int kLeftColumns = kLeft ? kWidth / kWarps : 0;  ///< of silu * up, a warp's
  static constexpr int kUAt = (kMakes ? 3 : 1) * kTile;
  static constexpr int kStage = kUAt + kRows * kURow;
  static constexpr int kSumRow = kColumns + 4, kSums = kRows * kSumRow;
  static constexpr int kSumsBytes = static_cast<int>(sizeof(float)) * 2 * kWarps * kSums;
  static constexpr int kBlockWidth = kSites * kWidth;
  static constexpr bool kAlone = kColumns * kBlockWidth == 1 << 14;  ///< on its multiprocessor
  static constexpr int kStagesBytes = !kMakes  ? (kBlockWidth == 1024 ? 120 : 72) << 10
                                      : kAlone ? (226 << 10) - kSumsBytes
                                               : 88 << 10;
  static constexpr int kStages = std::min(8, kStagesBytes / (2 * kStage));
  static constexpr std::size_t kSumsAt = kElementBytes * kStages * kStage;
  static constexpr std::size_t kBytes = kSumsAt + kSumsBytes;
};

/// What dy is made of: gate_up [T, 2 F], which may be its memory, and dout [T, F].
template <class E>
struct MadeOf {
  const E *gate_up, *dout;
};

/// The site and first column of a block.
struct ColumnBlock {
  int site, begin, end;
};
__device__ inline ColumnBlock find_block(const SegmentsView& v, int width, int index) {
  for (int s = 0; s < v.sites; ++s) {
    const int blocks = (v.site[s].n + width - 1) / width;
    const int begin = v.site[s].n_begin + index * width;
    if (index < blocks) return {s, begin, min(begin + width, v.site[s].n_begin + v.site[s].n)};
    index -= blocks;
  }
  __trap();
}

/// Grid (parts of the rows, blocks of columns). With kMakes two sites of equal width.
template <class E, int kColumns, int kWarpColumns, int kRows, Dy kDy>
__global__ void __launch_bounds__(kThreads, kColumns == 16 && kWarpColumns < 128 ? 2 : 1)
    pair_kernel(const SegmentsView v, const MadeOf<E> made_of, const Left<E> left, E* dy, int width,
                const E* u, float* du_parts, float* db_parts, float* da_parts) {
#if __CUDA_ARCH__ >= 900
  using P = Pair<kColumns, kWarpColumns, kRows, kDy>;
  constexpr bool kMakes = P::kMakes;
  extern __shared__ __align__(128) unsigned char memory[];
  auto* tiles = reinterpret_cast<E*>(memory);
  auto* sums = reinterpret_cast<float*>(memory + P::kSumsAt);
  launch_dependents();
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int index = static_cast<int>(blockIdx.y);
  const ColumnBlock block = find_block(v, P::kWidth, index);
  // Of this warp: its site (gate or up), and its first column there.
  const int half = warp / P::kSiteWarps, to_up = v.site[0].n;
  const int warp_column = warp % P::kSiteWarps * kWarpColumns;
  const SiteView& site = v.site[block.site + half];
  const int first_n = block.begin + half * to_up + warp_column, end_n = block.end + half * to_up;
  const LoraEntry entry = find_entry(v, site, v.slots[0]);
  const int parts = static_cast<int>(gridDim.x), part = static_cast<int>(blockIdx.x);
  const int steps_all = (v.t + kRows - 1) / kRows;
  const int steps_part = (steps_all + parts - 1) / parts;
  const int first_step = part * steps_part;
  const int steps = max(0, min(steps_part, steps_all - first_step));

  /// f(row of dy, column of the first site, place in its tile) of each chunk that this thread has.
  const auto each_chunk = [&](int step, const auto& f) {
    E* tile = tiles + step % P::kStages * P::kStage;
#pragma unroll
    for (int e = tid; e < P::kTile / kChunk; e += kThreads) {
      const int row = e / (P::kWidth / kChunk), chunk = e % (P::kWidth / kChunk);
      f((first_step + step) * kRows + row, block.begin + chunk * kChunk,
        tile + row * P::kWidth + swizzled(row, chunk));
    }
  };
  const auto load = [&](int step) {
    if (step < steps) {
      each_chunk(step, [&](int t, int at, E* to) {
        const bool inside = t < v.t && at < block.end;
        const std::int64_t from = inside ? static_cast<std::int64_t>(t) * width + at : 0;
        copy_16_async(to, (kMakes ? made_of.gate_up : dy) + from, inside);
        if constexpr (kMakes) {
          copy_16_async(to + P::kTile, made_of.gate_up + from + (inside ? to_up : 0), inside);
          copy_16_async(to + 2 * P::kTile,
                        made_of.dout + (inside ? static_cast<std::int64_t>(t) * to_up + at : 0),
                        inside);
        }
      });
      E* tile = tiles + step % P::kStages * P::kStage + P::kUAt;
      for (int e = tid; e < P::kFactors * kRows * kColumns / kChunk; e += kThreads) {
        constexpr int kRowChunks = P::kFactors * kColumns / kChunk;
        const int row = e / kRowChunks, t = (first_step + step) * kRows + row;
        const int column = e % kRowChunks * kChunk, r = column % kColumns;
        const bool inside = t < v.t && r < v.rank_max;
        E* to = tile + row * P::kURow + column;
        if (column < P::kSites * kColumns)
          copy_16_async(to,
                        u + (inside ? static_cast<std::int64_t>(t) * v.columns +
                                          v.site[block.site + column / kColumns].column + r
                                    : 0),
                        inside);
        else
          copy_16_async(to, left.du + (inside ? static_cast<std::int64_t>(t) * v.rank_max + r : 0),
                        inside);
      }
    }
    commit();
  };
  /// dy of a step, in its tile and in memory.
  const auto make = [&](int step) {
    each_chunk(step, [&](int t, int at, E* tile) {
      uint4& gate = *reinterpret_cast<uint4*>(tile);
      uint4& up = *reinterpret_cast<uint4*>(tile + P::kTile);
      silu_mul_grad_8<E, P::kLeft>(*reinterpret_cast<uint4*>(tile + 2 * P::kTile), gate, up);
      if (t >= v.t || at >= block.end) return;
      E* to = dy + static_cast<std::int64_t>(t) * width + at;
      *reinterpret_cast<uint4*>(to) = gate;
      *reinterpret_cast<uint4*>(to + to_up) = up;
    });
  };
  /// du of a step, from what the warps found.
  const auto store_du = [&](int step) {
    const float* sums_of_step = sums + step % 2 * kWarps * P::kSums;
    for (int e = tid; e < P::kSites * kRows * kColumns; e += kThreads) {
      const int row = e / kColumns % kRows, r = e % kColumns, of_half = e / kColumns / kRows;
      const int t = (first_step + step) * kRows + row;
      if (t >= v.t || r >= v.rank_max) continue;
      const float* from = sums_of_step + of_half * P::kSiteWarps * P::kSums;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < P::kSiteWarps; ++w) total += from[w * P::kSums + row * P::kSumRow + r];
      const int part_of_du = of_half * static_cast<int>(gridDim.y) + index;
      du_parts[(static_cast<std::int64_t>(part_of_du) * v.t + t) * v.rank_max + r] = total;
    }
  };

  // B of this warp's columns: lane (g, q) has rank g of each eight and columns 2q, 2q + 1, +8, +9.
  std::uint32_t b[kWarpColumns / 16][kColumns / 8][2];
#pragma unroll
  for (int k = 0; k < kWarpColumns; k += 16)
#pragma unroll
    for (int c = 0; c < kColumns; c += 8)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = first_n + k + 8 * j + lane % 4 * 2, r = c + lane / 4;
        const E* from = static_cast<const E*>(entry.b) +
                        static_cast<std::int64_t>(n - site.n_begin) * entry.rank + r;
        const bool here = r < entry.rank && n < end_n;  // n even, end_n a multiple of 8
        b[k / 16][c / 8][j] = here ? pack(from[0], from[entry.rank]) : std::uint32_t{0};
      }

  wait_for_inputs();
  for (int step = 0; step < P::kStages - 1; ++step) load(step);
  float db[kColumns / 16][kWarpColumns / 8][4] = {};
  float da[kColumns / 16][std::max(1, P::kLeftColumns / 8)][4] = {};
  const int left_column = warp * P::kLeftColumns;  // in the block
  for (int step = 0; step < steps; ++step) {
    wait<P::kStages - 2>();
    if constexpr (kMakes) make(step);
    __syncthreads();
    load(step + P::kStages - 1);
    if (step > 0) store_du(step - 1);
    const E* stage = tiles + step % P::kStages * P::kStage;
    const E* tile = stage + half * P::kTile;
    const E* factor = stage + P::kUAt + half * kColumns;
    float* to = sums + (step % 2 * kWarps + warp) * P::kSums;
#pragma unroll
    for (int t = 0; t < kRows; t += 16) {
      float du[kColumns / 8][4] = {};
      std::uint32_t f[kColumns / 16][4];
#pragma unroll
      for (int c = 0; c < kColumns; c += 16)
        load_matrices_transposed(
            f[c / 16], factor + (t + lane / 16 * 8 + lane % 8) * P::kURow + c + lane / 8 % 2 * 8);
#pragma unroll
      for (int k = 0; k < kWarpColumns; k += 16) {
        const int row = t + lane % 16, chunk = (warp_column + k) / kChunk + lane / 16;
        const E* at = tile + row * P::kWidth + swizzled(row, chunk);
        std::uint32_t x[4], y[4];
        load_matrices(x, at);
        load_matrices_transposed(y, at);
#pragma unroll
        for (int c = 0; c < kColumns; c += 8)
          mma<E>(du[c / 8], x[0], x[1], x[2], x[3], b[k / 16][c / 8][0], b[k / 16][c / 8][1]);
#pragma unroll
        for (int c = 0; c < kColumns / 16; ++c) {
          mma<E>(db[c][k / 8], f[c][0], f[c][1], f[c][2], f[c][3], y[0], y[1]);
          mma<E>(db[c][k / 8 + 1], f[c][0], f[c][1], f[c][2], f[c][3], y[2], y[3]);
        }
      }
      if constexpr (P::kLeft) {
        const E* of_left = stage + P::kUAt + 2 * kColumns;
#pragma unroll
        for (int c = 0; c < kColumns; c += 16)
          load_matrices_transposed(f[c / 16], of_left + (t + lane / 16 * 8 + lane % 8) * P::kURow +
                                                  c + lane / 8 % 2 * 8);
#pragma unroll
        for (int k = 0; k < P::kLeftColumns; k += 16) {
          const int row = t + lane % 16, chunk = (left_column + k) / kChunk + lane / 16;
          std::uint32_t y[4];
          load_matrices_transposed(y,
                                   stage + 2 * P::kTile + row * P::kWidth + swizzled(row, chunk));
#pragma unroll
          for (int c = 0; c < kColumns / 16; ++c) {
            mma<E>(da[c][k / 8], f[c][0], f[c][1], f[c][2], f[c][3], y[0], y[1]);
            mma<E>(da[c][k / 8 + 1], f[c][0], f[c][1], f[c][2], f[c][3], y[2], y[3]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; c += 8)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          *reinterpret_cast<float2*>(to + (t + lane / 4 + 8 * j) * P::kSumRow + c + lane % 4 * 2) =
              make_float2(du[c / 8][2 * j], du[c / 8][2 * j + 1]);
    }
  }
  wait<0>();
  __syncthreads();
  if (steps > 0) store_du(steps - 1);
#pragma unroll
  for (int c = 0; c < kColumns; c += 8)
#pragma unroll
    for (int n8 = 0; n8 < kWarpColumns; n8 += 8)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = first_n + n8 + lane % 4 * 2 + j, r = c + lane / 4;
        if (n < end_n && r < v.rank_max)
          db_parts[(static_cast<std::int64_t>(part) * width + n) * v.rank_max + r] =
              db[c / 16][n8 / 8][c / 8 % 2 * 2 + j];
      }
#pragma unroll
  for (int c = 0; c < kColumns; c += 8)
#pragma unroll
    for (int n8 = 0; n8 < P::kLeftColumns; n8 += 8) {
      const int n = block.begin + left_column + n8 + lane % 4 * 2, r = c + lane / 4;
      if (n < block.end && r < v.rank_max)  // both even
        *reinterpret_cast<float2*>(da_parts +
                                   (static_cast<std::int64_t>(part) * v.rank_max + r) * to_up + n) =
            make_float2(da[c / 16][n8 / 8][c / 8 % 2 * 2], da[c / 16][n8 / 8][c / 8 % 2 * 2 + 1]);
    }
#endif
}

/// du, dB and the dA left from their parts, and A of all sites as one matrix. Grid (blocks, sites).
template <class E>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const SegmentsView v, const SiteView left, int block_width, int parts,
                     const float* du_parts, const float* db_parts, const float* da_parts, int width,
                     E* du, int inputs, E* a) {
  const int first = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int stride = static_cast<int>(gridDim.x) * kThreads, pairs = v.rank_max / 2;
  launch_dependents();
  const int s = static_cast<int>(blockIdx.y);
  const auto blocks_of = [&](int other) {
    return (v.site[other].n + block_width - 1) / block_width;
  };
  int block = 0;
  for (int before = 0; before < s; ++before) block += blocks_of(before);
  const SiteView& site = v.site[s];
  const int blocks = blocks_of(s);
  const LoraEntry entry = find_entry(v, site, v.slots[0]);
  wait_for_inputs();
  for (int e = first; e < v.t * pairs; e += stride) {
    const int t = e / pairs, r = e % pairs * 2;
    float2 total = make_float2(0.0f, 0.0f);
    for (int k = 0; k < blocks; ++k) {
      const float2 x = *reinterpret_cast<const float2*>(
          du_parts + (static_cast<std::int64_t>(block + k) * v.t + t) * v.rank_max + r);
      total.x += x.x;
      total.y += x.y;
    }
    *reinterpret_cast<std::uint32_t*>(du + static_cast<std::int64_t>(t) * v.columns + site.column +
                                      r) = pack<E>(entry.scale * total.x, entry.scale * total.y);
  }
  for (int e = first; entry.db != nullptr && e < site.n * entry.rank; e += stride) {
    const int n = e / entry.rank, r = e % entry.rank;
    float total = 0.0f;
    for (int k = 0; k < parts; ++k)
      total += db_parts[(static_cast<std::int64_t>(k) * width + site.n_begin + n) * v.rank_max + r];
    entry.db[e] += total;
  }
  if (da_parts != nullptr) {
    const LoraEntry before = find_entry(v, left, v.slots[0]);
    const int own = before.da != nullptr ? before.rank * (width / 2) : 0;
    for (int e = first + s * stride; e < own; e += v.sites * stride) {
      float total = 0.0f;
      for (int k = 0; k < parts; ++k)
        total += da_parts[static_cast<std::int64_t>(k) * v.rank_max * (width / 2) + e];
      before.da[e] += total;
    }
  }
  if (a == nullptr) return;
  const int chunks = inputs / kChunk;
  const bool aligned = reinterpret_cast<std::uintptr_t>(entry.a) % 16 == 0;
  for (int e = first; e < v.rank_max * chunks; e += stride) {
    const int r = e / chunks, at = e % chunks * kChunk;
    const E* from = static_cast<const E*>(entry.a) + static_cast<std::int64_t>(r) * inputs + at;
    uint4 bits{0, 0, 0, 0};
    if (r < entry.rank) bits = load_8(from, 0, kChunk, aligned);
    *reinterpret_cast<uint4*>(a + static_cast<std::int64_t>(site.column + r) * inputs + at) = bits;
  }
}

/// What the passes take from their caller.
template <class E>
struct Call {
  cudaStream_t stream;
  SegmentsView v;
  int parts, blocks;
  MadeOf<E> made_of;
  Left<E> left;
  Tensor dy, u;
  float *du_parts, *db_parts, *da_parts;
};

template <int kColumns, int kWarpColumns, int kRows, Dy kDy, class E>
void start(const Call<E>& c) {
  using P = Pair<kColumns, kWarpColumns, kRows, kDy>;
  launch(c.stream, pair_kernel<E, kColumns, kWarpColumns, kRows, kDy>,
         dim3(static_cast<unsigned>(c.parts), static_cast<unsigned>(c.blocks / P::kSites)), 1,
         P::kBytes, kThreads, c.v, c.made_of, c.left, static_cast<E*>(c.dy.data),
         static_cast<int>(c.dy.dim(1)), static_cast<const E*>(c.u.data), c.du_parts, c.db_parts,
         c.da_parts);
}

template <Dy kDy, class E>
void start(const Call<E>& c, std::int64_t columns, std::int64_t width) {
  if (columns == 32) return width == 512 ? start<32, 64, 16, kDy>(c) : start<32, 32, 32, kDy>(c);
  if (width == 1024) return start<16, 128, 16, kDy>(c);
  return width == 512 ? start<16, 64, 16, kDy>(c) : start<16, 32, 32, kDy>(c);
}

template <class E>
void run(cudaStream_t stream, const ThinSites& sites, const ThinPairLayout& l,
         const SiluMulBackwardArgs& make_dy, const LeftFactorGrad& left, const Tensor& dy,
         const Tensor& u, const Tensor& du, const Tensor& a, const Scratch& scratch) {
  const int blocks = static_cast<int>(l.blocks), parts = static_cast<int>(l.parts);
  const bool leaves = left.du.defined();
  const Call<E> call{
      stream,
      segments_view(sites.sites, 0, sites.rows, dy.dim(0)),
      parts,
      blocks,
      {static_cast<const E*>(make_dy.gate_up.data), static_cast<const E*>(make_dy.dout.data)},
      leaves ? Left<E>{segments_view(left.sites, 0, sites.rows, dy.dim(0)).site[0],
                       left.du.as<const E>()}
             : Left<E>{},
      dy,
      u,
      scratch.at<float>(l.du),
      scratch.at<float>(l.db),
      leaves ? scratch.at<float>(l.da) : nullptr};
  if (leaves)
    start<Dy::kMadeWithLeft>(call, l.columns, 2 * l.width);
  else if (l.makes_dy)
    start<Dy::kMade>(call, l.columns, 2 * l.width);
  else
    start<Dy::kGiven>(call, l.columns, l.width);
  constexpr unsigned kAddBlocks = 264;  // over all sites
  const auto count = static_cast<unsigned>(call.v.sites);
  launch_early("add_parts_kernel", add_parts_kernel<E>, dim3(kAddBlocks / count, count),
               dim3(kThreads), 0, stream, call.v, call.left.site, static_cast<int>(l.width), parts,
               static_cast<const float*>(call.du_parts), static_cast<const float*>(call.db_parts),
               static_cast<const float*>(call.da_parts), static_cast<int>(dy.dim(1)), du.as<E>(),
               a.defined() ? static_cast<int>(a.dim(1)) : 0, static_cast<E*>(a.data));
}

}  // namespace
}  // namespace thin

void lora_thin_pair(cudaStream_t stream, const ThinSites& sites, const ThinPairLayout& l,
                    const SiluMulBackwardArgs& make_dy, const LeftFactorGrad& left,
                    const Tensor& dy, const Tensor& u, const Tensor& du, const Tensor& a,
                    const Scratch& scratch) {
  if (dy.dim(0) == 0) return;
  with_element(dy.dtype, [&]<class E>(E) {
    thin::run<E>(stream, sites, l, make_dy, left, dy, u, du, a, scratch);
  });
}

}  // namespace tandem::kernels::cuda
