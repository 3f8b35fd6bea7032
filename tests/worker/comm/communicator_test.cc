#include "worker/comm/communicator.h"

#include "kernels/meta/meta_backend.h"
#include "tests/worker/comm/collective_checks.h"

#include <thread>

namespace tandem::worker::comm {
namespace {

class Threads : public testing::TestWithParam<int> {
 protected:
  /// Runs `body` on every rank at once, each with a device of its own.
  template <class F>
  void on_all(const F& body) {
    std::vector<std::thread> threads;
    for (auto& rank : ranks)
      threads.emplace_back([&] {
        RankDevice device;
        body(*rank, device.exec);
      });
    for (std::thread& thread : threads) thread.join();
  }
  std::vector<std::unique_ptr<Communicator>> ranks = make_thread_communicators(GetParam());
};

TEST_P(Threads, SumsAreTakenInRankOrderToTheSameBitsEverywhere) {
  on_all([](Communicator& comm, kernels::Exec& exec) {
    check_sums<float>(comm, exec);
    check_sums<bf16>(comm, exec);
    check_sums<double>(comm, exec);
  });
}
TEST_P(Threads, MovesPutEveryPartInItsPlace) {
  on_all([](Communicator& comm, kernels::Exec& exec) { check_moves(comm, exec); });
}
TEST_P(Threads, GroupsOfEveryLayoutHoldTheRanksThatItNames) {
  on_all([](Communicator& comm, kernels::Exec& exec) { check_groups(comm, exec); });
}
TEST_P(Threads, EachKnowsItsPlace) {
  for (int r = 0; r < GetParam(); ++r) {
    EXPECT_EQ(ranks[static_cast<std::size_t>(r)]->rank(), r);
    EXPECT_EQ(ranks[static_cast<std::size_t>(r)]->size(), GetParam());
  }
}
INSTANTIATE_TEST_SUITE_P(Sizes, Threads, testing::Values(1, 2, 4, 5));

TEST(MetaCommunicator, TakesTheScratchThatThreadsTake) {
  const auto peak = [](Communicator& comm, kernels::Backend backend, bool meta) {
    kernels::Arena arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kActivations,
                         "tensors", std::int64_t{1} << 30);
    kernels::Arena workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                             "workspace", std::int64_t{1} << 30);
    kernels::Exec exec{workspace};
    std::vector<std::int64_t> peaks;
    for (const std::int64_t n : {7, 5000, 3'000'000}) {
      const auto x = arena.alloc({n * comm.size()}, DType::kF32), y = arena.alloc({n}, DType::kF32);
      if (!meta) backend.ops->fill_zero(exec, x);
      comm.all_reduce_sum(exec, x);
      peaks.push_back(workspace.peak_used());
      comm.reduce_scatter_sum(exec, x, y);
      comm.all_gather(exec, y, x);
      peaks.push_back(workspace.peak_used());
    }
    return peaks;
  };
  auto ranks = make_thread_communicators(3);
  std::vector<std::vector<std::int64_t>> real(3);
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < 3; ++r)
    threads.emplace_back([&, r] {
      real[r] = peak(*ranks[r], kernels::make_cpu_backend({1, 0}), false);
    });
  for (std::thread& thread : threads) thread.join();
  for (int r = 0; r < 3; ++r) {
    const auto meta = make_meta_communicator(r, 3);
    kernels::DeviceProfile profile;
    EXPECT_EQ(peak(*meta, kernels::make_meta_backend(profile), true),
              real[static_cast<std::size_t>(r)]);
  }
}

TEST(Layout, RefusesSizesThatMakeNoSense) {
  EXPECT_TRUE((Layout{2, 2, 2, 3}).validate().ok());
  EXPECT_FALSE((Layout{0, 1, 1, 0}).validate().ok());
  EXPECT_FALSE((Layout{2, 1, 1, 4}).validate().ok());
  EXPECT_FALSE((Layout{1, 2, 1, 1}).validate().ok());
}

TEST(Layout, IsReadFromOneWord) {
  const Layout both = Layout::parse("tp2xpp3").value();
  EXPECT_EQ(both.tp, 2);
  EXPECT_EQ(both.pp, 3);
  EXPECT_EQ(both.dp, 1);
  const Layout sharded = Layout::parse("dp4 x zero3").value();
  EXPECT_EQ(sharded.dp, 4);
  EXPECT_EQ(sharded.zero, 3);
  EXPECT_EQ(Layout::parse("pp2, virtual 2").value().virtual_pp, 2);
  const Layout printed{2, 1, 4, 1};
  EXPECT_EQ(Layout::parse(printed.to_string()).value().to_string(), printed.to_string());
  for (const char* wrong :
       {"tp2xtp2", "tp", "2tp", "tp2yp2", "tp2pp2", "sp2", "tp2xtp", "x", "tp99999999999"})
    EXPECT_EQ(Layout::parse(wrong).status().code(), StatusCode::kInvalid) << wrong;
}

TEST(Layout, CountsTheCommunicatorsOfARank) {
  EXPECT_EQ((Layout{1, 1, 1, 0}).groups(), 0);
  EXPECT_EQ((Layout{2, 1, 1, 3}).groups(), 1);
  EXPECT_EQ((Layout{1, 2, 2, 0}).groups(), 3);  // all, tp, pp
  EXPECT_EQ((Layout{1, 1, 4, 0}).groups(), 2);  // all, both ends
  EXPECT_EQ((Layout{2, 2, 1, 0}).groups(), 4);  // all, tp, dp, and tp x pp of its own
}

TEST(SingleCommunicator, IsTheIdentity) {
  RankDevice device;
  const auto comm =
      make_single_communicator([&](kernels::Exec& e, kernels::Tensor from, kernels::Tensor to) {
        device.backend.ops->copy(e, from, to);
      });
  check_sums<float>(*comm, device.exec);
  check_moves(*comm, device.exec);
  check_groups(*comm, device.exec);
}

}  // namespace
}  // namespace tandem::worker::comm
