// Private to kernels/cuda: tiles of bf16 rows in shared memory, copied there asynchronously and
// read as fragments of the tensor cores.
#pragma once

#include "kernels/cuda/device.cuh"

namespace tandem::kernels::cuda {

/// Chunk `c` of 8 elements of row r of a bf16 tile of kDim columns: eight rows' same chunks lie in
/// all banks.
template <int kDim>
__device__ inline int chunk_at(int r, int c) {
  return r * kDim + ((c ^ (r & 7)) * 8);
}

__device__ inline void copy_16_async(__nv_bfloat16* to, const __nv_bfloat16* from, bool present) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from),
               "r"(present ? 16 : 0));
}
__device__ inline void load_matrices(std::uint32_t (&r)[4], const __nv_bfloat16* from) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ inline void load_matrices_transposed(std::uint32_t (&r)[4], const __nv_bfloat16* from) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

}  // namespace tandem::kernels::cuda
