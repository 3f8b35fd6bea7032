// Private to kernels/cuda: a dense product of bf16 or f16 whose inner size goes on over the
// low-rank part of a linear, so that an adapter costs its own k-tiles and no pass over the output.
// Hopper only, through the CUTLASS headers; a build without them (TANDEM_CUTLASS_INCLUDE) has no
// such product and fits() is false for everything.
#pragma once

#include "kernels/cuda/blas.h"

namespace tandem::kernels::cuda::lora_gemm {

/// out [M, N] = a [M, K] b + u [M, R] c + bias of each column, summed in f32 in an order that
/// depends on K and R alone. b and c are both transposed views of row-major [N, K] and [N, R]
/// (forward) or both row-major [K, N] and [R, N] (input gradient).
struct Product {
  Matrix a, b;
  Matrix u, c;  ///< zero columns of u: none
  Matrix out;
  const void* bias = nullptr;  ///< [N] of a's dtype, or null
  int sm_count = 0;            ///< of the device
};

/// True when this build and a device of that compute capability have it: bf16 or f16 alone, rows of
/// 16 bytes.
bool fits(const Product& product, int compute_capability);
void run(cudaStream_t stream, const Product& product);

/// How a product is cut into tiles, which blocks take along the outputs; run() chooses.
struct Tiling {
  /// Tiles of 128 x 256 that two warpgroups share, fastest over a long inner size; else of 128 x
  /// 192, one a warpgroup, so that one stores its tile while the other multiplies.
  bool wide = true;
  int swizzle = 1;  ///< rows of tiles that are walked together
};
/// TANDEM_LORA_GEMM_TILING="wide,4" overrides it and TANDEM_LORA_GEMM=off makes nothing fit, for
/// measurements.
Tiling choose_tiling(const Product& product);
void run_forward_bf16(cudaStream_t stream, const Product& product, const Tiling& tiling);
void run_forward_f16(cudaStream_t stream, const Product& product, const Tiling& tiling);
void run_backward_bf16(cudaStream_t stream, const Product& product, const Tiling& tiling);
void run_backward_f16(cudaStream_t stream, const Product& product, const Tiling& tiling);

}  // namespace tandem::kernels::cuda::lora_gemm
