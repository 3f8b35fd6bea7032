#include "kernels/cuda/gemv.cuh"

#include "kernels/cuda/device.cuh"

namespace tandem::kernels::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
/// Rows of W that a warp sums at once, and 16-byte loads of each that it has in flight.
constexpr int kRows = 2, kLoads = 4;
constexpr std::int64_t kStep = 32 * Vec<__nv_bfloat16>::kSize;  ///< columns of one load of a warp
constexpr std::int64_t kColumnsMax = 32768;                     ///< x lies in shared memory

__device__ inline float dot(const uint4& w, const uint4& x, float sum) {
  const auto* a = reinterpret_cast<const __nv_bfloat162*>(&w);
  const auto* b = reinterpret_cast<const __nv_bfloat162*>(&x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = __bfloat1622float2(a[i]), v = __bfloat1622float2(b[i]);
    sum = fmaf(u.x, v.x, sum);
    sum = fmaf(u.y, v.y, sum);
  }
  return sum;
}

/// Weights are asked for before the kernel that makes x has ended: they depend on nobody.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    gemv_kernel(const __nv_bfloat16* x, const __nv_bfloat16* w, const __nv_bfloat16* bias,
                std::int64_t n, std::int64_t k, Out* y) {
  extern __shared__ uint4 shared_x[];
  launch_dependents();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  const auto load = [&](std::int64_t r, std::int64_t column) {
    const bool inside = row + r < n && column < k;
    return inside ? __ldcs(reinterpret_cast<const uint4*>(w + (row + r) * k + column))
                  : make_uint4(0, 0, 0, 0);
  };
  uint4 ahead[kRows][kLoads];
  const std::int64_t first = lane * Vec<__nv_bfloat16>::kSize;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int u = 0; u < kLoads; ++u) ahead[r][u] = load(r, first + u * kStep);
  wait_for_inputs();
  for (std::int64_t c = threadIdx.x; c < k / 8; c += kThreads)
    shared_x[c] = reinterpret_cast<const uint4*>(x)[c];
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
      for (int r = 0; r < kRows; ++r) sum[r] = dot(now[r][u], v, sum[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float total = warp_sum(sum[r]);
    if (lane != 0 || row + r >= n) continue;
    y[row + r] = store_as<Out>(bias == nullptr ? total : total + load_f32(bias[row + r]));
  }
}

template <class Out>
void run(cudaStream_t stream, const Tensor& x, const PackedWeight& w, const Tensor& bias,
         const Tensor& y) {
  const auto blocks = static_cast<unsigned>((w.n + kWarps * kRows - 1) / (kWarps * kRows));
  const auto shared = static_cast<std::size_t>(w.i) * sizeof(__nv_bfloat16);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(gemv_kernel<Out>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(kColumnsMax * 2));
  check_cuda(allowed, "gemv_kernel: shared memory");
  launch_early("gemv_kernel", gemv_kernel<Out>, dim3(blocks), dim3(kThreads), shared, stream,
               static_cast<const __nv_bfloat16*>(x.data),
               static_cast<const __nv_bfloat16*>(w.storage.data),
               static_cast<const __nv_bfloat16*>(bias.data), w.n, w.i, static_cast<Out*>(y.data));
}

}  // namespace

bool gemv_fits(const Tensor& x, const PackedWeight& w) {
  return x.dim(0) == 1 && w.dtype == DType::kBF16 && w.i % 8 == 0 && w.i <= kColumnsMax &&
         reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 &&
         reinterpret_cast<std::uintptr_t>(w.storage.data) % 16 == 0;
}

void gemv(cudaStream_t stream, const Tensor& x, const PackedWeight& w, const Tensor& bias,
          const Tensor& y) {
  if (y.dtype == DType::kF32) return run<float>(stream, x, w, bias, y);
  run<__nv_bfloat16>(stream, x, w, bias, y);
}

}  // namespace tandem::kernels::cuda
