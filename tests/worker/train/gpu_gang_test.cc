// Gangs of GPUs over NCCL: mpirun -np N gpu_gang_test, with a GPU a rank. Collectives move and sum
// what they should, and every layout of N ranks trains as one GPU does.
#include "tests/worker/train/gpu_gang.h"
#include "protocol/base/str.h"
#include "tests/support/rank_job.h"

#include <gtest/gtest.h>

#include <cmath>
#include <iostream>
#include <numeric>

namespace tandem::test {
namespace {

using kernels::Tensor;

template <class T>
void check_sums(DType dtype) {
  const int size = gang().size(), rank = gang().rank();
  const float ranks = static_cast<float>(size * (size - 1) / 2);
  const auto want = [&](std::int64_t e) {
    return from_f32<T>(static_cast<float>(size) * static_cast<float>(e % 7) + 3.0f * ranks);
  };
  for (const std::int64_t n : {0, 1, 1000, 2'500'001}) {
    const kernels::ArenaScope scope(device->tensors);
    const Tensor x = device->put(numbers<T>(rank, n), dtype);
    gang().all_reduce_sum(device->exec, x);
    const auto got = device->get<T>(x);
    for (std::int64_t e = 0; e < n; ++e)
      ASSERT_EQ(to_f32(got[static_cast<std::size_t>(e)]), to_f32(want(e))) << n << " " << e;
    const Tensor whole = device->put(numbers<T>(rank, n * size), dtype);
    const Tensor own = whole.rows(rank * n, n);  // in place
    gang().reduce_scatter_sum(device->exec, whole, own);
    const auto part = device->get<T>(own);
    for (std::int64_t e = 0; e < n; ++e)
      ASSERT_EQ(to_f32(part[static_cast<std::size_t>(e)]), to_f32(want(rank * n + e)));
  }
}

TEST(Nccl, SumsAreThoseOfAllRanks) {
  check_sums<float>(DType::kF32);
  check_sums<bf16>(DType::kBF16);
  check_sums<f16>(DType::kF16);
}

TEST(Nccl, MovesPutEveryPartInItsPlace) {
  const int size = gang().size(), rank = gang().rank();
  for (const std::int64_t n : {1, 300'001}) {
    const kernels::ArenaScope scope(device->tensors);
    std::vector<float> all;
    for (int r = 0; r < size; ++r) {
      const auto part = numbers<float>(r, n);
      all.insert(all.end(), part.begin(), part.end());
    }
    const Tensor mine = device->put(numbers<float>(rank, n), DType::kF32);
    const Tensor out = device->put(std::vector<float>(all.size(), -1.0f), DType::kF32);
    gang().all_gather(device->exec, mine, out);
    EXPECT_EQ(device->get<float>(out), all);
    const Tensor again = device->put(std::vector<float>(all.size(), -1.0f), DType::kF32);
    {
      const auto pending = gang().start_all_gather(device->exec, mine, again);
      const Tensor ones = device->put(std::vector<float>(5, 1.0f), DType::kF32);
      gang().all_reduce_sum(device->exec, ones);
      EXPECT_EQ(device->get<float>(ones)[4], static_cast<float>(size));
      pending->wait(device->exec);
    }
    EXPECT_EQ(device->get<float>(again), all);
    for (int root = 0; root < size; ++root) {
      const Tensor sent = device->put(numbers<float>(rank, n), DType::kF32);
      gang().broadcast(device->exec, sent, root);
      EXPECT_EQ(device->get<float>(sent), numbers<float>(root, n));
    }
    const int next = (rank + 1) % size, before = (rank + size - 1) % size;
    const Tensor got = device->put(std::vector<float>(static_cast<std::size_t>(n)), DType::kF32);
    gang().exchange(device->exec, mine, next, got, before);
    EXPECT_EQ(device->get<float>(got), numbers<float>(before, n));
    gang().barrier(device->exec);
  }
  const std::vector<int> alone{rank};
  const auto single = gang().sub(alone);
  EXPECT_EQ(single->size(), 1);
  const Tensor x = device->put(numbers<float>(rank, 10), DType::kF32);
  single->all_reduce_sum(device->exec, x);
  EXPECT_EQ(device->get<float>(x), numbers<float>(rank, 10));
}

TEST(Peers, WhatIsSharedIsGatheredAndSummedWhereItLies) {
  const int size = gang().size(), rank = gang().rank();
  kernels::Arena shared(*device->backend.allocator, *device->backend.ledger,
                        kernels::MemoryKind::kWeights, "shared", std::int64_t{1} << 32,
                        kernels::Sharing::kPeers);
  (void)shared.alloc({1000}, DType::kF32);  // nothing begins where memory does
  for (const std::int64_t n : {64, 300'032, 12'000'000}) {
    const kernels::ArenaScope scope(device->tensors);
    const Tensor part = shared.alloc({n}, DType::kF32);
    const Tensor whole = shared.alloc({n * size}, DType::kF32);
    const Tensor out = device->tensors.alloc({n * size}, DType::kF32);
    const Tensor sum = device->tensors.alloc({n}, DType::kF32);
    ASSERT_TRUE(gang().share(device->exec, part)) << "else NCCL would be tested";
    ASSERT_TRUE(gang().share(device->exec, whole));
    for (int turn = 0; turn < 3; ++turn) {
      const auto upload = [&](const std::vector<float>& values, const Tensor& to) {
        device->backend.ops->upload(device->exec, std::as_bytes(std::span(values)), to);
      };
      upload(numbers<float>(rank + turn, n), part);
      upload(numbers<float>(rank + turn, n * size), whole);
      auto gathered = gang().start_all_gather(device->exec, part, out);
      auto reduced = gang().start_reduce_scatter_sum(device->exec, whole, sum);
      gathered->wait(device->exec);
      reduced->wait(device->exec);
      std::vector<float> all;
      for (int r = 0; r < size; ++r) {
        const auto theirs = numbers<float>(r + turn, n);
        all.insert(all.end(), theirs.begin(), theirs.end());
      }
      ASSERT_EQ(device->get<float>(out), all) << n << " turn " << turn;
      std::vector<float> want(static_cast<std::size_t>(n), 0.0f);
      for (int r = 0; r < size; ++r) {
        const auto theirs = numbers<float>(r + turn, n * size);
        for (std::int64_t e = 0; e < n; ++e)
          want[static_cast<std::size_t>(e)] += theirs[static_cast<std::size_t>(rank * n + e)];
      }
      ASSERT_EQ(device->get<float>(sum), want) << n << " turn " << turn;
      gang().barrier(device->exec);  // nobody writes before all have read
    }
  }
}

/// Addends come by copy engines, and who waits adds them up in rank order. Values whose sums round.
template <class T>
void check_shared_sums(DType dtype, kernels::Arena& shared) {
  const int size = gang().size(), rank = gang().rank();
  const auto value = [](int r, std::int64_t e) {
    return from_f32<T>(std::sin(static_cast<float>(e % 1013) * 0.37f + static_cast<float>(r)));
  };
  const auto values = [&](int r, std::int64_t n) {
    std::vector<T> x(static_cast<std::size_t>(n));
    for (std::int64_t e = 0; e < n; ++e) x[static_cast<std::size_t>(e)] = value(r, e);
    return x;
  };
  // The last is more than there is room for beside another.
  for (const std::int64_t n : {8, 40'008, 1'000'000, 6'000'000}) {
    const kernels::ArenaScope scope(device->tensors), rows(shared);
    const Tensor whole = shared.alloc({4 * n * size}, dtype);
    const Tensor sums = device->tensors.alloc({4 * n}, dtype);
    ASSERT_TRUE(gang().share(device->exec, whole));
    for (int turn = 0; turn < 2; ++turn) {
      device->upload(values(rank + turn, whole.elements()), whole);
      std::vector<std::unique_ptr<worker::comm::Pending>> pending;
      for (int p = 0; p < 4; ++p) {  // two at a time have room
        if (p >= 2) pending[static_cast<std::size_t>(p - 2)]->wait(device->exec);
        pending.push_back(gang().start_reduce_scatter_sum(
            device->exec, whole.rows(p * n * size, n * size), sums.rows(p * n, n)));
      }
      pending[2]->wait(device->exec);
      pending[3]->wait(device->exec);
      const auto got = device->get<T>(sums);
      for (std::int64_t e = 0; e < 4 * n; ++e) {
        const std::int64_t at = (e / n * size + rank) * n + e % n;
        float want = 0.0f;
        for (int r = 0; r < size; ++r) want += to_f32(value(r + turn, at));
        ASSERT_EQ(to_f32(got[static_cast<std::size_t>(e)]), to_f32(from_f32<T>(want)))
            << n << " " << e;
      }
      gang().barrier(device->exec);
    }
  }
}

TEST(Peers, SumsIn16BitsAreThoseOfRankOrder) {
  kernels::Arena shared(*device->backend.allocator, *device->backend.ledger,
                        kernels::MemoryKind::kWeights, "shared", std::int64_t{1} << 32,
                        kernels::Sharing::kPeers);
  check_shared_sums<bf16>(DType::kBF16, shared);
  check_shared_sums<f16>(DType::kF16, shared);
}

TEST(Peers, WhatOthersCannotMapIsLeftToNccl) {
  const kernels::ArenaScope scope(device->tensors);
  EXPECT_FALSE(gang().share(device->exec, device->tensors.alloc({1000}, DType::kF32)));
}

/// A rank's own run on one GPU, at the same time as the others'.
RankResult alone(RankJob job) {
  job.layout = {};
  const std::vector<int> me{gang().rank()};
  const auto single = gang().sub(me);
  return run_rank(*single, job);
}

struct GangCase {
  worker::comm::Layout layout;
  bool full;
  DType dtype;
  bool qk_norm = false;
};
std::vector<GangCase> gang_cases() {
  auto layouts = tested_layouts();
  layouts.push_back({4, 1, 1, 3});
  std::vector<GangCase> all;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16})
    for (const auto& layout : layouts)
      for (const bool full : {false, true}) {
        all.push_back({layout, full, dtype});
        if (dtype == DType::kF32) all.push_back({layout, full, dtype, true});
      }
  return all;
}

/// Those of as many ranks as were started.
class GpuGang : public testing::TestWithParam<GangCase> {};
INSTANTIATE_TEST_SUITE_P(All, GpuGang, testing::ValuesIn(gang_cases()), [](const auto& row) {
  return str(layout_name(row.param.layout), row.param.full ? "_full_" : "_lora_",
             dtype_name(row.param.dtype), row.param.qk_norm ? "_qk_norm" : "");
});

/// f32: what other orders of sums do over 30 steps on the CPU, too, and ten times that. bf16: the
/// partial sums of a sharded product are rounded once more each, 2^-9 of them; at the f32 run's
/// rate the steepest steps take a fifth of the loss, so that noise which moves the descent by a
/// fifth of a step reads as 4 % there and is gone at the end. An eighth of the rate keeps a step's
/// share of the loss near 2 %. f16: as bf16, by its smaller roundoff.
TEST_P(GpuGang, ThirtyLossesAreThoseOfOneGpu) {
  const auto& [layout, full, dtype, qk_norm] = GetParam();
  if (layout.ranks() != gang().size()) GTEST_SKIP() << layout.ranks() << " ranks";
  const bool rounds = is_16_bit(dtype);
  RankJob job;
  job.layout = layout;
  job.full = full;
  job.gpu = tools::local_rank();
  job.dtype = dtype;
  job.qk_norm = qk_norm;
  if (rounds) job.learning_rate_scale = 0.125;
  const RankResult want = alone(job), got = run_rank(gang(), job), again = run_rank(gang(), job);
  ASSERT_EQ(got.losses.size(), 30u);
  double worst = 0.0;
  for (std::size_t s = 0; s < want.losses.size(); ++s)
    worst = std::max(worst, std::abs(got.losses[s] - want.losses[s]) / want.losses[s]);
  EXPECT_LE(worst, rounds ? (dtype == DType::kF16 ? 0x1p-3 : 1.0) * 2e-2 : 1e-4);
  EXPECT_LT(got.losses.back(), got.losses.front());
  EXPECT_EQ(got.losses, again.losses) << "two runs differ";
  if (gang().rank() == 0)
    std::cout << layout_name(layout) << (full ? " full " : " lora ") << dtype_name(dtype)
              << (qk_norm ? " qk_norm" : "") << " first " << want.losses.front() << " last "
              << got.losses.back() << " worst relative difference " << worst << std::endl;
}

}  // namespace

GpuGangDevice* device = nullptr;

}  // namespace tandem::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  using namespace tandem;
  if (tools::started_ranks() < 2) {
    std::cerr << "gpu_gang_test: start it under mpirun with at least two ranks" << std::endl;
    return 2;
  }
  test::GpuGangDevice device;
  auto gang =
      tools::make_bench_gang(tools::started_ranks(), false, *device.backend.ops, device.exec);
  TANDEM_CHECK(gang.ok(), gang.status().to_string());
  device.gang = std::move(*gang);
  test::device = &device;
  return RUN_ALL_TESTS();
}
