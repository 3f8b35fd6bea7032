#include "worker/comm/nccl/peer_kernels.h"

#include "worker/comm/nccl/peer_vectors.cuh"

namespace tandem::worker::comm {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) sum_parts_kernel(PartSum s) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t whole = s.elements / 4;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t e = first; e < whole; e += stride) {
    Vec<float> sum;
#pragma unroll 4
    for (int r = 0; r < s.size; ++r) sum.add(reinterpret_cast<const uint4*>(s.parts[r])[e]);
    reinterpret_cast<uint4*>(s.out)[e] = sum.rounded();
  }
  for (std::int64_t e = 4 * whole + first; e < s.elements; e += stride) {
    float sum = 0.0f;
    for (int r = 0; r < s.size; ++r) sum += s.parts[r][e];
    s.out[e] = sum;
  }
}

}  // namespace

cudaError_t sum_parts(cudaStream_t stream, const PartSum& sum) {
  constexpr std::int64_t kMost = 132 * 2;  // enough to reach the memory's rate
  const std::int64_t wanted = (sum.elements / 4 + kThreads) / kThreads;
  const auto blocks = static_cast<unsigned>(wanted < kMost ? wanted : kMost);
  sum_parts_kernel<<<blocks, kThreads, 0, stream>>>(sum);
  return cudaGetLastError();
}

}  // namespace tandem::worker::comm
