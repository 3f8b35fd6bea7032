#include "worker/comm/nccl/peer_collectives.h"

#include "kernels/device_error.h"
#include "protocol/base/str.h"

#include <algorithm>

namespace tandem::worker::comm {
namespace {

using kernels::DeviceError;
using kernels::Tensor;

constexpr std::int64_t kStagingBytes = 64 << 20;
/// Sums up to here are sent whole to every rank, and from here on left to NCCL. Over four H200,
/// with the norm: 128 KiB take 8.0 us in one shot and 8.8 in two, 256 KiB 9, 512 KiB 12.2 and 9.4;
/// 4 MiB take 27 us.
constexpr std::int64_t kOneShotBytes = 256 << 10, kSumBytesMax = 8 << 20;

void check_aligned(std::initializer_list<Tensor> tensors) {
  for (const Tensor& x : tensors)
    TANDEM_CHECK(reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0,
                 "rows of whole vectors begin where a vector may");
}

PeerType peer_type(DType dtype) {
  return dtype == DType::kF32    ? PeerType::kF32
         : dtype == DType::kBF16 ? PeerType::kBF16
                                 : PeerType::kF16;
}

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

char* PeerCollectives::staging() {
  if (staging_ == nullptr) {
    void* made = nullptr;
    check(cudaMalloc(&made, kStagingBytes), "memory for others' addends");
    staging_ = static_cast<char*>(made);
  }
  return staging_;
}

PartSum PeerCollectives::fetch(cudaStream_t queue, const PeerMemory::Region& region,
                               const Tensor& x, const Tensor& out, std::int64_t at,
                               std::int64_t bytes, char* room, std::int64_t chunk) {
  const int me = memory_->rank(), size = memory_->size();
  const std::int64_t offset =
      static_cast<const char*>(x.data) - region.mine + me * out.bytes() + at;
  PartSum sum{};
  sum.out = static_cast<char*>(out.data) + at;
  sum.elements = bytes / dtype_bytes(x.dtype);
  sum.size = size;
  sum.parts[me] = region.mine + offset;
  for (int i = 1; i < size; ++i) {
    const int r = (me + i) % size;
    char* const to = room + (i - 1) * chunk;
    copy(queue, to, region.ranks[static_cast<std::size_t>(r)] + offset, bytes);
    sum.parts[r] = to;
  }
  return sum;
}

bool PeerCollectives::reduce_scatter(cudaStream_t queue, const Tensor& x, const Tensor& out) {
  const PeerMemory::Region* region = memory_->find(x.data, x.bytes());
  if (region == nullptr || !is_stored_float(x.dtype) || out.bytes() % 16 != 0 || taken_[0] ||
      taken_[1])
    return false;
  check_aligned({x, out});
  const std::int64_t chunk = kStagingBytes / (memory_->size() - 1) / 256 * 256;
  meet(queue, &PeerFlags::ready, ++ready_);
  for (std::int64_t at = 0; at < out.bytes(); at += chunk) {
    const std::int64_t bytes = std::min(chunk, out.bytes() - at);
    const PartSum sum = fetch(queue, *region, x, out, at, bytes, staging(), chunk);
    check(sum_parts(queue, peer_type(x.dtype), sum), "sum of addends");
  }
  meet(queue, &PeerFlags::read, ++read_);
  return true;
}

bool PeerCollectives::fetch_addends(cudaStream_t queue, const Tensor& x, const Tensor& out,
                                    Addends& addends) {
  const PeerMemory::Region* region = memory_->find(x.data, x.bytes());
  const std::int64_t chunk = kStagingBytes / 2 / (memory_->size() - 1) / 256 * 256;
  if (region == nullptr || !is_stored_float(x.dtype) || out.bytes() % 16 != 0 ||
      out.bytes() > chunk || taken_[turn_])
    return false;
  check_aligned({x, out});
  addends.slot = turn_;
  addends.type = peer_type(x.dtype);
  taken_[turn_] = true;
  turn_ = 1 - turn_;
  meet(queue, &PeerFlags::ready, ++ready_);
  addends.sum = fetch(queue, *region, x, out, 0, out.bytes(),
                      staging() + addends.slot * (kStagingBytes / 2), chunk);
  meet(queue, &PeerFlags::read, ++read_);
  return true;
}

void PeerCollectives::add_up(cudaStream_t queue, const Addends& addends) {
  drop(addends);
  check(sum_parts(queue, addends.type, addends.sum), "sum of addends");
}

SumRooms PeerCollectives::rooms(std::int64_t bytes) const {
  SumRooms rooms{};
  for (int r = 0; r < memory_->size(); ++r) rooms.windows[r] = memory_->window(r);
  rooms.rank = memory_->rank();
  rooms.size = memory_->size();
  rooms.one_shot = bytes <= std::min(kOneShotBytes, kRoomBytes / rooms.size - 16);
  return rooms;
}

bool PeerCollectives::sum(cudaStream_t queue, const Tensor& x, bool must) {
  if (!is_stored_float(x.dtype) || (x.bytes() > kSumBytesMax && !must)) return false;
  const PeerType type = peer_type(x.dtype);
  const SumRooms rooms = this->rooms(x.bytes());
  for (std::int64_t at = 0; at < x.bytes(); at += kSumAtOnceBytes) {
    const std::int64_t bytes = std::min(kSumAtOnceBytes, x.bytes() - at);
    const PlainSum sum{static_cast<char*>(x.data) + at, bytes / dtype_bytes(x.dtype)};
    TANDEM_CHECK(sum_fits(rooms, type, sum), bytes, " bytes over ", rooms.size, " ranks");
    check(comm::sum(queue, type, rooms, sum), "sum over GPUs");
  }
  return true;
}

bool PeerCollectives::sum_and_norm(cudaStream_t queue, const kernels::AddRmsNormArgs& a) {
  if (!is_stored_float(a.y.dtype)) return false;
  const PeerType type = peer_type(a.y.dtype);
  const SumRooms rooms = this->rooms(a.y.bytes());
  const NormSum sum{
      a.residual.data, a.delta.data, a.weight.data, a.y.data, static_cast<float*>(a.rstd.data),
      a.eps,           a.y.dim(0),   a.y.dim(1)};
  if (!norm_fits(rooms, type, sum)) return false;
  check_aligned({a.residual, a.delta, a.weight, a.y});
  check(comm::sum_and_norm(queue, type, rooms, sum), "sum and norm over GPUs");
  return true;
}

bool PeerCollectives::gather_columns(cudaStream_t queue, const Tensor& x, const Tensor& out) {
  const std::int64_t rows = x.dim(0), row_bytes = x.dim(1) * dtype_bytes(x.dtype);
  const SumRooms rooms = this->rooms(0);
  if (x.dtype != DType::kF32 || row_bytes % 16 != 0 || row_bytes * rooms.size > kRoomBytes)
    return false;
  const std::int64_t at_once = kRoomBytes / rooms.size / row_bytes;
  check_aligned({x, out});
  for (std::int64_t row = 0; row < rows; row += at_once) {
    const std::int64_t count = std::min(at_once, rows - row);
    check(comm::gather_columns(
              queue, rooms, {x.rows(row, count).data, out.rows(row, count).data, count, row_bytes}),
          "gather of columns");
  }
  return true;
}

}  // namespace tandem::worker::comm
