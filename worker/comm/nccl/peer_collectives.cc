#include "worker/comm/nccl/peer_collectives.h"

#include "kernels/device_error.h"
#include "protocol/base/str.h"
#include "worker/comm/nccl/peer_kernels.h"

#include <algorithm>

namespace tandem::worker::comm {
namespace {

using kernels::DeviceError;
using kernels::Tensor;

constexpr std::int64_t kStagingBytes = 48 << 20;

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw DeviceError(str("CUDA: ", what, ": ", cudaGetErrorString(code)));
}

}  // namespace

PeerCollectives::~PeerCollectives() {
  if (staging_ == nullptr) return;
  (void)cudaDeviceSynchronize();
  (void)cudaFree(staging_);
}

void PeerCollectives::meet(cudaStream_t queue, std::uint32_t (PeerFlags::*flags)[kPeersMax],
                           std::uint32_t count) {
  const int me = memory_->rank();
  CUstreamBatchMemOpParams ops[2 * kPeersMax] = {};
  unsigned used = 0;
  for (int r = 0; r < memory_->size(); ++r) {
    if (r == me) continue;
    auto& write = ops[used++].writeValue;
    write.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
    write.address = reinterpret_cast<CUdeviceptr>((memory_->flags(r)->*flags) + me);
    write.value = count;
    write.flags = CU_STREAM_WRITE_VALUE_DEFAULT;  // behind a fence
  }
  for (int r = 0; r < memory_->size(); ++r) {
    if (r == me) continue;
    auto& wait = ops[used++].waitValue;
    wait.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
    wait.address = reinterpret_cast<CUdeviceptr>((memory_->flags(me)->*flags) + r);
    wait.value = count;
    wait.flags = CU_STREAM_WAIT_VALUE_GEQ;
  }
  if (memory_->driver().batch(queue, used, ops, 0) != CUDA_SUCCESS)
    throw DeviceError("CUDA: a queue cannot wait for another GPU");
}

void PeerCollectives::copy(cudaStream_t queue, void* to, const void* from, std::int64_t bytes) {
  if (to == from) return;
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice, queue),
        "copy from another GPU");
}

bool PeerCollectives::gather(cudaStream_t queue, const Tensor& x, const Tensor& out) {
  const PeerMemory::Region* region = memory_->find(x.data, x.bytes());
  if (region == nullptr) return false;
  const std::int64_t offset = static_cast<const char*>(x.data) - region->mine, bytes = x.bytes();
  meet(queue, &PeerFlags::ready, ++ready_);
  // Each rank begins with its neighbour's, so that no two read of the same one at a time.
  for (int i = 0; i < memory_->size(); ++i) {
    const int r = (memory_->rank() + i) % memory_->size();
    copy(queue, static_cast<char*>(out.data) + r * bytes,
         region->ranks[static_cast<std::size_t>(r)] + offset, bytes);
  }
  meet(queue, &PeerFlags::read, ++read_);
  return true;
}

bool PeerCollectives::reduce_scatter(cudaStream_t queue, const Tensor& x, const Tensor& out) {
  const PeerMemory::Region* region = memory_->find(x.data, x.bytes());
  if (region == nullptr || x.dtype != DType::kF32) return false;
  if (staging_ == nullptr) {
    void* made = nullptr;
    check(cudaMalloc(&made, kStagingBytes), "memory for others' addends");
    staging_ = static_cast<char*>(made);
  }
  const int me = memory_->rank(), size = memory_->size();
  const std::int64_t offset = static_cast<const char*>(x.data) - region->mine + me * out.bytes();
  const std::int64_t chunk = kStagingBytes / (size - 1) / 256 * 256;
  meet(queue, &PeerFlags::ready, ++ready_);
  for (std::int64_t at = 0; at < out.bytes(); at += chunk) {
    const std::int64_t bytes = std::min(chunk, out.bytes() - at);
    PartSum sum{};
    sum.out = reinterpret_cast<float*>(static_cast<char*>(out.data) + at);
    sum.elements = bytes / static_cast<std::int64_t>(sizeof(float));
    sum.size = size;
    sum.parts[me] = reinterpret_cast<const float*>(region->mine + offset + at);
    for (int i = 1; i < size; ++i) {
      const int r = (me + i) % size;
      char* const room = staging_ + (i - 1) * chunk;
      copy(queue, room, region->ranks[static_cast<std::size_t>(r)] + offset + at, bytes);
      sum.parts[r] = reinterpret_cast<const float*>(room);
    }
    check(sum_parts(queue, sum), "sum of addends");
  }
  meet(queue, &PeerFlags::read, ++read_);
  return true;
}

bool PeerCollectives::sum(cudaStream_t queue, const Tensor& x) {
  // Slices are rounded up to whole vectors.
  constexpr std::int64_t kPadding = kPeersMax * 16;
  if (x.bytes() > kSumBytes - kPadding) return false;
  if (!is_stored_float(x.dtype)) return false;
  SmallSum sum{};
  for (int r = 0; r < memory_->size(); ++r) sum.windows[r] = memory_->window(r);
  sum.x = x.data;
  sum.elements = x.elements();
  sum.rank = memory_->rank();
  sum.size = memory_->size();
  sum.turn = ++sums_;
  const PeerType type = x.dtype == DType::kF32    ? PeerType::kF32
                        : x.dtype == DType::kBF16 ? PeerType::kBF16
                                                  : PeerType::kF16;
  check(sum_small(queue, type, sum), "small sum");
  return true;
}

}  // namespace tandem::worker::comm
