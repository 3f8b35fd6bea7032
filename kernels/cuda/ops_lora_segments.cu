// Low-rank products of rows with any mix of adapters, forward. In bf16 every row goes through the
// tensor cores in one order of sums, whatever else is in the batch; f32 is the plain form.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/lora_rows.cuh"
#include "kernels/cuda/mma.cuh"

#include <cooperative_groups.h>

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

namespace cg = cooperative_groups;
using bf16_t = __nv_bfloat16;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRanks = 16;   ///< of A that a block computes at a time
constexpr int kPiece = 128;  ///< of I that a warp takes at a time
constexpr int kClusterMax = 8;

/// Blocks that share the inputs of one tile: enough of them that a decode step's few adapters
/// occupy the device. Of I alone, because it decides the order of a row's sum.
unsigned shrink_blocks(std::int64_t i, int capability) {
  if (capability < 90) return 1;
  unsigned blocks = 1;
  while (blocks < kClusterMax && 2 * blocks * kWarps * kPiece < i) blocks *= 2;
  return blocks;
}

__device__ uint4 drop_8(uint4 x, const DropoutMask& mask, std::int64_t row, int column) {
  std::uint32_t* pairs = &x.x;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float v[4] = {low_f32(pairs[2 * h]), high_f32(pairs[2 * h]), low_f32(pairs[2 * h + 1]),
                  high_f32(pairs[2 * h + 1])};
    mask.apply_group(row, column + 4 * h, v);
    pairs[2 * h] = pack_bf16(v[0], v[1]);
    pairs[2 * h + 1] = pack_bf16(v[2], v[3]);
  }
  return x;
}

/// u of kTiles * 8 rows of one segment and kRanks of one site. Block (part of I, tile, site and
/// ranks); blocks of a cluster are the parts. A is the tensor cores' A, rows their columns.
template <int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 3 : 1)
    shrink_kernel(const SegmentsView v, const bf16_t* x, int columns, bf16_t* u) {
  constexpr int kRows = 8 * kTiles, kOut = kRows * kRanks;
  __shared__ float parts[kWarps][kOut];
  __shared__ float sums[kOut];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");  // see small_product.cuh
#endif
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  const SiteView& site = v.site[blockIdx.z % v.sites];
  const int first_rank = static_cast<int>(blockIdx.z) / v.sites * kRanks;
  const AdapterTile tile = find_adapter_tile<kRows>(v, static_cast<int>(blockIdx.y));
  if (tile.begin == tile.end) return;
  const LoraEntry entry = find_entry(v, site, tile.slot);
  bf16_t* out = u + static_cast<std::int64_t>(tile.begin) * v.columns + site.column + first_rank;
  const int rows = tile.end - tile.begin, ranks = min(kRanks, v.rank_max - first_rank);
  if (first_rank >= entry.rank) {
    if (blockIdx.x != 0) return;
    for (int e = static_cast<int>(threadIdx.x); e < rows * kRanks; e += kThreads)
      if (e % kRanks < ranks)
        out[static_cast<std::int64_t>(e / kRanks) * v.columns + e % kRanks] = store_as<bf16_t>(0);
    return;
  }
  const auto* a =
      static_cast<const bf16_t*>(entry.a) + static_cast<std::int64_t>(first_rank) * columns;
  const bf16_t* a_low = a + static_cast<std::int64_t>(g) * columns;
  const bf16_t* a_high = a_low + static_cast<std::int64_t>(8) * columns;
  const int n_low = first_rank + g < entry.rank ? columns : 0;
  const int n_high = first_rank + g + 8 < entry.rank ? columns : 0;
  const bf16_t* x_rows = x + static_cast<std::int64_t>(tile.begin + g) * columns;
  const bool vectors = columns % 8 == 0 && reinterpret_cast<std::uintptr_t>(entry.a) % 16 == 0 &&
                       reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
  const DropoutMask mask(v, site, columns);
  constexpr int kSteps = kTiles == 1 ? kPiece / 32 : 1;  // whose loads are in flight together
  float c[kTiles][4] = {};
  const int stride = kPiece * kWarps * static_cast<int>(gridDim.x);
  for (int piece = kPiece * (kWarps * static_cast<int>(blockIdx.x) + warp); piece < columns;
       piece += stride) {
    for (int step = 0; step < kPiece / 32; step += kSteps) {
      uint4 low[kSteps], high[kSteps], in[kSteps][kTiles];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int k = piece + (step + s) * 32 + 8 * q;
        low[s] = load_8(a_low, k, n_low, vectors);
        high[s] = load_8(a_high, k, n_high, vectors);
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          in[s][t] = load_8(x_rows + static_cast<std::int64_t>(8 * t) * columns, k,
                            g + 8 * t < rows ? columns : 0, vectors);
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (mask.drops())
            in[s][t] =
                drop_8(in[s][t], mask, tile.begin + g + 8 * t, piece + (step + s) * 32 + 8 * q);
          mma_bf16(c[t], low[s].x, high[s].x, low[s].y, high[s].y, in[s][t].x, in[s][t].y);
          mma_bf16(c[t], low[s].z, high[s].z, low[s].w, high[s].w, in[s][t].z, in[s][t].w);
        }
    }
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
            store_as<bf16_t>(entry.scale * sum);
    }
  }
#if __CUDA_ARCH__ >= 900
  cluster.sync();  // a block's memory lives until the first has read it
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

/// Eight neighbouring outputs of a row.
template <class Y>
struct Outputs {
  Vec<Y> at[8 / Vec<Y>::kSize];
  __device__ void load(const Y* y, int n, bool vectors) {
#pragma unroll
    for (int j = 0; j < 8 / Vec<Y>::kSize; ++j) {
      if (vectors && n >= 8) {
        at[j] = load_vec(y + j * Vec<Y>::kSize);
        continue;
      }
#pragma unroll
      for (int e = 0; e < Vec<Y>::kSize; ++e)
        at[j].at[e] = j * Vec<Y>::kSize + e < n ? y[j * Vec<Y>::kSize + e] : store_as<Y>(0.0f);
    }
  }
  /// Rounded once.
  __device__ void add(int j, float x) {
    Y& to = at[j / Vec<Y>::kSize].at[j % Vec<Y>::kSize];
    to = store_as<Y>(load_f32(to) + x);
  }
  __device__ void store(Y* y, int n, bool vectors) const {
#pragma unroll
    for (int j = 0; j < 8 / Vec<Y>::kSize; ++j) {
      if (vectors && n >= 8) {
        store_vec(y + j * Vec<Y>::kSize, at[j]);
        continue;
      }
#pragma unroll
      for (int e = 0; e < Vec<Y>::kSize; ++e)
        if (j * Vec<Y>::kSize + e < n) y[j * Vec<Y>::kSize + e] = at[j].at[e];
    }
  }
};

/// Each warp: one tile of rows and kOutputs outputs. Block (outputs, warps' tiles). Rows are the
/// tensor cores' A. Column g of product j is output 32 (j / 4) + 8 (g / 2) + 2 (j % 4) + g % 2, so
/// that a lane ends with 8 neighbours.
template <class Y>
__global__ void __launch_bounds__(kThreads, 2)
    expand_kernel(const SegmentsView v, const bf16_t* u, Y* y, int width, int tiles) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  int s = 0, n0 = static_cast<int>(blockIdx.x) * kOutputs;
  for (; s + 1 < v.sites; ++s) {
    const int padded = (v.site[s].n + kOutputs - 1) / kOutputs * kOutputs;
    if (n0 < padded) break;
    n0 -= padded;
  }
  const SiteView& site = v.site[s];
  const bool y_vectors = width % 8 == 0 && (site.n_begin + n0) % 8 == 0 &&
                         reinterpret_cast<std::uintptr_t>(y) % 16 == 0;
  const bool u_vectors =
      v.columns % 4 == 0 && site.column % 4 == 0 && reinterpret_cast<std::uintptr_t>(u) % 8 == 0;
  // Few tiles spread over all blocks of a column.
  for (int index = warp * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y); index < tiles;
       index += static_cast<int>(gridDim.y) * kWarps) {
    const AdapterTile tile = find_adapter_tile<kTileRows>(v, index);
    if (tile.begin == tile.end) return;
    const LoraEntry entry = find_entry(v, site, tile.slot);
    const int rank = entry.rank, rows = tile.end - tile.begin;
    if (rank == 0) continue;
    const auto* b = static_cast<const bf16_t*>(entry.b) + static_cast<std::int64_t>(n0) * rank;
    const bool b_vectors = rank % 4 == 0 && reinterpret_cast<std::uintptr_t>(entry.b) % 8 == 0;
    const bf16_t* u_low = u + static_cast<std::int64_t>(tile.begin + g) * v.columns + site.column;
    const bf16_t* u_high = u_low + static_cast<std::int64_t>(8) * v.columns;
    Y* y_low = y + static_cast<std::int64_t>(tile.begin + g) * width + site.n_begin + n0 + 8 * q;
    const int n_left = site.n - n0 - 8 * q;
    Outputs<Y> out[2][2];  // rows g and g + 8, outputs 8 q and 32 + 8 q
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int part = 0; part < 2; ++part)
        out[half][part].load(y_low + static_cast<std::int64_t>(8 * half) * width + 32 * part,
                             g + 8 * half < rows ? n_left - 32 * part : 0, y_vectors);
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
      for (int j = 0; j < 8; ++j) mma_bf16(c[j], low.x, high.x, low.y, high.y, in[j].x, in[j].y);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int j = 0; j < 8; ++j) out[half][part].add(j, c[4 * part + j / 2][2 * half + j % 2]);
        out[half][part].store(y_low + static_cast<std::int64_t>(8 * half) * width + 32 * part,
                              g + 8 * half < rows ? n_left - 32 * part : 0, y_vectors);
      }
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

template <int kTiles>
void launch_shrink(cudaStream_t stream, const SegmentsView& v, const Tensor& x, const Tensor& u) {
  const auto ranks = static_cast<unsigned>((v.rank_max + kRanks - 1) / kRanks);
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};
  const unsigned blocks = shrink_blocks(x.dim(1), device_capability());
  config.gridDim = dim3(blocks, tiles_max(v, 8 * kTiles), ranks * static_cast<unsigned>(v.sites));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = device_capability() >= 90 ? 1 : 0;
  TANDEM_CUDA(cudaLaunchKernelEx(&config, shrink_kernel<kTiles>, v, x.as<const bf16_t>(),
                                 static_cast<int>(x.dim(1)), u.as<bf16_t>()));
}

}  // namespace

void lora_segments_shrink(cudaStream_t stream, const std::vector<LoraSite>& sites,
                          const AdapterRows& rows, Tensor x, Tensor u) {
  for (std::size_t first = 0; first < sites.size(); first += kSitesMax) {
    const SegmentsView v = segments_view(sites, first, rows, x.dim(0));
    if (x.dtype == DType::kF32) {
      shrink_f32_kernel<<<dim3(static_cast<unsigned>(v.t), static_cast<unsigned>(v.sites)),
                          kThreads, 0, stream>>>(v, x.as<float>(), static_cast<int>(x.dim(1)),
                                                 u.as<float>());
      TANDEM_LAUNCHED("shrink_f32_kernel");
    } else if (v.t <= 128) {
      launch_shrink<1>(stream, v, x, u);
    } else {
      launch_shrink<8>(stream, v, x, u);
    }
  }
}

void lora_segments_expand(cudaStream_t stream, const std::vector<LoraSite>& sites,
                          const AdapterRows& rows, Tensor u, Tensor y) {
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
    const unsigned tiles = tiles_max(v, kTileRows);
    // Enough blocks to fill the device once; warps walk over what tiles there are.
    const unsigned most = v.t <= 128 ? 396 / blocks + 1 : 64;
    const dim3 grid(blocks, std::min((tiles + kWarps - 1) / kWarps, most));
    if (y.dtype == DType::kF32)
      expand_kernel<<<grid, kThreads, 0, stream>>>(v, u.as<bf16_t>(), y.as<float>(), width,
                                                   static_cast<int>(tiles));
    else
      expand_kernel<<<grid, kThreads, 0, stream>>>(v, u.as<bf16_t>(), y.as<bf16_t>(), width,
                                                   static_cast<int>(tiles));
    TANDEM_LAUNCHED("expand_kernel");
  }
}

}  // namespace tandem::kernels::cuda
