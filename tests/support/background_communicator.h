// A communicator as a GPU's is, on the CPU: says that what is begun goes on in the background, and
// does it as late as may be, when it is waited for. What is read before its time holds what was
// there before; what is overwritten before its time is what the others get.
#pragma once

#include "worker/comm/communicator.h"

#include <atomic>

namespace tandem::test {

class LateCommunicator final : public worker::comm::Communicator {
 public:
  using Exec = kernels::Exec;
  using Tensor = kernels::Tensor;
  using Message = worker::comm::Message;
  using Pending = worker::comm::Pending;

  LateCommunicator(std::unique_ptr<Communicator> comm, std::atomic<std::int64_t>& begun)
      : comm_(std::move(comm)), begun_(begun) {}
  [[nodiscard]] int rank() const override { return comm_->rank(); }
  [[nodiscard]] int size() const override { return comm_->size(); }
  [[nodiscard]] bool has_background() const override { return true; }
  void all_reduce_sum(Exec& exec, Tensor x) override { comm_->all_reduce_sum(exec, x); }
  void all_gather(Exec& exec, Tensor x, Tensor out) override { comm_->all_gather(exec, x, out); }
  void reduce_scatter_sum(Exec& exec, Tensor x, Tensor out) override {
    comm_->reduce_scatter_sum(exec, x, out);
  }
  std::unique_ptr<Pending> start_all_gather(Exec&, Tensor x, Tensor out) override {
    return begin([this, x, out](Exec& exec) { comm_->all_gather(exec, x, out); });
  }
  std::unique_ptr<Pending> start_reduce_scatter_sum(Exec&, Tensor x, Tensor out) override {
    return begin([this, x, out](Exec& exec) { comm_->reduce_scatter_sum(exec, x, out); });
  }
  void broadcast(Exec& exec, Tensor x, int root) override { comm_->broadcast(exec, x, root); }
  void barrier(Exec& exec) override { comm_->barrier(exec); }
  void exchange_all(Exec& exec, std::span<const Message> sends,
                    std::span<const Message> receives) override {
    comm_->exchange_all(exec, sends, receives);
  }
  std::unique_ptr<Communicator> sub(std::span<const int> members) override {
    return comm_->sub(members);
  }

 private:
  class Late final : public Pending {
   public:
    explicit Late(std::function<void(Exec&)> work) : work_(std::move(work)) {}
    void wait(Exec& exec) override { work_(exec); }

   private:
    const std::function<void(Exec&)> work_;
  };
  std::unique_ptr<Pending> begin(std::function<void(Exec&)> work) {
    ++begun_;
    return std::make_unique<Late>(std::move(work));
  }

  const std::unique_ptr<Communicator> comm_;
  std::atomic<std::int64_t>& begun_;
};

inline std::unique_ptr<worker::comm::Communicator> background_communicator(
    std::unique_ptr<worker::comm::Communicator> comm, std::atomic<std::int64_t>& begun) {
  if (comm->size() == 1) return comm;
  return std::make_unique<LateCommunicator>(std::move(comm), begun);
}

}  // namespace tandem::test
