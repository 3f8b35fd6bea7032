// A weight times one row under Numerics::kInvariant, on Hopper: the bits of the products of more
// rows (skinny.cu, lora_gemm_kernel.cuh). The tensor cores add up steps of 16 of the inner size in
// ascending order, so a warp has its eight outputs' whole rows, many loads ahead.
#include "kernels/cuda/gemv.cuh"
#include "kernels/cuda/hopper.cuh"

namespace tandem::kernels::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kOutputs = 8;  ///< of a warp
constexpr int kColumns = 32;  ///< of one load of a warp: 16 bytes a lane
constexpr int kLoads = 16;   ///< in flight

/// Lane (g, q) asks for columns 32 j + 8 q .. + 8 of output g.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    gemv_ordered_kernel(const __nv_bfloat16* x, const __nv_bfloat16* w, const __nv_bfloat16* bias,
                        std::int64_t n, std::int64_t k, Out* y) {
  extern __shared__ uint4 shared_x[];  // of each load lane q's pairs: q, 4 + q, 8 + q, 12 + q
  launch_dependents();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp) * kOutputs;
  const int loads = static_cast<int>((k + kColumns - 1) / kColumns);
  const bool present = first + g < n;
  const __nv_bfloat16* row = w + (present ? first + g : 0) * k + 8 * q;
  const auto load = [&](int j) {
    return present && j * kColumns + 8 * q < k
               ? __ldcs(reinterpret_cast<const uint4*>(row + std::int64_t{j} * kColumns))
               : make_uint4(0, 0, 0, 0);
  };
  uint4 ahead[kLoads];
#pragma unroll
  for (int u = 0; u < kLoads; ++u) ahead[u] = load(u);
  wait_for_inputs();
  for (int c = static_cast<int>(threadIdx.x); c < 4 * loads; c += kThreads) {
    const uint4 v = c < k / 8 ? reinterpret_cast<const uint4*>(x)[c] : make_uint4(0, 0, 0, 0);
    auto* to = reinterpret_cast<std::uint32_t*>(shared_x) + c / 4 * 16 + c % 4;
    to[0] = v.x;
    to[4] = v.y;
    to[8] = v.z;
    to[12] = v.w;
  }
  __syncthreads();
  float sum[4] = {};  // of lanes with g = 0: outputs 2q and 2q + 1; the other rows of x are zeros
  for (int j = 0; j < loads; j += kLoads) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (j + u >= loads) break;
      std::uint32_t b[4] = {ahead[u].x, ahead[u].y, ahead[u].z, ahead[u].w};
      ahead[u] = load(j + u + kLoads);
      transpose_quad(b, q);
      const uint4 a = g == 0 ? shared_x[(j + u) * 4 + q] : make_uint4(0, 0, 0, 0);
      mma_bf16(sum, a.x, 0, a.y, 0, b[0], b[1]);
      mma_bf16(sum, a.z, 0, a.w, 0, b[2], b[3]);
    }
  }
  if (g != 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t at = first + 2 * q + i;
    if (at < n) y[at] = store_as<Out>(sum[i] + (bias == nullptr ? 0.0f : load_f32(bias[at])));
  }
}

template <class Out>
void run(cudaStream_t stream, const Tensor& x, const PackedWeight& w, const Tensor& bias,
         const Tensor& y) {
  constexpr std::int64_t kBlock = kWarps * kOutputs;
  constexpr auto kKernel = gemv_ordered_kernel<Out>;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kGemvInnerMax * 2));
  check_cuda(allowed, "gemv_ordered_kernel: shared memory");
  launch_early("gemv_ordered_kernel", kKernel,
               dim3(static_cast<unsigned>((w.n + kBlock - 1) / kBlock)), dim3(kThreads),
               static_cast<std::size_t>((w.i + kColumns - 1) / kColumns * kColumns * 2), stream,
               static_cast<const __nv_bfloat16*>(x.data),
               static_cast<const __nv_bfloat16*>(w.storage.data),
               static_cast<const __nv_bfloat16*>(bias.data), w.n, w.i, static_cast<Out*>(y.data));
}

}  // namespace

void gemv_ordered(cudaStream_t stream, const Tensor& x, const PackedWeight& w, const Tensor& bias,
                  const Tensor& y) {
  if (y.dtype == DType::kF32) return run<float>(stream, x, w, bias, y);
  run<__nv_bfloat16>(stream, x, w, bias, y);
}

}  // namespace tandem::kernels::cuda
