// Private to kernels/cuda: the one reduction over a row of logits that loss, log-probability and
// sampling share, so that the same logits give the same bits everywhere: always kStatisticsThreads
// threads in one order.
#pragma once

#include "kernels/cuda/device.cuh"

#include <cmath>

namespace tandem::kernels::cuda {

inline constexpr int kStatisticsThreads = 512;

struct RowStatistics {
  float top;            ///< largest logit
  std::int64_t argmax;  ///< its lowest index
  float sum;            ///< of exp(logit - top)
  __device__ float lse() const { return top + logf(sum); }
};

/// Called by all threads of a block; everyone gets the result. Ends with a barrier.
template <int kThreads>
__device__ inline RowStatistics row_statistics(const float* x, std::int64_t n) {
  static_assert(kThreads == kStatisticsThreads);
  constexpr int kWarps = kThreads / 32;
  __shared__ float tops[kWarps], sums[kWarps];
  __shared__ std::int64_t indices[kWarps];
  float top = -INFINITY, sum = 0.0f;
  std::int64_t argmax = n;
  const auto add = [&](std::int64_t j, float v) {
    if (v > top) {
      sum *= expf(top - v);  // 0 for the first: exp(-inf)
      top = v;
      argmax = j;
    }
    sum += top == -INFINITY ? 0.0f : expf(v - top);
  };
  constexpr int kUnroll = 8;  // loads in flight; the order stays
  std::int64_t j = threadIdx.x;
  for (; j + (kUnroll - 1) * kThreads < n; j += kUnroll * kThreads) {
    float v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = x[j + u * kThreads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) add(j + u * kThreads, v[u]);
  }
  for (; j < n; j += kThreads) add(j, x[j]);
  const auto merge = [&](float other_top, float other_sum, std::int64_t other_index) {
    const float both = fmaxf(top, other_top);
    sum = (top == -INFINITY ? 0.0f : sum * expf(top - both)) +
          (other_top == -INFINITY ? 0.0f : other_sum * expf(other_top - both));
    if (other_top > top || (other_top == top && other_index < argmax)) argmax = other_index;
    top = both;
  };
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other_top = __shfl_down_sync(0xffffffffu, top, offset);
    const float other_sum = __shfl_down_sync(0xffffffffu, sum, offset);
    const std::int64_t other_index = __shfl_down_sync(0xffffffffu, argmax, offset);
    merge(other_top, other_sum, other_index);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    tops[warp] = top;
    sums[warp] = sum;
    indices[warp] = argmax;
  }
  __syncthreads();
  top = tops[0];
  sum = sums[0];
  argmax = indices[0];
  for (int w = 1; w < kWarps; ++w) merge(tops[w], sums[w], indices[w]);
  return {top, argmax, sum};
}

}  // namespace tandem::kernels::cuda
