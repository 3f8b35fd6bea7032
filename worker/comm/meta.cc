#include "worker/comm/collective_scratch.h"
#include "worker/comm/communicator.h"

#include <algorithm>

namespace tandem::worker::comm {

namespace {

class MetaCommunicator final : public Communicator {
 public:
  MetaCommunicator(int rank, int size, bool on_host)
      : rank_(rank), size_(size), on_host_(on_host) {}

  [[nodiscard]] int rank() const override { return rank_; }
  [[nodiscard]] int size() const override { return size_; }
  void all_reduce_sum(kernels::Exec& exec, kernels::Tensor x) override {
    take(exec, all_reduce_plan(x.elements(), x.dtype, size_));
  }
  void all_gather(kernels::Exec&, kernels::Tensor x, kernels::Tensor out) override {
    TANDEM_CHECK_EQ(out.bytes(), x.bytes() * size_);
  }
  void reduce_scatter_sum(kernels::Exec& exec, kernels::Tensor x, kernels::Tensor out) override {
    TANDEM_CHECK_EQ(x.elements(), out.elements() * size_);
    take(exec, reduce_scatter_plan(out.elements(), x.dtype, size_));
  }
  void broadcast(kernels::Exec&, kernels::Tensor, int root) override {
    TANDEM_CHECK(root >= 0 && root < size_, "root ", root);
  }
  void barrier(kernels::Exec&) override {}
  void exchange_all(kernels::Exec&, std::span<const Message>, std::span<const Message>) override {}
  std::unique_ptr<Communicator> sub(std::span<const int> members) override {
    const auto at = std::find(members.begin(), members.end(), rank_);
    TANDEM_CHECK(at != members.end(), "rank ", rank_, " is not among the members");
    return make_meta_communicator(static_cast<int>(at - members.begin()),
                                  static_cast<int>(members.size()), on_host_);
  }

 private:
  void take(kernels::Exec& exec, const SumPlan& plan) const {
    if (plan.bytes == 0 || !on_host_) return;
    const kernels::ArenaScope scope(exec.workspace);
    exec.workspace.alloc_bytes(plan.bytes);
  }
  const int rank_, size_;
  const bool on_host_;
};

}  // namespace

std::unique_ptr<Communicator> make_meta_communicator(int rank, int size, bool on_host) {
  TANDEM_CHECK(rank >= 0 && rank < size, "rank ", rank, " of ", size);
  return std::make_unique<MetaCommunicator>(rank, size, on_host);
}

}  // namespace tandem::worker::comm
