// Collectives between the ranks of one gang (a job or a sharded replica at one epoch). A gang of
// one uses the trivial body here; NCCL, MPI and threads stand behind the same interface. One device
// thread per rank calls it; work is ordered by the Exec's stream. A failure of any member is a
// DeviceError on the others: gangs are disposable and never repaired.
//
// Every member makes the same calls in the same order. Sums are taken in rank order (f32, bf16
// and f16 in f32, f64 in f64; 16 bits are rounded once), so they are the same bits on every rank,
// in every run and with every implementation that runs on CPUs; NCCL has an order of its own
// (nccl_communicator.h). On CPUs scratch comes from Exec::workspace and is a pure function of sizes
// (collective_scratch.h), the same for every implementation: the meta communicator takes it too.
#pragma once

#include "kernels/exec.h"
#include "kernels/op_args.h"

#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace tandem::worker::comm {

/// A collective that may go on in the background. Its tensors are not touched before wait();
/// destroying it waits too.
class Pending {
 public:
  virtual ~Pending() = default;
  virtual void wait(kernels::Exec& exec) = 0;
};

/// A tensor and the rank that it goes to or comes from.
struct Message {
  kernels::Tensor x;
  int rank = 0;
};

/// Of a GPU, what collectives in the background may take, and products leave them, where they are
/// not the copy engines' work. Measured with ZeRO-3 of an 8B base on two H100: 8 beat 4, 12 and 16,
/// and beat taking and sparing nothing.
inline constexpr int kGatherMultiprocessors = 8;

class Communicator {
 public:
  virtual ~Communicator() = default;
  [[nodiscard]] virtual int rank() const = 0;
  [[nodiscard]] virtual int size() const = 0;
  /// x [*] f32, bf16, f16 or f64: sum over ranks, in rank order, in place on every rank.
  virtual void all_reduce_sum(kernels::Exec& exec, kernels::Tensor x) = 0;
  /// all_reduce_sum(a.residual), then Ops::add_rms_norm_forward(a), as one kernel; a sum of squares
  /// may be added up in another order than there. false: nothing has been done, on no rank.
  [[nodiscard]] virtual bool sum_and_norm(kernels::Exec& /*exec*/,
                                          const kernels::AddRmsNormArgs& /*a*/) {
    return false;
  }
  /// out [t, size * n] f32 = beside each other, in rank order, the ranks' x [t, n]. false: nothing
  /// has been done, on no rank.
  [[nodiscard]] virtual bool gather_columns(kernels::Exec& /*exec*/, kernels::Tensor /*x*/,
                                            kernels::Tensor /*out*/) {
    return false;
  }
  /// Whether all_reduce_sum, sum_and_norm and gather_columns may be recorded, as they may where
  /// they are kernels and nothing else. What else goes through a communicator may not.
  [[nodiscard]] virtual bool records() const { return false; }
  /// Runs `issue`, which issues what holds sums of this communicator through Ops::replay: nobody
  /// else touches exec's queue meanwhile, and whoever watches it learns of what was replayed.
  virtual void issue_recorded(kernels::Exec& /*exec*/, const std::function<void()>& issue) {
    issue();
  }
  /// out [size * n] = the ranks' x [n], in rank order. x may be this rank's part of out.
  virtual void all_gather(kernels::Exec& exec, kernels::Tensor x, kernels::Tensor out) = 0;
  /// The same, begun now and ended by wait(); other collectives may come between, in the same order
  /// on every rank. Where nothing runs in the background it is done when it is waited for.
  virtual std::unique_ptr<Pending> start_all_gather(kernels::Exec& exec, kernels::Tensor x,
                                                    kernels::Tensor out);
  /// out [n] = this rank's slice of the sum over ranks of x [size * n]. out may be that slice of x;
  /// x is otherwise left as it was.
  virtual void reduce_scatter_sum(kernels::Exec& exec, kernels::Tensor x, kernels::Tensor out) = 0;
  /// The same, begun now and ended by wait(), as start_all_gather.
  virtual std::unique_ptr<Pending> start_reduce_scatter_sum(kernels::Exec& exec, kernels::Tensor x,
                                                            kernels::Tensor out);
  virtual void broadcast(kernels::Exec& exec, kernels::Tensor x, int root) = 0;
  virtual void barrier(kernels::Exec& exec) = 0;
  /// Sends and receives at once. A send may wait for its receive: ranks that send to each other in
  /// a circle must do so in one call each. Several tensors between the same two ranks meet in the
  /// order in which both sides name them. Shapes and dtypes are agreed beforehand.
  virtual void exchange_all(kernels::Exec& exec, std::span<const Message> sends,
                            std::span<const Message> receives) = 0;
  /// One send and one receive; an undefined tensor leaves its half out.
  void exchange(kernels::Exec& exec, kernels::Tensor x, int to, kernels::Tensor y, int from) {
    const Message send{x, to}, receive{y, from};
    exchange_all(exec, {&send, x.defined() ? 1u : 0u}, {&receive, y.defined() ? 1u : 0u});
  }
  /// Every rank's `x`, equally large, in an arena of Sharing::kPeers, is what collectives of this
  /// communicator will often read. Between GPUs of one host those that begin in the background are
  /// then the copy engines' work and take no multiprocessor: true, on every rank. Elsewhere it
  /// changes nothing: false. Called by all ranks at once; other ranks keep the memory mapped until
  /// their communicators end, whatever becomes of the arena.
  virtual bool share(kernels::Exec& /*exec*/, kernels::Tensor /*x*/) { return false; }
  /// Whether what is begun goes on in the background, so that a second buffer pays.
  [[nodiscard]] virtual bool has_background() const { return false; }
  /// Multiprocessors that collectives in the background take of large products.
  [[nodiscard]] virtual int background_multiprocessors() const { return 0; }
  /// The communicator of `members` (ranks of this one, in the order of their new ranks, this rank
  /// among them). Every rank of this communicator calls it, each with its own group: the groups are
  /// disjoint. Pure bookkeeping on CPUs. Must not outlive the communicator that came first.
  virtual std::unique_ptr<Communicator> sub(std::span<const int> members) = 0;
};

/// The communicator of a gang of one: every collective is the identity (all_gather and
/// reduce_scatter copy through `copy`, which is Ops::copy on any backend, meta included).
std::unique_ptr<Communicator> make_single_communicator(
    std::function<void(kernels::Exec&, kernels::Tensor from, kernels::Tensor to)> copy);

/// `size` communicators that meet in this process, one per thread: for tests of sharded code on
/// CPU.
std::vector<std::unique_ptr<Communicator>> make_thread_communicators(int size);

/// A collective on paper: who takes part and how much is moved.
struct CommCall {
  enum class Kind : int {
    kAllReduce,
    kAllGather,
    kReduceScatter,
    kBroadcast,
    kExchange,
    kStartGather,         ///< in the background, until kWait
    kStartReduceScatter,  ///< likewise
    kWait,
  };
  Kind kind = Kind::kAllReduce;
  std::vector<int> members;  ///< ranks of the gang, in the order of the group
  std::int64_t bytes = 0;    ///< of the whole (unsharded) tensor
  std::int64_t begun = 0;    ///< kStart..., kWait: which one of this rank
  struct Part {
    int rank = 0;  ///< of the gang
    std::int64_t bytes = 0;
  };
  std::vector<Part> sends = {}, receives = {};  ///< kExchange
  DType dtype = DType::kF32;                    ///< of sums
};
using CommWatcher = std::function<void(const CommCall&)>;

/// Rank `rank` of a gang of `size` that exists only on paper: takes every collective's scratch and
/// moves nothing. For dry runs. Without `on_host` it stands for NCCL, which takes none from
/// Exec::workspace. `watcher`, where given, hears of every call; barriers and groups of one move
/// nothing and are left out.
std::unique_ptr<Communicator> make_meta_communicator(int rank, int size, bool on_host = true,
                                                     CommWatcher watcher = {});

}  // namespace tandem::worker::comm
