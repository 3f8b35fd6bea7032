// Private to kernels/cuda: tiles of rows of 16-bit elements in shared memory, copied there
// asynchronously and read as fragments of the tensor cores.
#pragma once

#include "kernels/cuda/device.cuh"

namespace tandem::kernels::cuda {

/// Chunk `c` of 8 elements of row r of a tile of kDim columns: eight rows' same chunks lie in
/// all banks.
template <int kDim>
__device__ inline int chunk_at(int r, int c) {
  return r * kDim + ((c ^ (r & 7)) * 8);
}

template <class E>
__device__ inline void copy_16_async(E* to, const E* from, bool present) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from),
               "r"(present ? 16 : 0));
}
template <class E>
__device__ inline void load_matrices(std::uint32_t (&r)[4], const E* from) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
template <class E>
__device__ inline void load_matrices_transposed(std::uint32_t (&r)[4], const E* from) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

}  // namespace tandem::kernels::cuda
