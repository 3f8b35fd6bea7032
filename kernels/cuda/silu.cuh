// Private to kernels/cuda: the gated activation of one element. Every kernel that makes it takes it
// from here, so that what is made twice has the same bits.
#pragma once

#include "kernels/cuda/device.cuh"

#include <cmath>

namespace tandem::kernels::cuda {

/// 1 / (1 + e^-x): the quotient as the compiler makes it, but without its branch for those below
/// 2^-126, which keeps the elements of a thread from overlapping; they are 0.
__device__ inline float sigmoid(float x) {
  const float y = 1.0f + expf(-x);
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
  r = fmaf(r, fmaf(-y, r, 1.0f), r);
  return y > 0x1p126f ? 0.0f : r;
}

__device__ inline float silu_mul(float gate, float up) {
  return gate * sigmoid(gate) * up;
}

struct SiluMulGrad {
  float gate, up;
};
__device__ inline SiluMulGrad silu_mul_grad(float dout, float gate, float up) {
  const float s = sigmoid(gate);
  return {dout * up * s * (1.0f + gate * (1.0f - s)), dout * gate * s};
}

}  // namespace tandem::kernels::cuda
