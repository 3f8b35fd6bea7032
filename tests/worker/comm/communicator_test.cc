#include "worker/comm/communicator.h"

#include "kernels/cpu/cpu_backend.h"

#include <gtest/gtest.h>

#include <numeric>
#include <thread>

namespace tandem::worker::comm {
namespace {

/// A tensor over a host vector; collectives of threads work on host memory.
kernels::Tensor over(std::vector<float>& values) {
  return {values.data(), DType::kF32, {static_cast<std::int64_t>(values.size())}};
}

class Ranks : public testing::TestWithParam<int> {
 protected:
  Ranks()
      : backend(kernels::make_cpu_backend({1, 0})),
        workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace, "workspace",
                  1 << 20),
        exec{workspace},
        ranks(make_thread_communicators(GetParam())) {}

  /// Runs `body(rank)` on every rank at once.
  template <class F>
  void on_all(const F& body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < GetParam(); ++r) threads.emplace_back([&, r] { body(r); });
    for (std::thread& thread : threads) thread.join();
  }

  kernels::Backend backend;
  kernels::Arena workspace;
  kernels::Exec exec;
  std::vector<std::unique_ptr<Communicator>> ranks;
};

TEST_P(Ranks, AllReduceSumsInRankOrderToTheSameBitsEverywhere) {
  const int size = GetParam();
  for (int round = 0; round < 20; ++round) {
    // Values whose f32 sum depends on the order.
    std::vector<std::vector<float>> values(static_cast<std::size_t>(size));
    std::vector<float> expected(100, 0.0f);
    for (int r = 0; r < size; ++r)
      for (int e = 0; e < 100; ++e) {
        const float value = (r % 2 ? -1.0f : 1.0f) * static_cast<float>(1 << (r * 7 % 24)) +
                            static_cast<float>(e) * 0.1f;
        values[static_cast<std::size_t>(r)].push_back(value);
        expected[static_cast<std::size_t>(e)] += value;
      }
    on_all([&](int r) {
      ranks[static_cast<std::size_t>(r)]->all_reduce_sum(exec,
                                                         over(values[static_cast<std::size_t>(r)]));
    });
    for (const auto& result : values) EXPECT_EQ(result, expected);
  }
}

TEST_P(Ranks, GatherScatterAndBroadcastPutEveryPartInItsPlace) {
  const int size = GetParam();
  const auto n = static_cast<std::size_t>(size);
  std::vector<std::vector<float>> mine(n), gathered(n), all(n), scattered(n), sent(n);
  for (std::size_t r = 0; r < n; ++r) {
    mine[r] = {static_cast<float>(r), static_cast<float>(r) + 0.5f};
    gathered[r].resize(2 * n);
    all[r].resize(2 * n);
    std::iota(all[r].begin(), all[r].end(), static_cast<float>(100 * r));
    scattered[r].resize(2);
    sent[r] = {static_cast<float>(r), -1.0f};
  }
  on_all([&](int rank) {
    const auto r = static_cast<std::size_t>(rank);
    ranks[r]->all_gather(exec, over(mine[r]), over(gathered[r]));
    ranks[r]->reduce_scatter_sum(exec, over(all[r]), over(scattered[r]));
    ranks[r]->barrier(exec);
    ranks[r]->broadcast(exec, over(sent[r]), size - 1);
  });
  for (std::size_t r = 0; r < n; ++r) {
    for (std::size_t from = 0; from < n; ++from) {
      EXPECT_EQ(gathered[r][2 * from], static_cast<float>(from));
      EXPECT_EQ(gathered[r][2 * from + 1], static_cast<float>(from) + 0.5f);
    }
    for (std::size_t e = 0; e < 2; ++e) {
      float sum = 0.0f;
      for (std::size_t from = 0; from < n; ++from)
        sum += static_cast<float>(100 * from + 2 * r + e);
      EXPECT_EQ(scattered[r][e], sum);
    }
    EXPECT_EQ(sent[r], (std::vector<float>{static_cast<float>(size - 1), -1.0f}));
  }
}

TEST_P(Ranks, EachKnowsItsPlace) {
  for (int r = 0; r < GetParam(); ++r) {
    EXPECT_EQ(ranks[static_cast<std::size_t>(r)]->rank(), r);
    EXPECT_EQ(ranks[static_cast<std::size_t>(r)]->size(), GetParam());
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, Ranks, testing::Values(1, 2, 5));

TEST(SingleCommunicator, IsTheIdentity) {
  kernels::Backend backend = kernels::make_cpu_backend({1, 0});
  kernels::Arena workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", 1 << 20);
  kernels::Exec exec{workspace};
  const auto comm =
      make_single_communicator([&](kernels::Exec& e, kernels::Tensor from, kernels::Tensor to) {
        backend.ops->copy(e, from, to);
      });
  std::vector<float> x{1, 2, 3}, y(3), z(3);
  comm->all_reduce_sum(exec, over(x));
  comm->all_gather(exec, over(x), over(y));
  comm->reduce_scatter_sum(exec, over(x), over(z));
  comm->broadcast(exec, over(x), 0);
  comm->barrier(exec);
  EXPECT_EQ(x, (std::vector<float>{1, 2, 3}));
  EXPECT_EQ(y, x);
  EXPECT_EQ(z, x);
  EXPECT_EQ(comm->size(), 1);
}

}  // namespace
}  // namespace tandem::worker::comm
