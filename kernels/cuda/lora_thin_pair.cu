// du = s dy B and dB += dy^T u in one pass over dy. A block takes neighbouring columns of one site
// and a part of the rows; its warps lie side by side over the columns, hold B there and the sum of
// dB in registers, and add up du of every few rows through shared memory. What blocks found lies in
// scratch, [block of columns][T, rank_max] of du and [part of the rows][N, rank_max] of dB, a few
// percent of dy's bytes, until a second launch adds it up in order.
#include "kernels/cuda/lora_thin.cuh"

namespace tandem::kernels::cuda {
namespace thin {
namespace {

/// What a block holds: kColumns ranks, kWarpColumns of dy a warp, kRows rows a step.
template <int kColumns, int kWarpColumns, int kRows>
struct Pair {
  static constexpr int kWidth = kWarps * kWarpColumns;
  static constexpr int kWide = kRows * kWidth;
  static constexpr int kURow = kColumns + kChunk;
  static constexpr int kStage = kWide + kRows * kURow;
  static constexpr int kStageBytes = 2 * kStage;
  static constexpr int kStages = std::min(8, ((kWidth == 1024 ? 120 : 72) << 10) / kStageBytes);
  static constexpr int kSumRow = kColumns + 4, kSums = kRows * kSumRow;
  static constexpr std::size_t kSumsAt = sizeof(bf16_t) * kStages * kStage;
  static constexpr std::size_t kBytes = kSumsAt + sizeof(float) * 2 * kWarps * kSums;
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

/// Grid (parts of the rows, blocks of columns).
template <int kColumns, int kWarpColumns, int kRows>
__global__ void __launch_bounds__(kThreads)
    pair_kernel(const SegmentsView v, const bf16_t* dy, int width, const bf16_t* u, float* du_parts,
                float* db_parts) {
#if __CUDA_ARCH__ >= 900
  using P = Pair<kColumns, kWarpColumns, kRows>;
  extern __shared__ __align__(128) unsigned char memory[];
  auto* tiles = reinterpret_cast<bf16_t*>(memory);
  auto* sums = reinterpret_cast<float*>(memory + P::kSumsAt);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int index = static_cast<int>(blockIdx.y);
  const ColumnBlock block = find_block(v, P::kWidth, index);
  const SiteView& site = v.site[block.site];
  const LoraEntry entry = find_entry(v, site, v.slots[0]);
  const int parts = static_cast<int>(gridDim.x), part = static_cast<int>(blockIdx.x);
  const int steps_all = (v.t + kRows - 1) / kRows;
  const int steps_part = (steps_all + parts - 1) / parts;
  const int first_step = part * steps_part;
  const int steps = max(0, min(steps_part, steps_all - first_step));

  const auto load = [&](int step) {
    if (step < steps) {
      bf16_t* tile = tiles + step % P::kStages * P::kStage;
      const int t0 = (first_step + step) * kRows;
#pragma unroll
      for (int e = tid; e < P::kWide / kChunk; e += kThreads) {
        const int row = e / (P::kWidth / kChunk), chunk = e % (P::kWidth / kChunk);
        const int at = block.begin + chunk * kChunk;
        const bool inside = t0 + row < v.t && at < block.end;
        copy_16_async(tile + row * P::kWidth + swizzled(row, chunk),
                      dy + (inside ? static_cast<std::int64_t>(t0 + row) * width + at : 0), inside);
      }
      for (int e = tid; e < kRows * kColumns / kChunk; e += kThreads) {
        const int row = e / (kColumns / kChunk), at = e % (kColumns / kChunk) * kChunk;
        const bool inside = t0 + row < v.t && at < v.rank_max;
        copy_16_async(
            tile + P::kWide + row * P::kURow + at,
            u + (inside ? static_cast<std::int64_t>(t0 + row) * v.columns + site.column + at : 0),
            inside);
      }
    }
    commit();
  };
  /// du of a step, from what the warps found.
  const auto store_du = [&](int step) {
    const float* from = sums + step % 2 * kWarps * P::kSums;
    for (int e = tid; e < kRows * kColumns; e += kThreads) {
      const int row = e / kColumns, r = e % kColumns, t = (first_step + step) * kRows + row;
      if (t >= v.t || r >= v.rank_max) continue;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += from[w * P::kSums + row * P::kSumRow + r];
      du_parts[(static_cast<std::int64_t>(index) * v.t + t) * v.rank_max + r] = total;
    }
  };

  for (int step = 0; step < P::kStages - 1; ++step) load(step);
  // B of this warp's columns: lane (g, q) has rank g of each eight and columns 2q, 2q + 1, +8, +9.
  std::uint32_t b[kWarpColumns / 16][kColumns / 8][2];
#pragma unroll
  for (int k = 0; k < kWarpColumns; k += 16)
#pragma unroll
    for (int c = 0; c < kColumns; c += 8)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = block.begin + warp * kWarpColumns + k + 8 * half + lane % 4 * 2;
        const int r = c + lane / 4;
        const bf16_t* from = static_cast<const bf16_t*>(entry.b) +
                             static_cast<std::int64_t>(n - site.n_begin) * entry.rank + r;
        const bool here = r < entry.rank && n < block.end;  // n even, block.end a multiple of 8
        b[k / 16][c / 8][half] = here ? pack_bf16(from[0], from[entry.rank]) : std::uint32_t{0};
      }

  float db[kColumns / 16][kWarpColumns / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait<P::kStages - 2>();
    __syncthreads();
    load(step + P::kStages - 1);
    if (step > 0) store_du(step - 1);
    const bf16_t* tile = tiles + step % P::kStages * P::kStage;
    const bf16_t* factor = tile + P::kWide;
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
        const int row = t + lane % 16, chunk = (warp * kWarpColumns + k) / kChunk + lane / 16;
        const bf16_t* at = tile + row * P::kWidth + swizzled(row, chunk);
        std::uint32_t x[4], y[4];
        load_matrices(x, at);
        load_matrices_transposed(y, at);
#pragma unroll
        for (int c = 0; c < kColumns; c += 8)
          mma_bf16(du[c / 8], x[0], x[1], x[2], x[3], b[k / 16][c / 8][0], b[k / 16][c / 8][1]);
#pragma unroll
        for (int c = 0; c < kColumns / 16; ++c) {
          mma_bf16(db[c][k / 8], f[c][0], f[c][1], f[c][2], f[c][3], y[0], y[1]);
          mma_bf16(db[c][k / 8 + 1], f[c][0], f[c][1], f[c][2], f[c][3], y[2], y[3]);
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; c += 8)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(to + (t + lane / 4 + 8 * half) * P::kSumRow + c +
                                     lane % 4 * 2) =
              make_float2(du[c / 8][2 * half], du[c / 8][2 * half + 1]);
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
        const int n = block.begin + warp * kWarpColumns + n8 + lane % 4 * 2 + j, r = c + lane / 4;
        if (n < block.end && r < v.rank_max)
          db_parts[(static_cast<std::int64_t>(part) * width + n) * v.rank_max + r] =
              db[c / 16][n8 / 8][c / 8 % 2 * 2 + j];
      }
#endif
}

/// du and dB from their parts, and A of all sites as one matrix.
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const SegmentsView v, int block_width, int parts, const float* du_parts,
                     const float* db_parts, int width, bf16_t* du, int inputs, bf16_t* a) {
  const int first = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int stride = static_cast<int>(gridDim.x) * kThreads, pairs = v.rank_max / 2;
  int block = 0;
  for (int s = 0; s < v.sites; ++s) {
    const SiteView& site = v.site[s];
    const LoraEntry entry = find_entry(v, site, v.slots[0]);
    const int blocks = (site.n + block_width - 1) / block_width;
    for (int e = first; e < v.t * pairs; e += stride) {
      const int t = e / pairs, r = e % pairs * 2;
      float2 total = make_float2(0.0f, 0.0f);
      for (int k = 0; k < blocks; ++k) {
        const float2 x = *reinterpret_cast<const float2*>(
            du_parts + (static_cast<std::int64_t>(block + k) * v.t + t) * v.rank_max + r);
        total.x += x.x;
        total.y += x.y;
      }
      *reinterpret_cast<std::uint32_t*>(du + static_cast<std::int64_t>(t) * v.columns +
                                        site.column + r) =
          pack_bf16(entry.scale * total.x, entry.scale * total.y);
    }
    block += blocks;
    for (int e = first; entry.db != nullptr && e < site.n * entry.rank; e += stride) {
      const int n = e / entry.rank, r = e % entry.rank;
      float total = 0.0f;
      for (int k = 0; k < parts; ++k)
        total +=
            db_parts[(static_cast<std::int64_t>(k) * width + site.n_begin + n) * v.rank_max + r];
      entry.db[e] += total;
    }
    if (a == nullptr) continue;
    const int chunks = inputs / kChunk;
    const bool aligned = reinterpret_cast<std::uintptr_t>(entry.a) % 16 == 0;
    for (int e = first; e < v.rank_max * chunks; e += stride) {
      const int r = e / chunks, at = e % chunks * kChunk;
      const bf16_t* from =
          static_cast<const bf16_t*>(entry.a) + static_cast<std::int64_t>(r) * inputs + at;
      uint4 bits{0, 0, 0, 0};
      if (r < entry.rank) bits = load_8(from, 0, kChunk, aligned);
      *reinterpret_cast<uint4*>(a + static_cast<std::int64_t>(site.column + r) * inputs + at) =
          bits;
    }
  }
}

template <int kColumns, int kWarpColumns, int kRows>
void start(cudaStream_t stream, const SegmentsView& v, int parts, int blocks, const Tensor& dy,
           const Tensor& u, float* du_parts, float* db_parts) {
  launch(stream, pair_kernel<kColumns, kWarpColumns, kRows>,
         dim3(static_cast<unsigned>(parts), static_cast<unsigned>(blocks)), 1,
         Pair<kColumns, kWarpColumns, kRows>::kBytes, v, dy.as<const bf16_t>(),
         static_cast<int>(dy.dim(1)), u.as<const bf16_t>(), du_parts, db_parts);
}

}  // namespace
}  // namespace thin

void lora_thin_pair(cudaStream_t stream, const ThinSites& sites, const ThinPairLayout& l,
                    const Tensor& dy, const Tensor& u, const Tensor& du, const Tensor& a,
                    float* du_parts, float* db_parts) {
  if (dy.dim(0) == 0) return;
  const SegmentsView v = segments_view(sites.sites, 0, sites.rows, dy.dim(0));
  const auto start = l.columns == 64 ? thin::start<64, 32, 16>
                     : l.columns == 32
                         ? (l.width == 512 ? thin::start<32, 64, 16> : thin::start<32, 32, 32>)
                     : l.width == 1024 ? thin::start<16, 128, 16>
                     : l.width == 512  ? thin::start<16, 64, 16>
                                       : thin::start<16, 32, 32>;
  const int blocks = static_cast<int>(l.blocks), parts = static_cast<int>(l.parts);
  start(stream, v, parts, blocks, dy, u, du_parts, db_parts);
  thin::add_parts_kernel<<<264, thin::kThreads, 0, stream>>>(
      v, static_cast<int>(l.width), parts, du_parts, db_parts, static_cast<int>(dy.dim(1)),
      du.as<thin::bf16_t>(), a.defined() ? static_cast<int>(a.dim(1)) : 0,
      a.defined() ? a.as<thin::bf16_t>() : nullptr);
  TANDEM_LAUNCHED("add_parts_kernel");
}

}  // namespace tandem::kernels::cuda
