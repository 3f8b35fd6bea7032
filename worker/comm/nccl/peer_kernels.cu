#include "worker/comm/nccl/peer_kernels.h"

#include "worker/comm/nccl/peer_vectors.cuh"

namespace tandem::worker::comm {
namespace {

constexpr int kThreads = 512;

template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(PartSum s) {
  constexpr int kSize = Vec<T>::kSize;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t whole = s.elements / kSize;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t e = first; e < whole; e += stride) {
    Vec<T> sum;
#pragma unroll 4
    for (int r = 0; r < s.size; ++r) sum.add(reinterpret_cast<const uint4*>(s.parts[r])[e]);
    reinterpret_cast<uint4*>(s.out)[e] = sum.rounded();
  }
  for (std::int64_t e = kSize * whole + first; e < s.elements; e += stride) {
    float sum = 0.0f;
    for (int r = 0; r < s.size; ++r)
      sum += static_cast<float>(reinterpret_cast<const T*>(s.parts[r])[e]);
    reinterpret_cast<T*>(s.out)[e] = static_cast<T>(sum);
  }
}

template <class T>
cudaError_t launch(cudaStream_t stream, const PartSum& sum) {
  constexpr std::int64_t kMost = 132 * 2;  // enough to reach the memory's rate
  const std::int64_t wanted = (sum.elements / Vec<T>::kSize + kThreads) / kThreads;
  const auto blocks = static_cast<unsigned>(wanted < kMost ? wanted : kMost);
  sum_parts_kernel<T><<<blocks, kThreads, 0, stream>>>(sum);
  return cudaGetLastError();
}

}  // namespace

cudaError_t sum_parts(cudaStream_t stream, PeerType type, const PartSum& sum) {
  if (type == PeerType::kF32) return launch<float>(stream, sum);
  if (type == PeerType::kBF16) return launch<__nv_bfloat16>(stream, sum);
  return launch<__half>(stream, sum);
}

}  // namespace tandem::worker::comm
