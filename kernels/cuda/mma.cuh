// Private to kernels/cuda: the tensor cores' 16x8x16 product of bf16 with f32 sums, by one warp.
//
// Lane l has g = l / 4 and q = l % 4. Of A [16, 16] it holds rows g and g + 8, of B [16, 8] column
// g, each at four values of k; of C [16, 8] rows g and g + 8 at columns 2q and 2q + 1. Which four
// values of k is free, as long as A and B agree: the loaders here give lane q neighbouring ones, so
// that fragments come from memory in vectors and without shared memory.
#pragma once

#include "kernels/cuda/device.cuh"

namespace tandem::kernels::cuda {

/// c += a b: a {row g: k pairs 0, 1; row g + 8: k pairs 0, 1} as {g.0, (g+8).0, g.1, (g+8).1}.
__device__ inline void mma_bf16(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline std::uint32_t pack_bf16(__nv_bfloat16 low, __nv_bfloat16 high) {
  return static_cast<std::uint32_t>(__bfloat16_as_ushort(low)) |
         static_cast<std::uint32_t>(__bfloat16_as_ushort(high)) << 16;
}
__device__ inline std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ inline float low_f32(std::uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ inline float high_f32(std::uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

/// Elements [k, k + 8) of a row of n, zeros beyond; `vectors`: row + k is 16 bytes aligned and
/// n a multiple of 8.
__device__ inline uint4 load_8(const __nv_bfloat16* row, int k, int n, bool vectors) {
  if (k >= n) return {0, 0, 0, 0};
  if (vectors) return *reinterpret_cast<const uint4*>(row + k);
  __nv_bfloat16 x[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = k + j < n ? row[k + j] : __nv_bfloat16{};
  return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
          pack_bf16(x[6], x[7])};
}
/// As load_8 with [k, k + 4) and 8 bytes.
__device__ inline uint2 load_4(const __nv_bfloat16* row, int k, int n, bool vectors) {
  if (k >= n) return {0, 0};
  if (vectors) return *reinterpret_cast<const uint2*>(row + k);
  __nv_bfloat16 x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = k + j < n ? row[k + j] : __nv_bfloat16{};
  return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])};
}

}  // namespace tandem::kernels::cuda
