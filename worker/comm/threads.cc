#include "worker/comm/communicator.h"

#include <condition_variable>
#include <cstring>
#include <mutex>

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
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [&] { return generation_ != generation; });
  }
  void publish(int rank, kernels::Tensor view) { views_[static_cast<std::size_t>(rank)] = view; }
  [[nodiscard]] const kernels::Tensor& view(int rank) const {
    return views_[static_cast<std::size_t>(rank)];
  }

 private:
  const int size_;
  std::vector<kernels::Tensor> views_;  ///< written before a meeting, read after it
  std::mutex mutex_;
  std::condition_variable all_here_;
  int arrived_ = 0;
  std::uint64_t generation_ = 0;
};

float load(const kernels::Tensor& x, std::int64_t i) {
  return x.dtype == DType::kF32 ? x.as<float>()[i] : to_f32(x.as<bf16>()[i]);
}
void store(const kernels::Tensor& x, std::int64_t i, float value) {
  if (x.dtype == DType::kF32)
    x.as<float>()[i] = value;
  else
    x.as<bf16>()[i] = to_bf16(value);
}

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<Meeting> meeting, int rank)
      : meeting_(std::move(meeting)), rank_(rank) {}

  [[nodiscard]] int rank() const override { return rank_; }
  [[nodiscard]] int size() const override { return meeting_->size(); }

  void all_reduce_sum(kernels::Exec&, kernels::Tensor x) override {
    const std::vector<float> sum = summed(x, 0, x.elements());
    meeting_->meet();  // everybody has read everybody's input
    for (std::size_t i = 0; i < sum.size(); ++i) store(x, static_cast<std::int64_t>(i), sum[i]);
  }
  void all_gather(kernels::Exec&, kernels::Tensor x, kernels::Tensor out) override {
    TANDEM_CHECK_EQ(out.bytes(), x.bytes() * size());
    meeting_->publish(rank_, x);
    meeting_->meet();
    for (int r = 0; r < size(); ++r)
      std::memcpy(static_cast<char*>(out.data) + r * x.bytes(), meeting_->view(r).data,
                  static_cast<std::size_t>(x.bytes()));
    meeting_->meet();
  }
  void reduce_scatter_sum(kernels::Exec&, kernels::Tensor x, kernels::Tensor out) override {
    TANDEM_CHECK_EQ(x.elements(), out.elements() * size());
    const std::vector<float> sum = summed(x, rank_ * out.elements(), out.elements());
    meeting_->meet();
    for (std::size_t i = 0; i < sum.size(); ++i) store(out, static_cast<std::int64_t>(i), sum[i]);
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

 private:
  /// Elements [begin, begin + count) of the sum over ranks, in rank order and f32: the same bits on
  /// every rank, whoever came first.
  std::vector<float> summed(const kernels::Tensor& x, std::int64_t begin, std::int64_t count) {
    TANDEM_CHECK(x.dtype == DType::kF32 || x.dtype == DType::kBF16, dtype_name(x.dtype));
    meeting_->publish(rank_, x);
    meeting_->meet();
    std::vector<float> sum(static_cast<std::size_t>(count), 0.0f);
    for (int r = 0; r < size(); ++r) {
      const kernels::Tensor& view = meeting_->view(r);
      TANDEM_CHECK_EQ(view.elements(), x.elements(), "rank ", r);
      for (std::int64_t i = 0; i < count; ++i)
        sum[static_cast<std::size_t>(i)] += load(view, begin + i);
    }
    return sum;
  }

  std::shared_ptr<Meeting> meeting_;
  const int rank_;
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
