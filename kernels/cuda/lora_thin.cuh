// Private to lora_thin*.cu: tiles of 16-bit elements that come through shared memory while others
// are computed.
#pragma once

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/lora_rows.cuh"
#include "kernels/cuda/lora_thin.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/shared_tiles.cuh"
#include "kernels/cuda/silu.cuh"

#include <cooperative_groups.h>

namespace tandem::kernels::cuda::thin {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kChunk = 8;  ///< elements of one 16-byte copy

__device__ inline void commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
template <int kPending>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

/// Chunk `chunk` of a row whose chunks are a multiple of 8: rows that ldmatrix reads together lie
/// in different banks.
__device__ inline int swizzled(int row, int chunk) {
  return (chunk ^ (row & 7)) * kChunk;
}

/// Consecutive sites that a pass takes together.
struct Group {
  int first, count;
  int column, columns;  ///< of u and du
};
__device__ inline Group find_group(const SegmentsView& v, bool by_site, int index) {
  if (!by_site) return {0, v.sites, 0, v.columns};
  return {index, 1, index * v.rank_max, v.rank_max};
}

/// The linear that reads silu * up: where its dA is left to the pass over its gradient.
template <class E>
struct Left {
  SiteView site;
  const E* du;  ///< [T, rank_max]
};

/// x of eight columns, masked.
template <class E>
__device__ inline void drop_8(const DropoutMask& mask, int row, int column, E* x) {
  uint4 bits = *reinterpret_cast<uint4*>(x);
  std::uint32_t* pair = reinterpret_cast<std::uint32_t*>(&bits);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float four[4] = {low_f32<E>(pair[2 * half]), high_f32<E>(pair[2 * half]),
                     low_f32<E>(pair[2 * half + 1]), high_f32<E>(pair[2 * half + 1])};
    mask.apply_group(row, column + 4 * half, four);
    pair[2 * half] = pack<E>(four[0], four[1]);
    pair[2 * half + 1] = pack<E>(four[2], four[3]);
  }
  *reinterpret_cast<uint4*>(x) = bits;
}

/// Eight columns of silu(gate) * up, rounded as the op rounds them.
template <class E>
__device__ inline uint4 silu_mul_8(const uint4& gate, const uint4& up) {
  const auto one = [](std::uint32_t g, std::uint32_t u) {
    return pack<E>(silu_mul(low_f32<E>(g), low_f32<E>(u)),
                   silu_mul(high_f32<E>(g), high_f32<E>(u)));
  };
  return {one(gate.x, up.x), one(gate.y, up.y), one(gate.z, up.z), one(gate.w, up.w)};
}

/// dgate to `gate` and dup to `up`, eight columns, rounded as the op rounds them; kOut: silu * up
/// to `dout`.
template <class E, bool kOut>
__device__ inline void silu_mul_grad_8(uint4& dout, uint4& gate, uint4& up) {
  const auto one = [](std::uint32_t& d, std::uint32_t& g, std::uint32_t& u) {
    const SiluMulGrad low = silu_mul_grad(low_f32<E>(d), low_f32<E>(g), low_f32<E>(u));
    const SiluMulGrad high = silu_mul_grad(high_f32<E>(d), high_f32<E>(g), high_f32<E>(u));
    if (kOut)
      d = pack<E>(silu_mul(low_f32<E>(g), low_f32<E>(u)), silu_mul(high_f32<E>(g), high_f32<E>(u)));
    g = pack<E>(low.gate, high.gate);
    u = pack<E>(low.up, high.up);
  };
  one(dout.x, gate.x, up.x);
  one(dout.y, gate.y, up.y);
  one(dout.z, gate.z, up.z);
  one(dout.w, gate.w, up.w);
}

/// A launch of clusters of `cluster` blocks along x, begun early (see launch_dependents()). Before
/// wait_for_inputs() these kernels read what no kernel of a step writes: slots, entries, and in
/// backward the factors, which the forward before it has read already.
template <class... Parameters, class... Args>
void launch(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, unsigned cluster,
            std::size_t shared, unsigned threads, Args... args) {
  TANDEM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared)));
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  TANDEM_CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...));
}

/// Calls f<kColumns> with the narrowest kernel's columns that hold these; kMost at most.
template <int kMost, class F>
void with_columns(int columns, const F& f) {
  TANDEM_CHECK_LE(columns, kMost);
  if (columns <= 16) return f.template operator()<16>();
  if (columns <= 32) return f.template operator()<32>();
  if (columns <= 48) return f.template operator()<48>();
  if (columns <= 64) return f.template operator()<64>();
  if (columns <= 128) return f.template operator()<128>();
  f.template operator()<kMost>();
}

constexpr int kClusterMax = 8;

/// The power of two in [1, kClusterMax] next below parts.
inline unsigned cluster_size(std::int64_t parts) {
  return parts >= 8 ? 8 : parts >= 4 ? 4 : parts >= 2 ? 2 : 1;
}

}  // namespace tandem::kernels::cuda::thin
