// Gradients of adapters of which a batch holds any mix. Each sum has one order: over a site's
// outputs, or over the rows of an adapter in all its segments.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/lora_rows.cuh"

namespace tandem::kernels::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 8, kRanks = 8;  ///< that a block, or a thread, computes together

/// du[t, column + r] = s dy[t] B[:, r]. Block (tile of rows, site, ranks).
template <class T>
__global__ void __launch_bounds__(kThreads)
    du_kernel(const SegmentsView v, const T* dy, int width, T* du) {
  __shared__ float parts[kWarps][kRows * kRanks];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const SiteView& site = v.site[blockIdx.y];
  const int first = static_cast<int>(blockIdx.z) * kRanks;
  const AdapterTile tile = find_adapter_tile<kRows>(v, static_cast<int>(blockIdx.x));
  const LoraEntry entry = find_entry(v, site, tile.slot);
  const int rows = tile.end - tile.begin, ranks = min(kRanks, entry.rank - first);
  float sum[kRows][kRanks] = {};
  if (ranks > 0)
    for (int n = static_cast<int>(threadIdx.x); n < site.n; n += kThreads) {
      const T* b =
          static_cast<const T*>(entry.b) + static_cast<std::int64_t>(n) * entry.rank + first;
      float factor[kRanks];
#pragma unroll
      for (int r = 0; r < kRanks; ++r) factor[r] = r < ranks ? load_f32(b[r]) : 0.0f;
#pragma unroll
      for (int t = 0; t < kRows; ++t) {
        if (t >= rows) break;
        const float g =
            load_f32(dy[static_cast<std::int64_t>(tile.begin + t) * width + site.n_begin + n]);
#pragma unroll
        for (int r = 0; r < kRanks; ++r) sum[t][r] += g * factor[r];
      }
    }
#pragma unroll
  for (int t = 0; t < kRows; ++t)
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      const float x = warp_sum(sum[t][r]);
      if (lane == 0) parts[warp][t * kRanks + r] = x;
    }
  __syncthreads();
  const int t = static_cast<int>(threadIdx.x) / kRanks, r = static_cast<int>(threadIdx.x) % kRanks;
  if (t >= rows || first + r >= v.rank_max) return;
  float x = 0.0f;
  for (int w = 0; w < kWarps; ++w) x += parts[w][t * kRanks + r];
  du[static_cast<std::int64_t>(tile.begin + t) * v.columns + site.column + first + r] =
      store_as<T>(entry.scale * x);
}

/// Of every adapter: dA[r, i] += sum of du[t, r] dropout(x)[t, i], or dB[n, r] += sum of u[t, r]
/// dy[t, n]. Block (32 columns, slot, site and ranks); a warp takes every eighth row.
template <class T, bool kIsA>
__global__ void __launch_bounds__(kThreads)
    factor_grad_kernel(const SegmentsView v, const T* coefficients, const T* values, int width) {
  __shared__ float parts[kWarps][kRanks][32];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const SiteView& site = v.site[blockIdx.z % v.sites];
  const int first = static_cast<int>(blockIdx.z) / v.sites * kRanks;
  const int slot = static_cast<int>(blockIdx.y), c = static_cast<int>(blockIdx.x) * 32 + lane;
  const LoraEntry entry = find_entry(v, site, slot);
  const int ranks = min(kRanks, entry.rank - first), columns = kIsA ? width : site.n;
  float* grad = kIsA ? entry.da : entry.db;
  if (grad == nullptr || ranks <= 0) return;
  const DropoutMask mask(v, site, width);
  const T* at = values + (kIsA ? 0 : site.n_begin) + c;
  float sum[kRanks] = {};
  for (int s = 0; s < v.segments; ++s) {
    if (v.slots[s] != slot) continue;
    const int end = v.offsets[s + 1];
    for (int t = v.offsets[s] + warp; t < end; t += kWarps) {
      float x = c < columns ? load_f32(at[static_cast<std::int64_t>(t) * width]) : 0.0f;
      if (kIsA && mask.drops()) x = load_f32(store_as<T>(x * mask.factor(t, c)));
      const T* u = coefficients + static_cast<std::int64_t>(t) * v.columns + site.column + first;
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
        if (r < ranks) sum[r] += load_f32(u[r]) * x;
    }
  }
#pragma unroll
  for (int r = 0; r < kRanks; ++r) parts[warp][r][lane] = sum[r];
  __syncthreads();
  if (warp >= ranks || c >= columns) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += parts[w][warp][lane];
  const std::int64_t r = first + warp;
  grad[kIsA ? r * width + c : static_cast<std::int64_t>(c) * entry.rank + r] += total;
}
static_assert(kWarps == kRanks);

/// dx[t, i] += sum over sites of dropout'(du[t] A[:, i]), rounded once. Block (tile, columns).
template <class T>
__global__ void __launch_bounds__(kThreads)
    dx_kernel(const SegmentsView v, const T* du, T* dx, int columns) {
  const AdapterTile tile = find_adapter_tile<kRows>(v, static_cast<int>(blockIdx.x));
  const int rows = tile.end - tile.begin;
  const int i = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  if (tile.slot < 0 || i >= columns) return;
  float sum[kRows] = {};
  for (int s = 0; s < v.sites; ++s) {
    const SiteView& site = v.site[s];
    const LoraEntry entry = find_entry(v, site, tile.slot);
    const DropoutMask mask(v, site, columns);
    const T* u = du + static_cast<std::int64_t>(tile.begin) * v.columns + site.column;
    float own[kRows] = {};
    for (int r = 0; r < entry.rank; ++r) {
      const float a =
          load_f32(static_cast<const T*>(entry.a)[static_cast<std::int64_t>(r) * columns + i]);
#pragma unroll
      for (int t = 0; t < kRows; ++t)
        if (t < rows) own[t] += load_f32(u[static_cast<std::int64_t>(t) * v.columns + r]) * a;
    }
#pragma unroll
    for (int t = 0; t < kRows; ++t)
      sum[t] += mask.drops() ? own[t] * mask.factor(tile.begin + t, i) : own[t];
  }
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    if (t >= rows) break;
    T& to = dx[static_cast<std::int64_t>(tile.begin + t) * columns + i];
    to = store_as<T>(load_f32(to) + sum[t]);
  }
}

template <class T>
void add_dx(cudaStream_t stream, const SegmentsView& v, const Tensor& du, const Tensor& dx) {
  const auto columns = static_cast<int>(dx.dim(1));
  const auto parts = static_cast<unsigned>((columns + kThreads - 1) / kThreads);
  dx_kernel<T><<<dim3(tiles_max(v, kRows), parts), kThreads, 0, stream>>>(v, du.as<T>(), dx.as<T>(),
                                                                          columns);
  TANDEM_LAUNCHED("dx_kernel");
}

template <class T>
void backward(cudaStream_t stream, const LinearBackwardArgs& a, const SegmentsView& v,
              const Tensor& u, const Tensor& du) {
  const int width = static_cast<int>(a.dy.dim(1)), columns = static_cast<int>(a.x.dim(1));
  const auto ranks = static_cast<unsigned>((v.rank_max + kRanks - 1) / kRanks);
  const auto sites = static_cast<unsigned>(v.sites);
  const unsigned tiles = tiles_max(v, kRows);
  unsigned slots = 0, outputs = 0;
  for (int s = 0; s < v.sites; ++s) {
    slots = std::max(slots, static_cast<unsigned>(v.site[s].slots));
    outputs = std::max(outputs, static_cast<unsigned>((v.site[s].n + 31) / 32));
  }
  du_kernel<T>
      <<<dim3(tiles, sites, ranks), kThreads, 0, stream>>>(v, a.dy.as<T>(), width, du.as<T>());
  TANDEM_LAUNCHED("du_kernel");
  const auto inputs = static_cast<unsigned>((columns + 31) / 32);
  factor_grad_kernel<T, true><<<dim3(inputs, slots, ranks * sites), kThreads, 0, stream>>>(
      v, du.as<T>(), a.x.as<T>(), columns);
  TANDEM_LAUNCHED("factor_grad_kernel");
  factor_grad_kernel<T, false><<<dim3(outputs, slots, ranks * sites), kThreads, 0, stream>>>(
      v, u.as<T>(), a.dy.as<T>(), width);
  TANDEM_LAUNCHED("factor_grad_kernel");
  if (a.dx.defined()) add_dx<T>(stream, v, du, a.dx);
}

}  // namespace

void lora_segments_backward(cudaStream_t stream, const LinearBackwardArgs& a, Tensor u, Tensor du) {
  for (std::size_t first = 0; first < a.sites.size(); first += kSitesMax) {
    const SegmentsView v = segments_view(a.sites, first, *a.adapters, a.x.dim(0));
    TANDEM_CUDA_DISPATCH(a.x.dtype, backward, stream, a, v, u, du);
  }
}

void lora_segments_dx(cudaStream_t stream, const std::vector<LoraSite>& sites,
                      const AdapterRows& rows, Tensor du, Tensor dx) {
  for (std::size_t first = 0; first < sites.size(); first += kSitesMax) {
    const SegmentsView v = segments_view(sites, first, rows, dx.dim(0));
    TANDEM_CUDA_DISPATCH(dx.dtype, add_dx, stream, v, du, dx);
  }
}

}  // namespace tandem::kernels::cuda
