// What precedes the fast attention kernels: the list of tiles, longest first, and zeroes where rows
// are inert.
#include "kernels/cuda/attention_own.cuh"

#include <algorithm>
#include <bit>

namespace tandem::kernels::cuda::own {
namespace {

constexpr int kSortThreads = 1024;
constexpr int kBuckets = kSortThreads;

/// A counting sort by rows of work, in buckets of 2^shift rows. Order inside a bucket depends on
/// timing: it decides which block works when, never what is added to what.
__device__ void sort_tiles(const Prepare& a, bool suffix, RowTile* to) {
  __shared__ int slots[kBuckets];
  __shared__ int warp_sums[32];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const auto for_tiles = [&](const auto& f) {
    for (int s = warp; s < a.sequences; s += kSortThreads / 32) {
      // Tiles end at multiples of kTileRows of the position, so that a tile's rows see their own
      // keys in one block.
      const int begin = a.offsets[s], rows = a.offsets[s + 1] - begin;
      const int length = a.kv_lens != nullptr ? a.kv_lens[s] : rows, before = length - rows;
      if (rows < a.rows_min) continue;
      for (int t = (before / kTileRows + lane) * kTileRows; t < length; t += 32 * kTileRows) {
        const int first = max(before, t), end = min(length, t + kTileRows);
        const int work = suffix ? length - first : end;
        f(RowTile{begin - before, length, first, (end - first) | s << kTileRowsBits},
          kBuckets - 1 - min(work >> a.shift, kBuckets - 1));
      }
    }
  };
  slots[thread] = 0;
  __syncthreads();
  for_tiles([&](const RowTile&, int bucket) { atomicAdd(&slots[bucket], 1); });
  __syncthreads();
  const int own = slots[thread];
  int through = own;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, through, step);
    if (lane >= step) through += other;
  }
  if (lane == 31) warp_sums[warp] = through;
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; ++w) before += warp_sums[w];
  slots[thread] = before + through - own;
  if (thread == kSortThreads - 1) *a.count = before + through;
  __syncthreads();
  for_tiles([&](const RowTile& tile, int bucket) { to[atomicAdd(&slots[bucket], 1)] = tile; });
}

__device__ void zero_from(char* base, std::int64_t first, std::int64_t rows, std::int64_t row_bytes,
                          int block, int blocks) {
  for (std::int64_t i = first * row_bytes / 4 + std::int64_t{block} * kSortThreads + threadIdx.x;
       i < rows * row_bytes / 4; i += std::int64_t{blocks} * kSortThreads)
    reinterpret_cast<std::uint32_t*>(base)[i] = 0;
}

/// 16 bytes a thread, `lanes` threads a row.
template <class E>
__device__ void row_deltas(const Prepare& a, int block, int blocks) {
  const int lane = static_cast<int>(threadIdx.x) % a.lanes;
  const std::int64_t step = std::int64_t{blocks} * kSortThreads / a.lanes;
  for (std::int64_t row = (std::int64_t{block} * kSortThreads + threadIdx.x) / a.lanes;
       row < (a.delta_rows + 31) / 32 * 32; row += step) {  // whole warps, for the shuffles
    float sum = 0.0f;
    if (row < a.delta_rows) {
      const uint4 x = __ldg(static_cast<const uint4*>(a.dout) + row * a.lanes + lane),
                  y = __ldg(static_cast<const uint4*>(a.out) + row * a.lanes + lane);
      const std::uint32_t *f = &x.x, *g = &y.x;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum = fmaf(low_f32<E>(f[i]), low_f32<E>(g[i]),
                   fmaf(high_f32<E>(f[i]), high_f32<E>(g[i]), sum));
    }
    for (int to = a.lanes / 2; to > 0; to /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, to);
    if (row < a.delta_rows && lane == 0) a.delta[row] = sum;
  }
}

/// Blocks 0 and 1 sort, the others zero and sum.
template <class E>
__global__ void __launch_bounds__(kSortThreads) prepare_kernel(Prepare a) {
  launch_dependents();
  if (blockIdx.x == 0) return sort_tiles(a, false, a.by_prefix);
  if (blockIdx.x == 1) {
    if (a.by_suffix != nullptr) sort_tiles(a, true, a.by_suffix);
    return;
  }
  const std::int64_t first = a.offsets[a.sequences];
  const int block = static_cast<int>(blockIdx.x) - 2, blocks = static_cast<int>(gridDim.x) - 2;
  if (a.zero0 != nullptr) zero_from(a.zero0, first, a.tokens, a.zero0_bytes, block, blocks);
  if (a.zero1 != nullptr) zero_from(a.zero1, first, a.tokens, a.zero1_bytes, block, blocks);
  if (a.delta != nullptr) row_deltas<E>(a, block, blocks);
}

}  // namespace

void prepare(cudaStream_t stream, const Prepare& args, std::int64_t seq_len_max) {
  Prepare a = args;
  // Lengths beyond the last bucket share it.
  a.shift = std::max(
      0, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(seq_len_max) / kBuckets)));
  const int blocks = a.delta != nullptr ? 2 * multiprocessors() : 32;
  with_element(a.dtype, [&]<class E>(E) {
    prepare_kernel<E><<<static_cast<unsigned>(2 + blocks), kSortThreads, 0, stream>>>(a);
  });
  TANDEM_LAUNCHED("attention prepare_kernel");
}

int multiprocessors() {
  static const int count = [] {
    int device = 0, n = 0;
    TANDEM_CUDA(cudaGetDevice(&device));
    TANDEM_CUDA(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device));
    return n;
  }();
  return count;
}

}  // namespace tandem::kernels::cuda::own
