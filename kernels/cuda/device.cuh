// Private to kernels/cuda: what every kernel needs. Values are computed in f32 whatever they are
// stored in; vectors are 16 bytes, the widest access of a thread.
#pragma once

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/element.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace tandem::kernels::cuda {

__device__ inline float load_f32(float x) {
  return x;
}
template <class E>
__device__ inline float load_f32(E x) {
  return Element<E>::load(x);
}
template <class T>
__device__ inline T store_as(float x) {
  return Element<T>::store(x);
}
template <>
__device__ inline float store_as<float>(float x) {
  return x;
}

/// 16 bytes of T, aligned.
template <class T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T at[kSize];
};
template <class T>
__device__ inline Vec<T> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
__device__ inline void store_vec(T* p, const Vec<T>& v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}

/// Four of T in one access, aligned to its size.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};
template <class T>
__device__ inline bool is_quad(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % sizeof(Quad<T>) == 0;
}

/// The next kernel of the queue may take its place on the device now; it waits for this one's
/// results in wait_for_inputs(). Together they hide what starting a kernel costs, which is much of
/// a decode step. A kernel started by launch_early() calls both, the second before it reads or
/// writes what other kernels touch.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Brings what lies there into the second-level cache, whoever writes it still.
__device__ inline void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/// *p, which every step reads again and whose place in the second-level cache a step's weights and
/// keys would take: of the two this stays.
template <class T>
__device__ inline T load_kept(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  std::uint64_t policy = 0;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  if constexpr (sizeof(T) == 4) {
    std::uint32_t bits = 0;
    asm volatile("ld.global.L2::cache_hint.b32 %0, [%1], %2;" : "=r"(bits) : "l"(p), "l"(policy));
    return __builtin_bit_cast(T, bits);
  } else {
    std::uint64_t bits = 0;
    asm volatile("ld.global.L2::cache_hint.b64 %0, [%1], %2;" : "=l"(bits) : "l"(p), "l"(policy));
    return __builtin_bit_cast(T, bits);
  }
}

/// Whether this process's GPU can do that: compute capability 9.0 and newer.
inline bool starts_early() {
  static const bool can = [] {
    int device = 0, major = 0;
    TANDEM_CUDA(cudaGetDevice(&device));
    TANDEM_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return major >= 9;
  }();
  return can;
}

/// kernel<<<grid, block, shared, stream>>>(args...), begun while the kernel before it still runs.
template <class... Params, class... Args>
void launch_early(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                  std::size_t shared, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = starts_early() ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

/// 2^x; 0 for -inf.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

/// The sum over a block of kThreads, in an order that depends on nothing but kThreads; every
/// thread gets it.
template <int kThreads>
__device__ inline float block_sum(float x) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __shared__ float parts[kThreads / 32];
  x = warp_sum(x);
  __syncthreads();  // parts may still be read from the last call
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += parts[w];
  return sum;
}

}  // namespace tandem::kernels::cuda

/// Calls f<T>(...) with the device's type of a compute dtype.
#define TANDEM_CUDA_DISPATCH(dtype, f, ...)                    \
  ((dtype) == ::tandem::DType::kF32   ? f<float>(__VA_ARGS__)  \
   : (dtype) == ::tandem::DType::kF16 ? f<__half>(__VA_ARGS__) \
                                      : f<__nv_bfloat16>(__VA_ARGS__))
