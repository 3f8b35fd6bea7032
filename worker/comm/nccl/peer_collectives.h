// Private to libtandem_nccl.so: collectives over memory that the GPUs of one gang map of each
// other (peer_memory.h). Large ones are the copy engines' work, which takes no multiprocessor;
// small sums are one kernel each. What is not shared, or does not suit, is left to NCCL: each call
// says so, the same on every rank. Nothing here waits on the host; a rank that never comes leaves
// the queue waiting. gather, reduce_scatter and fetch_addends of one object go on one queue, sum on
// one queue, which may be another: ranks count them. One device thread.
#pragma once

#include "kernels/op_args.h"
#include "worker/comm/nccl/peer_kernels.h"
#include "worker/comm/nccl/peer_memory.h"

#include <cuda_runtime.h>

#include <memory>

namespace tandem::worker::comm {

class PeerCollectives {
 public:
  explicit PeerCollectives(std::unique_ptr<PeerMemory> memory) : memory_(std::move(memory)) {}
  ~PeerCollectives();
  PeerCollectives(const PeerCollectives&) = delete;
  PeerCollectives& operator=(const PeerCollectives&) = delete;

  [[nodiscard]] PeerMemory& memory() { return *memory_; }

  /// out = the ranks' x, read where it lies; false: x is not shared. Done on `queue` when every
  /// rank has read.
  bool gather(cudaStream_t queue, const kernels::Tensor& x, const kernels::Tensor& out);
  /// out = this rank's slice of the sum over ranks of x [size * n], in rank order, in f32; false: x
  /// is not shared, or no f32, bf16 or f16. out may be that slice of x. Done on `queue` when every
  /// rank has read.
  bool reduce_scatter(cudaStream_t queue, const kernels::Tensor& x, const kernels::Tensor& out);
  /// The same in two: others' addends come on `queue`, and add_up() does what is left, with a
  /// kernel, on a queue that has waited for it. For a product on that queue may leave no room for a
  /// kernel beside it.
  struct Addends {
    PartSum sum{};
    PeerType type{};
    int slot = -1;
  };
  /// Only what fits into half of the room for others' addends, and not a third before add_up() of
  /// the first; else false.
  bool fetch_addends(cudaStream_t queue, const kernels::Tensor& x, const kernels::Tensor& out,
                     Addends& addends);
  /// Each is added up, or dropped, before what comes next on its queue is fetched.
  void add_up(cudaStream_t queue, const Addends& addends);
  void drop(const Addends& addends) { taken_[addends.slot] = false; }
  /// x = the sum over ranks, in rank order, in f32; false: no f32, bf16 or f16, or too large for
  /// this to be the fastest, unless it must be done here.
  bool sum(cudaStream_t queue, const kernels::Tensor& x, bool must);
  /// Communicator::sum_and_norm.
  bool sum_and_norm(cudaStream_t queue, const kernels::AddRmsNormArgs& a);
  /// Communicator::gather_columns.
  bool gather_columns(cudaStream_t queue, const kernels::Tensor& x, const kernels::Tensor& out);

 private:
  /// On the queue: every rank's counter at `flags` reaches this one's count.
  void meet(cudaStream_t queue, std::uint32_t (PeerFlags::*flags)[kPeersMax], std::uint32_t count);
  void copy(cudaStream_t queue, void* to, const void* from, std::int64_t bytes);
  /// Bytes [at, at + bytes) of all ranks' addends for `out`; the others' come to `room`, a `chunk`
  /// for each.
  PartSum fetch(cudaStream_t queue, const PeerMemory::Region& region, const kernels::Tensor& x,
                const kernels::Tensor& out, std::int64_t at, std::int64_t bytes, char* room,
                std::int64_t chunk);
  char* staging();
  [[nodiscard]] SumRooms rooms(std::int64_t bytes) const;

  const std::unique_ptr<PeerMemory> memory_;
  std::uint32_t ready_ = 0, read_ = 0;
  char* staging_ = nullptr;  ///< others' addends on their way: kStagingBytes
  bool taken_[2] = {};       ///< its halves, by addends that are not added up
  int turn_ = 0;
};

}  // namespace tandem::worker::comm
