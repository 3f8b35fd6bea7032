#include "kernels/cuda/gemv.cuh"

#include "kernels/cuda/linear_then.cuh"
#include "kernels/cuda/lora_rows.cuh"
#include "kernels/cuda/mma.cuh"

namespace tandem::kernels::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
/// Rows of W that a warp sums at once, and 16-byte loads of each that it has in flight.
constexpr int kRows = 2, kLoads = 4;
constexpr std::int64_t kStep = 32 * 16 / kElementBytes;  ///< columns of one load of a warp

template <class E>
__device__ inline float dot(const uint4& w, const uint4& x, float sum) {
  const std::uint32_t* a = &w.x;
  const std::uint32_t* b = &x.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(low_f32<E>(a[i]), low_f32<E>(b[i]), sum);
    sum = fmaf(high_f32<E>(a[i]), high_f32<E>(b[i]), sum);
  }
  return sum;
}

constexpr int kRankMax = 64, kRanks = kRankMax / 32;  ///< of a lane

/// The only row's slot. Called by whole warps.
__device__ inline int find_slot(const SegmentsView& v, int lane) {
  int slot = -1;
  for (int s = lane; s < v.segments; s += 32)
    if (v.offsets[s] == 0 && v.offsets[s + 1] > 0) slot = v.slots[s];
  return __reduce_max_sync(0xffffffffu, slot);
}

/// What one lane has of B's row of an output: the adapter's ranks lane, lane + 32; on its way.
template <class E>
struct FactorRow {
  E b[kRanks];
  int rank = 0, column = 0;  ///< of u

  __device__ void load(const SegmentsView& v, int slot, int n, int lane) {
    for (int s = 0; s < v.sites; ++s) {
      const SiteView& site = v.site[s];
      if (n < site.n_begin || n >= site.n_begin + site.n) continue;
      const LoraEntry entry = find_entry(v, site, slot);
      const auto* row =
          static_cast<const E*>(entry.b) + static_cast<std::int64_t>(n - site.n_begin) * entry.rank;
      rank = entry.rank, column = site.column;
#pragma unroll
      for (int j = 0; j < kRanks; ++j)
        if (lane + 32 * j < rank) b[j] = row[lane + 32 * j];
    }
  }
  __device__ float dot(const E* u, int lane, float sum) const {
#pragma unroll
    for (int j = 0; j < kRanks; ++j)
      if (lane + 32 * j < rank)
        sum = fmaf(load_f32(b[j]), load_f32(u[column + lane + 32 * j]), sum);
    return sum;
  }
};

/// Weights are asked for before the kernel that makes x has ended: they depend on nobody. kAdapts:
/// x is there, and u when that kernel has ended.
template <class E, class Out, Then kThen, bool kAdapts>
__global__ void __launch_bounds__(kThreads)
    gemv_kernel(const E* x, const E* w, const E* bias, std::int64_t n, std::int64_t k, Out* y,
                const ThenView then, const __grid_constant__ SegmentsView adapters, const E* u) {
  extern __shared__ uint4 shared_x[];
  launch_dependents();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  constexpr bool kPairs = kThen != Then::kNothing;
  static_assert(kRows == 2);
  const std::int64_t own = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  const std::int64_t row = kPairs ? then.first_of(own) : own * kRows;
  const std::int64_t apart = kPairs ? then.distance : 1;
  const auto load = [&](std::int64_t r, std::int64_t column) {
    const bool inside = row + r * apart < n && column < k;
    return inside ? __ldcs(reinterpret_cast<const uint4*>(w + (row + r * apart) * k + column))
                  : make_uint4(0, 0, 0, 0);
  };
  uint4 ahead[kRows][kLoads];
  const std::int64_t first = lane * 16 / kElementBytes;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int u = 0; u < kLoads; ++u) ahead[r][u] = load(r, first + u * kStep);
  [[maybe_unused]] FactorRow<E> factor[kRows];
  if constexpr (kAdapts) {
    const int slot = find_slot(adapters, lane);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      factor[r].load(adapters, slot, static_cast<int>(row + r * apart), lane);
  } else {
    wait_for_inputs();
  }
  for (std::int64_t c = threadIdx.x; c < k / 8; c += kThreads)
    shared_x[c] = __ldcg(reinterpret_cast<const uint4*>(x) + c);
  __syncthreads();
  float sum[kRows] = {};
  for (std::int64_t column = first; column < k; column += kLoads * kStep) {
    uint4 now[kRows][kLoads];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        now[r][u] = ahead[r][u];
        ahead[r][u] = load(r, column + (kLoads + u) * kStep);
      }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const std::int64_t at = column + u * kStep;
      if (at >= k) continue;
      const uint4 v = shared_x[at / 8];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] = dot<E>(now[r][u], v, sum[r]);
    }
  }
  if constexpr (kAdapts) {
    wait_for_inputs();
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = factor[r].dot(u, lane, sum[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    sum[r] = warp_sum(sum[r]);
    if (bias != nullptr && row + r * apart < n) sum[r] += load_f32(bias[row + r * apart]);
  }
  if (lane != 0) return;
  if constexpr (kPairs) {
    if (row + apart < n) store_pair<E, kThen>(then, y, row, sum[0], sum[1]);
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (row + r < n) y[row + r] = store_as<Out>(sum[r]);
  }
}

template <class E, class Out, Then kThen, bool kAdapts>
void run(cudaStream_t stream, const LinearArgs& a, const Tensor& u) {
  constexpr auto kKernel = gemv_kernel<E, Out, kThen, kAdapts>;
  const PackedWeight& w = *a.weight;
  const auto blocks = static_cast<unsigned>((w.n + kWarps * kRows - 1) / (kWarps * kRows));
  const auto shared = static_cast<std::size_t>(w.i) * kElementBytes;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(kGemvColumnsMax * kElementBytes));
  check_cuda(allowed, "gemv_kernel: shared memory");
  launch_early("gemv_kernel", kKernel, dim3(blocks), dim3(kThreads), shared, stream,
               static_cast<const E*>(a.x.data), static_cast<const E*>(w.storage.data),
               static_cast<const E*>(a.bias.data), w.n, w.i, static_cast<Out*>(output_of(a)),
               then_view(a), kAdapts ? segments_view(a.sites, 0, *a.adapters, 1) : SegmentsView{},
               static_cast<const E*>(u.data));
}

}  // namespace

bool gemv_fits(const LinearArgs& a) {
  const PackedWeight& w = *a.weight;
  const bool fits = a.x.dim(0) == 1 && is_16_bit(w.dtype) && w.i % 8 == 0 &&
                    w.i <= kGemvColumnsMax &&
                    reinterpret_cast<std::uintptr_t>(a.x.data) % 16 == 0 &&
                    reinterpret_cast<std::uintptr_t>(w.storage.data) % 16 == 0;
  if (!fits || a.adapters == nullptr || a.adapters->rank_max == 0 || a.sites.empty()) return fits;
  return a.adapters->rank_max <= kRankMax && a.adapters->dropout == 0.0f &&
         a.sites.size() <= kSitesMax && a.y.dtype == a.x.dtype;
}

void gemv(cudaStream_t stream, const LinearArgs& a, const Tensor& u) {
  with_outputs(a, [&]<class E, class Out, Then kThen>() {
    if constexpr (std::is_same_v<E, Out>)
      if (u.defined()) return run<E, Out, kThen, true>(stream, a, u);
    run<E, Out, kThen, false>(stream, a, u);
  });
}

}  // namespace tandem::kernels::cuda
