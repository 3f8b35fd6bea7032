#include "worker/comm/collective_scratch.h"
#include "worker/comm/communicator.h"

#include <algorithm>
#include <numeric>

namespace tandem::worker::comm {

namespace {

using Kind = CommCall::Kind;

/// What the communicators of one rank share: whom they tell, and how many calls have begun.
struct Paper {
  bool on_host;
  CommWatcher watcher;
  std::int64_t begun = 0;
};

class MetaPending final : public Pending {
 public:
  MetaPending(std::shared_ptr<Paper> paper, CommCall wait)
      : paper_(std::move(paper)), wait_(std::move(wait)) {}
  void wait(kernels::Exec&) override { paper_->watcher(wait_); }

 private:
  const std::shared_ptr<Paper> paper_;
  const CommCall wait_;
};

class MetaCommunicator final : public Communicator {
 public:
  MetaCommunicator(int at, std::vector<int> members, std::shared_ptr<Paper> paper)
      : at_(at), members_(std::move(members)), paper_(std::move(paper)) {}

  [[nodiscard]] int rank() const override { return at_; }
  [[nodiscard]] int size() const override { return static_cast<int>(members_.size()); }
  void all_reduce_sum(kernels::Exec& exec, kernels::Tensor x) override {
    take(exec, all_reduce_plan(x.elements(), x.dtype, size()));
    tell(sum(Kind::kAllReduce, x));
  }
  void all_gather(kernels::Exec&, kernels::Tensor x, kernels::Tensor out) override {
    TANDEM_CHECK_EQ(out.bytes(), x.bytes() * size());
    tell({Kind::kAllGather, members_, out.bytes()});
  }
  std::unique_ptr<Pending> start_all_gather(kernels::Exec& exec, kernels::Tensor x,
                                            kernels::Tensor out) override {
    if (paper_->on_host || size() == 1 || !paper_->watcher)
      return Communicator::start_all_gather(exec, x, out);
    return begin({Kind::kStartGather, members_, out.bytes()});
  }
  void reduce_scatter_sum(kernels::Exec& exec, kernels::Tensor x, kernels::Tensor out) override {
    TANDEM_CHECK_EQ(x.elements(), out.elements() * size());
    take(exec, reduce_scatter_plan(out.elements(), x.dtype, size()));
    tell(sum(Kind::kReduceScatter, x));
  }
  std::unique_ptr<Pending> start_reduce_scatter_sum(kernels::Exec& exec, kernels::Tensor x,
                                                    kernels::Tensor out) override {
    if (paper_->on_host || size() == 1 || !paper_->watcher)
      return Communicator::start_reduce_scatter_sum(exec, x, out);
    return begin(sum(Kind::kStartReduceScatter, x));
  }
  [[nodiscard]] bool has_background() const override { return !paper_->on_host && size() > 1; }
  void broadcast(kernels::Exec&, kernels::Tensor x, int root) override {
    TANDEM_CHECK(root >= 0 && root < size(), "root ", root);
    tell({Kind::kBroadcast, members_, x.bytes()});
  }
  void barrier(kernels::Exec&) override {}
  void exchange_all(kernels::Exec&, std::span<const Message> sends,
                    std::span<const Message> receives) override {
    CommCall call{Kind::kExchange, members_};
    for (const Message& send : sends)
      call.sends.push_back({members_[static_cast<std::size_t>(send.rank)], send.x.bytes()});
    for (const Message& receive : receives)
      call.receives.push_back(
          {members_[static_cast<std::size_t>(receive.rank)], receive.x.bytes()});
    tell(call);
  }
  std::unique_ptr<Communicator> sub(std::span<const int> members) override {
    const auto at = std::find(members.begin(), members.end(), at_);
    TANDEM_CHECK(at != members.end(), "rank ", at_, " is not among the members");
    std::vector<int> theirs;
    for (const int member : members) theirs.push_back(members_[static_cast<std::size_t>(member)]);
    return std::make_unique<MetaCommunicator>(static_cast<int>(at - members.begin()),
                                              std::move(theirs), paper_);
  }

 private:
  void take(kernels::Exec& exec, const SumPlan& plan) const {
    if (plan.bytes == 0 || !paper_->on_host) return;
    const kernels::ArenaScope scope(exec.workspace);
    exec.workspace.alloc_bytes(plan.bytes);
  }
  [[nodiscard]] CommCall sum(Kind kind, const kernels::Tensor& x) const {
    CommCall call{kind, members_, x.bytes()};
    call.dtype = x.dtype;
    return call;
  }
  std::unique_ptr<Pending> begin(CommCall call) {
    call.begun = paper_->begun++;
    paper_->watcher(call);
    call.kind = Kind::kWait;
    return std::make_unique<MetaPending>(paper_, std::move(call));
  }
  void tell(const CommCall& call) const {
    if (paper_->watcher && size() > 1) paper_->watcher(call);
  }
  const int at_;
  const std::vector<int> members_;
  const std::shared_ptr<Paper> paper_;
};

}  // namespace

std::unique_ptr<Communicator> make_meta_communicator(int rank, int size, bool on_host,
                                                     CommWatcher watcher) {
  TANDEM_CHECK(rank >= 0 && rank < size, "rank ", rank, " of ", size);
  std::vector<int> members(static_cast<std::size_t>(size));
  std::iota(members.begin(), members.end(), 0);
  return std::make_unique<MetaCommunicator>(rank, std::move(members),
                                            std::make_shared<Paper>(on_host, std::move(watcher)));
}

}  // namespace tandem::worker::comm
