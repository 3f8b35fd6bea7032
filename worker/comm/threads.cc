#include "worker/comm/collective_scratch.h"
#include "worker/comm/communicator.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

namespace tandem::worker::comm {

namespace {

/// What the ranks of one gang share. Every collective is: publish a pointer, meet, read the others'
/// memory, meet again (so that nobody changes what another still reads).
class Meeting {
 public:
  explicit Meeting(int size) : size_(size), views_(static_cast<std::size_t>(size)) {}
  [[nodiscard]] int size() const { return size_; }

  void meet() {
    std::unique_lock lock(mutex_);
    const std::uint64_t generation = generation_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++generation_;
      changed_.notify_all();
      return;
    }
    changed_.wait(lock, [&] { return generation_ != generation; });
  }
  void publish(int rank, kernels::Tensor view) { views_[static_cast<std::size_t>(rank)] = view; }
  [[nodiscard]] const kernels::Tensor& view(int rank) const {
    return views_[static_cast<std::size_t>(rank)];
  }

  void post(int from, int to, const kernels::Tensor& x) {
    const auto* bytes = static_cast<const char*>(x.data);
    const std::lock_guard lock(mutex_);
    mail_[{from, to}].emplace_back(bytes, bytes + x.bytes());
    changed_.notify_all();
  }
  void take(int from, int to, const kernels::Tensor& y) {
    std::unique_lock lock(mutex_);
    auto& box = mail_[{from, to}];
    changed_.wait(lock, [&] { return !box.empty(); });
    TANDEM_CHECK_EQ(static_cast<std::int64_t>(box.front().size()), y.bytes(), "from rank ", from);
    std::memcpy(y.data, box.front().data(), box.front().size());
    box.pop_front();
  }

  /// The meeting of `members` that the ranks ask for with their `call`-th sub().
  std::shared_ptr<Meeting> sub(int call, const std::vector<int>& members) {
    const std::lock_guard lock(mutex_);
    auto& meeting = subs_[{call, members}];
    if (!meeting) meeting = std::make_shared<Meeting>(static_cast<int>(members.size()));
    return meeting;
  }

 private:
  const int size_;
  std::vector<kernels::Tensor> views_;  ///< written before a meeting, read after it
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
  std::uint64_t generation_ = 0;
  std::map<std::pair<int, int>, std::deque<std::vector<char>>> mail_;  ///< by (from, to)
  std::map<std::pair<int, std::vector<int>>, std::shared_ptr<Meeting>> subs_;
};

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<Meeting> meeting, int rank)
      : meeting_(std::move(meeting)), rank_(rank) {}

  [[nodiscard]] int rank() const override { return rank_; }
  [[nodiscard]] int size() const override { return meeting_->size(); }

  void all_reduce_sum(kernels::Exec& exec, kernels::Tensor x) override {
    const SumPlan plan = all_reduce_plan(x.elements(), x.dtype, size());
    sum(exec, plan, x, 0, x);
  }
  void all_gather(kernels::Exec&, kernels::Tensor x, kernels::Tensor out) override {
    TANDEM_CHECK_EQ(out.bytes(), x.bytes() * size());
    meeting_->publish(rank_, x);
    meeting_->meet();
    for (int r = 0; r < size(); ++r) {
      char* to = static_cast<char*>(out.data) + r * x.bytes();
      if (to != meeting_->view(r).data)
        std::memcpy(to, meeting_->view(r).data, static_cast<std::size_t>(x.bytes()));
    }
    meeting_->meet();
  }
  void reduce_scatter_sum(kernels::Exec& exec, kernels::Tensor x, kernels::Tensor out) override {
    TANDEM_CHECK_EQ(x.elements(), out.elements() * size());
    TANDEM_CHECK(x.dtype == out.dtype);
    const SumPlan plan = reduce_scatter_plan(out.elements(), x.dtype, size());
    if (size() == 1 && out.data != x.data)
      std::memcpy(out.data, x.data, static_cast<std::size_t>(x.bytes()));
    sum(exec, plan, x, rank_ * out.elements(), out);
  }
  void broadcast(kernels::Exec&, kernels::Tensor x, int root) override {
    TANDEM_CHECK(root >= 0 && root < size(), "root ", root);
    meeting_->publish(rank_, x);
    meeting_->meet();
    if (rank_ != root)
      std::memcpy(x.data, meeting_->view(root).data, static_cast<std::size_t>(x.bytes()));
    meeting_->meet();
  }
  void barrier(kernels::Exec&) override { meeting_->meet(); }
  void exchange_all(kernels::Exec&, std::span<const Message> sends,
                    std::span<const Message> receives) override {
    for (const Message& m : sends) meeting_->post(rank_, m.rank, m.x);
    for (const Message& m : receives) meeting_->take(m.rank, rank_, m.x);
  }
  std::unique_ptr<Communicator> sub(std::span<const int> members) override {
    const auto at = std::find(members.begin(), members.end(), rank_);
    TANDEM_CHECK(at != members.end(), "rank ", rank_, " is not among the members");
    return std::make_unique<ThreadCommunicator>(
        meeting_->sub(subs_++, {members.begin(), members.end()}),
        static_cast<int>(at - members.begin()));
  }

 private:
  /// out = the sum over ranks of x's elements from `begin` on, piece by piece.
  void sum(kernels::Exec& exec, const SumPlan& plan, const kernels::Tensor& x, std::int64_t begin,
           const kernels::Tensor& out) {
    if (plan.bytes == 0) return;
    const kernels::ArenaScope scope(exec.workspace);
    void* scratch = exec.workspace.alloc_bytes(plan.bytes);
    const std::int64_t width = dtype_bytes(x.dtype);
    meeting_->publish(rank_, x);
    meeting_->meet();
    for (std::int64_t e = 0; e < out.elements(); e += plan.piece) {
      const std::int64_t count = std::min(plan.piece, out.elements() - e);
      std::vector<const void*> parts;
      for (int r = 0; r < size(); ++r) {
        TANDEM_CHECK_EQ(meeting_->view(r).elements(), x.elements(), "rank ", r);
        parts.push_back(static_cast<const char*>(meeting_->view(r).data) + (begin + e) * width);
      }
      sum_in_rank_order(parts, x.dtype, count, scratch);
      meeting_->meet();  // everybody has read everybody's piece
      std::memcpy(static_cast<char*>(out.data) + e * width, scratch,
                  static_cast<std::size_t>(count * width));
    }
    meeting_->meet();
  }

  std::shared_ptr<Meeting> meeting_;
  const int rank_;
  int subs_ = 0;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> make_thread_communicators(int size) {
  TANDEM_CHECK_GE(size, 1);
  auto meeting = std::make_shared<Meeting>(size);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int r = 0; r < size; ++r) ranks.push_back(std::make_unique<ThreadCommunicator>(meeting, r));
  return ranks;
}

}  // namespace tandem::worker::comm
