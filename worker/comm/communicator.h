// Collectives between the ranks of one gang (a job or a sharded replica at one epoch). A gang of
// one uses the trivial body here; NCCL, MPI and threads stand behind the same interface. One device
// thread per rank calls it; work is ordered by the Exec's stream. A failure of any member is a
// DeviceError on the others: gangs are disposable and never repaired.
#pragma once

#include "kernels/exec.h"
#include "kernels/tensor.h"

#include <functional>
#include <memory>
#include <vector>

namespace tandem::worker::comm {

class Communicator {
 public:
  virtual ~Communicator() = default;
  [[nodiscard]] virtual int rank() const = 0;
  [[nodiscard]] virtual int size() const = 0;
  /// x [*] f32 or cd: sum over ranks, in rank order, in place on every rank.
  virtual void all_reduce_sum(kernels::Exec& exec, kernels::Tensor x) = 0;
  /// out [size * n] = the ranks' x [n], in rank order.
  virtual void all_gather(kernels::Exec& exec, kernels::Tensor x, kernels::Tensor out) = 0;
  /// out [n] = this rank's slice of the sum over ranks of x [size * n].
  virtual void reduce_scatter_sum(kernels::Exec& exec, kernels::Tensor x, kernels::Tensor out) = 0;
  virtual void broadcast(kernels::Exec& exec, kernels::Tensor x, int root) = 0;
  virtual void barrier(kernels::Exec& exec) = 0;
};

/// The communicator of a gang of one: every collective is the identity (all_gather and
/// reduce_scatter copy through `copy`, which is Ops::copy on any backend, meta included).
std::unique_ptr<Communicator> make_single_communicator(
    std::function<void(kernels::Exec&, kernels::Tensor from, kernels::Tensor to)> copy);

/// `size` communicators that meet in this process, one per thread: for tests of sharded code on
/// CPU.
std::vector<std::unique_ptr<Communicator>> make_thread_communicators(int size);

}  // namespace tandem::worker::comm
