// Private to libtandem_nccl.so: 16 bytes of elements, added up in f32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace tandem::worker::comm {

template <class T>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int kSize = 4;
  float v[4] = {};
  __device__ void add(const uint4& raw) {
    v[0] += __uint_as_float(raw.x), v[1] += __uint_as_float(raw.y);
    v[2] += __uint_as_float(raw.z), v[3] += __uint_as_float(raw.w);
  }
  __device__ uint4 rounded() const {
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
            __float_as_uint(v[3])};
  }
};
/// A pair of 16-bit elements, the first in the low half.
template <class T>
__device__ float2 widen(unsigned word);
template <>
__device__ inline float2 widen<__nv_bfloat16>(unsigned word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
__device__ inline float2 widen<__half>(unsigned word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <class T>
__device__ unsigned narrow(float low, float high);
template <>
__device__ inline unsigned narrow<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
__device__ inline unsigned narrow<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <class T>
struct Vec {
  static_assert(sizeof(T) == 2);
  static constexpr int kSize = 8;
  float v[8] = {};
  __device__ void add(const uint4& raw) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen<T>(words[i]);
      v[2 * i] += pair.x;
      v[2 * i + 1] += pair.y;
    }
  }
  __device__ uint4 rounded() const {
    return {narrow<T>(v[0], v[1]), narrow<T>(v[2], v[3]), narrow<T>(v[4], v[5]),
            narrow<T>(v[6], v[7])};
  }
};

}  // namespace tandem::worker::comm
