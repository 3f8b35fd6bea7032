// Private to kernels/cuda: the gated activation of one element. Every kernel that makes it takes it
// from here, so that what is made twice has the same bits.
#pragma once

#include "kernels/cuda/device.cuh"

namespace tandem::kernels::cuda {

__device__ inline float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
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
