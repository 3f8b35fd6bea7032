// Private to libtandem_nccl.so: what sums over the memory of several GPUs take of a multiprocessor.
#pragma once

#include "worker/comm/nccl/peer_memory.h"

#include <cuda_runtime.h>

namespace tandem::worker::comm {

enum class PeerType : int { kF32, kBF16, kF16 };

/// A small sum: its addends go through the windows.
struct SmallSum {
  char* windows[kPeersMax];
  void* x;
  std::int64_t elements;
  int rank, size;
  std::uint32_t turn;  ///< of this group's small sums, from 1; the same on every rank
};
/// x becomes the sum over ranks, in rank order, in f32, rounded once. Waits, on the device, until
/// every rank is there.
cudaError_t sum_small(cudaStream_t stream, PeerType type, const SmallSum& sum);

/// out[e] = parts[0][e] + parts[1][e] + ..., `elements` f32 each; all aligned to 16 bytes.
struct PartSum {
  const float* parts[kPeersMax];
  float* out;
  std::int64_t elements;
  int size;
};
cudaError_t sum_parts(cudaStream_t stream, const PartSum& sum);

}  // namespace tandem::worker::comm
