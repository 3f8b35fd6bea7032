// Private to kernels/cuda: what kernels ask of a 16-bit element type E, so that each is written
// once. Sums are f32 whichever it is; they differ in conversions and in what instructions call it.
#pragma once

#include "protocol/base/check.h"
#include "protocol/base/dtype.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tandem::kernels::cuda {

/// kPtx: the type's name in mma and wgmma. Pairs are 32-bit words, the lower column in the low
/// half.
template <class E>
struct Element;

template <>
struct Element<__nv_bfloat16> {
  static constexpr DType kDType = DType::kBF16;
  static constexpr char kPtx[] = "bf16";
  static __device__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 store(float x) { return __float2bfloat16_rn(x); }
  static __device__ std::uint32_t bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
  static __device__ std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  static __device__ float low(std::uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ float high(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
};

/// Beyond 65,504 it is infinite.
template <>
struct Element<__half> {
  static constexpr DType kDType = DType::kF16;
  static constexpr char kPtx[] = "f16";
  static __device__ float load(__half x) { return __half2float(x); }
  static __device__ __half store(float x) { return __float2half_rn(x); }
  static __device__ std::uint32_t bits(__half x) { return __half_as_ushort(x); }
  static __device__ std::uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  static __device__ float low(std::uint32_t pair) {
    return __low2float(*reinterpret_cast<const __half2*>(&pair));
  }
  static __device__ float high(std::uint32_t pair) {
    return __high2float(*reinterpret_cast<const __half2*>(&pair));
  }
};

inline constexpr int kElementBytes = 2;

/// f(E{}), E being the 16-bit type of a dtype.
template <class F>
decltype(auto) with_element(DType dtype, const F& f) {
  TANDEM_CHECK(is_16_bit(dtype), dtype_name(dtype));
  return dtype == DType::kF16 ? f(__half{}) : f(__nv_bfloat16{});
}

}  // namespace tandem::kernels::cuda
