// Private to kernels/cuda: the thin products of a batch whose rows all carry one adapter, straight
// from its LoraEntry of each site, each in one pass over the wide matrix: blocks stream it through
// shared memory once and the tensor cores multiply what passes. bf16 or f16, on Hopper (clusters
// sum what their blocks found, in the order of the blocks, through one another's shared memory): no
// atomics, no scratch. With dropout the pass is made once a site and the mask drawn on the way.
#pragma once

#include "kernels/cuda_workspace.h"
#include "kernels/op_args.h"

#include <cuda_runtime.h>

namespace tandem::kernels::cuda {

class Scratch;

/// Columns of a fused linear's u and du in one pass over a matrix that is there, or a norm's
/// output; over other things that are made on the way, and over dy.
inline constexpr int kThinColumnsMax = 192, kThinMadeColumnsMax = 128;

/// What the passes of one op share.
struct ThinSites {
  const std::vector<LoraSite>& sites;
  const AdapterRows& rows;
};

/// The other factor, wanted as one block-diagonal matrix for the product that follows; gathered by
/// idle blocks of the same launch. Undefined: not wanted.
/// u [T, sites * rank_max] = s A dropout(x); b [N, sites * rank_max]: B, unscaled. x is read, or
/// where the layout says so made as make_x says and written.
void lora_thin_u(cudaStream_t stream, const ThinSites& sites, const SiluMulArgs& make_x,
                 const Tensor& x, const Tensor& u, const Tensor& b);
/// du = s dy B; a [sites * rank_max, I]: A, unscaled.
void lora_thin_du(cudaStream_t stream, const ThinSites& sites, const Tensor& dy, const Tensor& du,
                  const Tensor& a);
/// Both of du and dB, in one pass over dy and one over what it leaves in scratch (where the layout
/// says); a as for lora_thin_du. dy is read, or where the layout says so made as make_dy says and
/// written; then dA of the linear before is made too, if `left` says something.
void lora_thin_pair(cudaStream_t stream, const ThinSites& sites, const ThinPairLayout& layout,
                    const SiluMulBackwardArgs& make_dy, const LeftFactorGrad& left,
                    const Tensor& dy, const Tensor& u, const Tensor& du, const Tensor& a,
                    const Scratch& scratch);
/// dA += du^T dropout(x), x given or made of its recipe.
void lora_thin_da(cudaStream_t stream, const ThinSites& sites, const Tensor& x,
                  const LinearInputRecipe& make_x, const Tensor& du);
/// dy is made as make_dy says and written; dB += dy^T u; and dA of the linear before, if `left`
/// says something.
void lora_thin_made_db(cudaStream_t stream, const ThinSites& sites,
                       const SiluMulBackwardArgs& make_dy, const LeftFactorGrad& left,
                       const Tensor& dy, const Tensor& u);
/// dB += dy^T u.
void lora_thin_db(cudaStream_t stream, const ThinSites& sites, const Tensor& dy, const Tensor& u);

}  // namespace tandem::kernels::cuda
