// Private to kernels/cuda: the tensor cores' 16x8x16 product of 16-bit elements with f32 sums, by
// one warp.
//
// Lane l has g = l / 4 and q = l % 4. Of A [16, 16] it holds rows g and g + 8, of B [16, 8] column
// g, each at four values of k; of C [16, 8] rows g and g + 8 at columns 2q and 2q + 1. Which four
// values of k is free, as long as A and B agree: the loaders here give lane q neighbouring ones, so
// that fragments come from memory in vectors and without shared memory.
#pragma once

#include "kernels/cuda/device.cuh"

namespace tandem::kernels::cuda {

/// c += a b: a {row g: k pairs 0, 1; row g + 8: k pairs 0, 1} as {g.0, (g+8).0, g.1, (g+8).1}.
template <class E>
__device__ inline void mma(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                           std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.%10.%10.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "C"(Element<E>::kPtx));
}

template <class E>
__device__ inline std::uint32_t pack(E low, E high) {
  return Element<E>::bits(low) | Element<E>::bits(high) << 16;
}
template <class E>
__device__ inline std::uint32_t pack(float low, float high) {
  return Element<E>::pack(low, high);
}
template <class E>
__device__ inline float low_f32(std::uint32_t pair) {
  return Element<E>::low(pair);
}
template <class E>
__device__ inline float high_f32(std::uint32_t pair) {
  return Element<E>::high(pair);
}

/// Elements [k, k + 8) of a row of n, zeros beyond; `vectors`: row + k is 16 bytes aligned and
/// n a multiple of 8.
template <class E>
__device__ inline uint4 load_8(const E* row, int k, int n, bool vectors) {
  if (k >= n) return {0, 0, 0, 0};
  if (vectors) return *reinterpret_cast<const uint4*>(row + k);
  E x[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = k + j < n ? row[k + j] : E{};
  return {pack<E>(x[0], x[1]), pack<E>(x[2], x[3]), pack<E>(x[4], x[5]), pack<E>(x[6], x[7])};
}
/// As load_8 with [k, k + 4) and 8 bytes.
template <class E>
__device__ inline uint2 load_4(const E* row, int k, int n, bool vectors) {
  if (k >= n) return {0, 0};
  if (vectors) return *reinterpret_cast<const uint2*>(row + k);
  E x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = k + j < n ? row[k + j] : E{};
  return {pack<E>(x[0], x[1]), pack<E>(x[2], x[3])};
}

}  // namespace tandem::kernels::cuda
