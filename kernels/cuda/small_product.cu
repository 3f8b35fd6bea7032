// A block computes kRows outputs of all rows from its part of I; blocks of a cluster hold the other
// parts and add up in one order. W and x come through a ring of stages in shared memory; outputs
// are the tensor cores' rows, rows of x their columns. Adapters of eight rows at a time go into the
// same sums in the last steps, while the rest of W is on its way.
#include "kernels/cuda/small_product.cuh"

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/lora_rows.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/shared_tiles.cuh"

#include <cooperative_groups.h>

namespace tandem::kernels::cuda {
namespace {

namespace cg = cooperative_groups;
using bf16_t = __nv_bfloat16;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 32 * kWarps;  ///< outputs of a block
constexpr int kDepth = 64;          ///< of I in a stage
constexpr int kClusterMax = 8;
constexpr int kResident = 264;  ///< blocks that an H100 holds at once

struct SmallProduct {
  const bf16_t *x, *w, *bias, *u;
  void* y;
  bool y_f32;
  int t, n, inputs;
};

template <int kColumns>
struct Stage {
  bf16_t w[kRows * kDepth];
  bf16_t x[kColumns * kDepth];
};

template <int kColumns, int kStages>
union Shared {
  Stage<kColumns> stage[kStages];
  float sums[kColumns][kRows + 4];
};

/// Rows [0, kCount) of a matrix with `inputs` columns, columns [k, k + kDepth); zeros from row
/// `present` on.
template <int kCount>
__device__ inline void copy_rows(const bf16_t* from, std::int64_t inputs, int k, int present,
                                 bf16_t* to) {
  constexpr int kChunks = kDepth / 8;
#pragma unroll
  for (int i = 0; i < (kCount * kChunks + kThreads - 1) / kThreads; ++i) {
    const int e = static_cast<int>(threadIdx.x) + i * kThreads, r = e / kChunks, c = e % kChunks;
    if (kCount * kChunks % kThreads != 0 && r >= kCount) break;
    const bool is = r < present;
    copy_16_async(to + chunk_at<kDepth>(r, c), from + (is ? r * inputs : 0) + k + 8 * c, is);
  }
}

/// Which adapter each row carries, read once.
template <int kColumns>
struct RowAdapters {
  int slot[kColumns];
  int rank[kSitesMax][kColumns];
  const bf16_t* b[kSitesMax][kColumns];

  /// Called by all threads; the caller's next barrier ends it.
  __device__ void load(const SegmentsView& v) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kColumns) slot[thread] = -1;
    __syncthreads();
    for (int s = thread; s < v.segments; s += kThreads) {
      const int begin = v.offsets[s], end = v.offsets[s + 1], own = v.slots[s];
      if (begin < 0 || end > v.t) __trap();
      for (int t = begin; t < end; ++t) slot[t] = own;
    }
    __syncthreads();
    for (int e = thread; e < v.sites * kColumns; e += kThreads) {
      const LoraEntry entry = find_entry(v, v.site[e / kColumns], slot[e % kColumns]);
      rank[e / kColumns][e % kColumns] = entry.rank;
      b[e / kColumns][e % kColumns] = static_cast<const bf16_t*>(entry.b);
    }
  }
  /// Row t is the first of rows first .. t that carries its adapter.
  __device__ bool leads(int first, int t) const {
    for (int r = first; r < t; ++r)
      if (slot[r] == slot[t]) return false;
    return slot[t] >= 0;
  }
};

/// sum[m] of outputs n0 + 16 m + {g, g + 8} and rows t0 + 2q + {0, 1} += B u. A row's sum takes
/// nothing from other rows' adapters, infinite ones included.
template <int kColumns>
__device__ void add_adapters(const SegmentsView& v, const RowAdapters<kColumns>& rows,
                             const bf16_t* u, int n0, int t0, float (&sum)[2][4]) {
  constexpr int kTogether = 4;  // adapters whose loads are in flight
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
  const int slots[2] = {rows.slot[t0 + 2 * q], rows.slot[t0 + 2 * q + 1]};
  for (int s = 0; s < v.sites; ++s) {
    const int first = n0 - v.site[s].n_begin, outputs = v.site[s].n;
    if (first + 32 <= 0 || first >= outputs) continue;
    const bf16_t* own_u = u + static_cast<std::int64_t>(t0 + g) * v.columns + v.site[s].column;
    const int own_rank = rows.rank[s][t0 + g];
    const bool u_vectors = own_rank % 4 == 0 && reinterpret_cast<std::uintptr_t>(own_u) % 8 == 0;
    for (int k = 0; k < v.rank_max; k += 16) {
      const uint2 in = load_4(own_u, k + 4 * q, own_rank, u_vectors);
      for (int i = 0; i < 8; i += kTogether) {
        uint2 low[kTogether][2], high[kTogether][2];
        bool used[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int t = t0 + i + j, rank = rows.rank[s][t];
          used[j] = rank > k && rows.leads(t0, t);
          const bf16_t* b = rows.b[s][t];
          const bool vectors = rank % 4 == 0 && reinterpret_cast<std::uintptr_t>(b) % 8 == 0;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const int n = first + 16 * m + g;
            low[j][m] = load_4(b + static_cast<std::int64_t>(n) * rank, k + 4 * q,
                               used[j] && n >= 0 && n < outputs ? rank : 0, vectors);
            high[j][m] = load_4(b + static_cast<std::int64_t>(n + 8) * rank, k + 4 * q,
                                used[j] && n + 8 >= 0 && n + 8 < outputs ? rank : 0, vectors);
          }
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (!used[j]) continue;
          const int slot = rows.slot[t0 + i + j];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            float c[4] = {};
            mma_bf16(c, low[j][m].x, high[j][m].x, low[j][m].y, high[j][m].y, in.x, in.y);
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (slots[e % 2] == slot) sum[m][e] += c[e];
          }
        }
      }
    }
  }
}

/// Asks for what add_adapters will read: thread r for output n0 + r of rows t0 .. t0 + 8.
template <int kColumns>
__device__ void prefetch_adapters(const SegmentsView& v, const RowAdapters<kColumns>& rows, int n0,
                                  int t0) {
  const int r = static_cast<int>(threadIdx.x), n = n0 + r;
  for (int s = 0; s < v.sites; ++s) {
    if (n < v.site[s].n_begin || n >= v.site[s].n_begin + v.site[s].n) continue;
    for (int t = t0; t < t0 + 8; ++t) {
      const int rank = rows.rank[s][t];
      if (rank == 0 || (t > t0 && rows.slot[t] == rows.slot[t - 1])) continue;
      if (r % max(1, 64 / rank) != 0) continue;
      const bf16_t* b = rows.b[s][t] + static_cast<std::int64_t>(n - v.site[s].n_begin) * rank;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(b));
    }
  }
}

/// Until the kernel before this one in the stream is done; nothing where it is already.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <int kColumns, int kStages>
__global__ void __launch_bounds__(kThreads, 2)
    small_product_kernel(const SmallProduct p, const SegmentsView v) {
  extern __shared__ __align__(128) unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<kColumns, kStages>*>(raw);
  __shared__ RowAdapters<kColumns> adapters;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int parts = static_cast<int>(gridDim.x), part = static_cast<int>(blockIdx.x);
  const int n0 = static_cast<int>(blockIdx.y) * kRows;
  const int steps = p.inputs / kDepth;
  const int begin = steps * part / parts, end = steps * (part + 1) / parts;
  const bf16_t* w = p.w + static_cast<std::int64_t>(n0) * p.inputs;
  const auto fetch = [&](int step) {
    if (step < end) {
      Stage<kColumns>& stage = shared.stage[(step - begin) % kStages];
      copy_rows<kRows>(w, p.inputs, step * kDepth, p.n - n0, stage.w);
      copy_rows<kColumns>(p.x, p.inputs, step * kDepth, p.t, stage.x);
    }
    asm volatile("cp.async.commit_group;\n" ::);
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(begin + s);
  // Eights of rows whose adapters this part adds: part, part + parts, ...
  const int eights = v.sites == 0 ? 0 : ((p.t + 7) / 8 - part + parts - 1) / parts;
  if (v.sites > 0) {
    adapters.load(v);
    __syncthreads();
    for (int i = 0; i < eights; ++i) prefetch_adapters(v, adapters, n0, 8 * (part + i * parts));
  }

  float sum[2][kColumns / 8][4] = {};
  int added = 0;
  const auto add_next = [&] {
    if (added == 0) wait_for_previous_kernel();
    const int eight = part + added++ * parts;
    float more[2][4] = {};
    add_adapters(v, adapters, p.u, n0 + 32 * warp, 8 * eight, more);
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (c == eight) sum[e / 4][c][e % 4] += more[e / 4][e % 4];
  };
  for (int step = begin; step < end; ++step) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kStages - 2));
    __syncthreads();  // the step's stage is there, and the one before it is free
    fetch(step + kStages - 1);
    const Stage<kColumns>& stage = shared.stage[(step - begin) % kStages];
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      std::uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrices(
            a[m], stage.w + chunk_at<kDepth>(32 * warp + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int c = 0; c < (kColumns + 15) / 16; ++c) {
        std::uint32_t b[4];
        const int r = 16 * c + lane / 16 * 8 + lane % 8;
        load_matrices(b, stage.x + chunk_at<kDepth>(r % kColumns, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_bf16(sum[m][2 * c], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
          if constexpr (kColumns > 8)
            mma_bf16(sum[m][2 * c + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
        }
      }
    }
    if (added < eights && step >= end - (kStages - 1) - eights) add_next();
  }
  while (added < eights) add_next();
  wait_for_previous_kernel();
  asm volatile("cp.async.wait_group 0;\n" ::);
  __syncthreads();
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        shared.sums[8 * c + 2 * q + e % 2][32 * warp + 16 * m + g + 8 * (e / 2)] = sum[m][c][e];
#if __CUDA_ARCH__ >= 900
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
#else
  __syncthreads();
#endif
  const int rows = kRows / parts;
  for (int e = static_cast<int>(threadIdx.x); e < rows * p.t; e += kThreads) {
    const int r = part * rows + e % rows, t = e / rows, n = n0 + r;
    if (n >= p.n) continue;
    float total = 0.0f;
#if __CUDA_ARCH__ >= 900
    for (int b = 0; b < parts; ++b)
      total += cluster.map_shared_rank(&shared, static_cast<unsigned>(b))->sums[t][r];
#else
    total = shared.sums[t][r];
#endif
    if (p.bias != nullptr) total += load_f32(p.bias[n]);
    const std::int64_t at = static_cast<std::int64_t>(t) * p.n + n;
    if (p.y_f32)
      static_cast<float*>(p.y)[at] = total;
    else
      static_cast<bf16_t*>(p.y)[at] = store_as<bf16_t>(total);
  }
#if __CUDA_ARCH__ >= 900
  cluster.sync();  // a block's memory lives until all have read it
#endif
}

/// Of the shape of W alone: it decides the order of sums.
unsigned cluster_of(int n, int inputs) {
  const unsigned blocks = static_cast<unsigned>((n + kRows - 1) / kRows);
  unsigned parts = 1;
  while (parts < kClusterMax && 2 * parts * blocks <= kResident &&
         static_cast<int>(2 * parts) * 4 * kDepth <= inputs)
    parts *= 2;
  return parts;
}

template <int kColumns, int kStages>
void launch(cudaStream_t stream, const SmallProduct& p, const SegmentsView& v) {
  constexpr int kBytes = sizeof(Shared<kColumns, kStages>);
  const auto kernel = small_product_kernel<kColumns, kStages>;
  TANDEM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};
  const unsigned parts = cluster_of(p.n, p.inputs);
  config.gridDim = dim3(parts, static_cast<unsigned>((p.n + kRows - 1) / kRows));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = v.sites > 0 ? 2 : 1;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = parts;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  TANDEM_CUDA(cudaLaunchKernelEx(&config, kernel, p, v));
}

}  // namespace

bool fits_small_product(const Tensor& x, const Tensor& y, std::size_t sites,
                        int compute_capability) {
  return compute_capability >= 90 && x.dtype == DType::kBF16 && x.dim(0) <= kSmallProductRows &&
         x.dim(1) % kDepth == 0 && x.dim(1) > 0 && y.elements() > 0 && sites <= kSitesMax;
}

void small_product(cudaStream_t stream, const Tensor& x, const void* w, const void* bias,
                   const Tensor& y, const std::vector<LoraSite>& sites, const AdapterRows* rows,
                   const Tensor& u) {
  const SmallProduct p{x.as<const bf16_t>(),
                       static_cast<const bf16_t*>(w),
                       static_cast<const bf16_t*>(bias),
                       static_cast<const bf16_t*>(u.data),
                       y.data,
                       y.dtype == DType::kF32,
                       static_cast<int>(x.dim(0)),
                       static_cast<int>(y.dim(1)),
                       static_cast<int>(x.dim(1))};
  const SegmentsView v = sites.empty() ? SegmentsView{} : segments_view(sites, 0, *rows, x.dim(0));
  if (p.t <= 8) return launch<8, 6>(stream, p, v);
  if (p.t <= 16) return launch<16, 5>(stream, p, v);
  if (p.t <= 32) return launch<32, 5>(stream, p, v);
  launch<64, 4>(stream, p, v);
}

}  // namespace tandem::kernels::cuda
