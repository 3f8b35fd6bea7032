// Private to kernels/cuda: a weight and its adapters times at most 64 rows, the products of a
// decode step, which are bound by the bytes of the weight. The copy engine streams them through
// shared memory; the adapters' B follow through the same ring of stages, so that they cost their
// own bytes and no pass over the output. Hopper only (sm_90a), bf16 and f16.
#pragma once

#include "kernels/device_profile.h"
#include "kernels/exec.h"
#include "kernels/op_args.h"

#include <cuda_runtime.h>

namespace tandem::kernels::cuda {

inline constexpr std::int64_t kSkinnyRows = 64;

/// True when all but the number of rows is right: sizes, sites and base addresses in multiples of
/// 16 bytes, adapters without dropout and of rank 64 at most, with them y not f32; some row.
bool skinny_fits(const LinearArgs& args, const DeviceProfile& profile);
/// y [T, N] of x's dtype or f32 = x W^T + bias + u B^T of each row's adapter, summed in f32 in an
/// order that depends on the weight's shape, the device and the batch's bounds alone, rounded once;
/// or silu * up of it, where `then` says so. `u` [T, sites * rank_max] of that, undefined without
/// adapters, is made here: by lora_segments_shrink(), or, as long as that takes no longer than the
/// weight, by some of the product's own blocks, with the same bits. At most kSkinnyRows.
/// kInvariant: the inner size is summed in ascending order, as lora_gemm.h does it.
void skinny(cudaStream_t stream, Numerics numerics, const LinearArgs& args, const Tensor& u,
            int multiprocessors);

}  // namespace tandem::kernels::cuda
