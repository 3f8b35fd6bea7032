#include "kernels/cuda/gemv.cuh"

#include "kernels/cuda/mma.cuh"

namespace tandem::kernels::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
/// Rows of W that a warp sums at once, and 16-byte loads of each that it has in flight.
constexpr int kRows = 2, kLoads = 4;
constexpr std::int64_t kStep = 32 * 16 / kElementBytes;  ///< columns of one load of a warp
constexpr std::int64_t kColumnsMax = 32768;              ///< x lies in shared memory

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

/// Weights are asked for before the kernel that makes x has ended: they depend on nobody.
template <class E, class Out>
__global__ void __launch_bounds__(kThreads)
    gemv_kernel(const E* x, const E* w, const E* bias, std::int64_t n, std::int64_t k, Out* y) {
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
  const std::int64_t first = lane * 16 / kElementBytes;
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
      for (int r = 0; r < kRows; ++r) sum[r] = dot<E>(now[r][u], v, sum[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float total = warp_sum(sum[r]);
    if (lane != 0 || row + r >= n) continue;
    y[row + r] = store_as<Out>(bias == nullptr ? total : total + load_f32(bias[row + r]));
  }
}

template <class E, class Out>
void run(cudaStream_t stream, const Tensor& x, const PackedWeight& w, const Tensor& bias,
         const Tensor& y) {
  const auto blocks = static_cast<unsigned>((w.n + kWarps * kRows - 1) / (kWarps * kRows));
  const auto shared = static_cast<std::size_t>(w.i) * kElementBytes;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(gemv_kernel<E, Out>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(kColumnsMax * 2));
  check_cuda(allowed, "gemv_kernel: shared memory");
  launch_early("gemv_kernel", gemv_kernel<E, Out>, dim3(blocks), dim3(kThreads), shared, stream,
               static_cast<const E*>(x.data), static_cast<const E*>(w.storage.data),
               static_cast<const E*>(bias.data), w.n, w.i, static_cast<Out*>(y.data));
}

}  // namespace

bool gemv_fits(const Tensor& x, const PackedWeight& w) {
  return x.dim(0) == 1 && is_16_bit(w.dtype) && w.i % 8 == 0 && w.i <= kColumnsMax &&
         reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 &&
         reinterpret_cast<std::uintptr_t>(w.storage.data) % 16 == 0;
}

void gemv(cudaStream_t stream, const Tensor& x, const PackedWeight& w, const Tensor& bias,
          const Tensor& y) {
  with_element(w.dtype, [&]<class E>(E) {
    if (y.dtype == DType::kF32) return run<E, float>(stream, x, w, bias, y);
    run<E, E>(stream, x, w, bias, y);
  });
}

}  // namespace tandem::kernels::cuda
