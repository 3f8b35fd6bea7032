// What every implementation of Communicator must do, as claims that all ranks check at once: the
// same code runs on threads and under mpirun.
#pragma once

#include "kernels/cpu/cpu_backend.h"
#include "protocol/base/str.h"
#include "worker/comm/layout.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <numeric>

namespace tandem::worker::comm {

/// One rank's engine, as far as collectives need one.
struct RankDevice {
  kernels::Backend backend = kernels::make_cpu_backend({1, 0});
  kernels::Arena workspace{*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", std::int64_t{1} << 30};
  kernels::Exec exec{workspace};
};

template <class T>
kernels::Tensor over(std::vector<T>& values) {
  const DType dtype = std::is_same_v<T, double>  ? DType::kF64
                      : std::is_same_v<T, float> ? DType::kF32
                                                 : DType::kBF16;
  return {values.data(), dtype, {static_cast<std::int64_t>(values.size())}};
}

/// Element e of rank r: sums of these depend on their order.
inline float awkward(int r, std::int64_t e) {
  return (r % 2 ? -1.0f : 1.0f) * static_cast<float>(1 << (r * 7 % 24)) +
         static_cast<float>(e % 1000) * 0.1f;
}

template <class T>
T make(float x) {
  if constexpr (std::is_same_v<T, double>)
    return static_cast<double>(x) / 3.0;
  else
    return from_f32<T>(x);
}
/// ((0 + x0) + x1) + ... in the precision that the interface promises.
template <class T>
T rank_order_sum(int size, std::int64_t e) {
  if constexpr (std::is_same_v<T, double>) {
    double sum = 0.0;
    for (int r = 0; r < size; ++r) sum += make<double>(awkward(r, e));
    return sum;
  } else {
    float sum = 0.0f;
    for (int r = 0; r < size; ++r) sum += to_f32(make<T>(awkward(r, e)));
    return from_f32<T>(sum);
  }
}
template <class T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

/// Sizes around nothing, one round, slices that do not divide, and several pieces.
template <class T>
void check_sums(Communicator& comm, kernels::Exec& exec) {
  for (const std::int64_t n : {0, 1, 3, 1000, 70'001, 2'500'000}) {
    std::vector<T> x(static_cast<std::size_t>(n));
    for (std::int64_t e = 0; e < n; ++e)
      x[static_cast<std::size_t>(e)] = make<T>(awkward(comm.rank(), e));
    comm.all_reduce_sum(exec, over(x));
    for (std::int64_t e = 0; e < n; ++e)
      ASSERT_TRUE(same_bits(x[static_cast<std::size_t>(e)], rank_order_sum<T>(comm.size(), e)))
          << "all_reduce of " << n << ", element " << e;
  }
  for (const std::int64_t n : {1, 5, 1500, 1'200'003}) {
    std::vector<T> x(static_cast<std::size_t>(n * comm.size())), out(static_cast<std::size_t>(n));
    for (std::int64_t e = 0; e < n * comm.size(); ++e)
      x[static_cast<std::size_t>(e)] = make<T>(awkward(comm.rank(), e));
    const std::vector<T> before = x;
    comm.reduce_scatter_sum(exec, over(x), over(out));
    EXPECT_EQ(std::memcmp(x.data(), before.data(), x.size() * sizeof(T)), 0);
    // The same into this rank's own part of x.
    const kernels::Tensor own = over(x).rows(comm.rank() * n, n);
    comm.reduce_scatter_sum(exec, over(x), own);
    for (std::int64_t e = 0; e < n; ++e) {
      const T want = rank_order_sum<T>(comm.size(), comm.rank() * n + e);
      ASSERT_TRUE(same_bits(out[static_cast<std::size_t>(e)], want))
          << "reduce_scatter of " << n << ", element " << e;
      ASSERT_TRUE(same_bits(own.as<T>()[e], want)) << "in place, element " << e;
    }
  }
}

inline void check_moves(Communicator& comm, kernels::Exec& exec) {
  const int size = comm.size(), rank = comm.rank();
  for (const std::size_t n : {std::size_t{1}, std::size_t{300'001}}) {
    std::vector<float> mine(n), all(n * static_cast<std::size_t>(size)), again;
    std::iota(mine.begin(), mine.end(), static_cast<float>(rank) * 1e6f);
    comm.all_gather(exec, over(mine), over(all));
    for (int r = 0; r < size; ++r)
      for (std::size_t e = 0; e < n; ++e)
        ASSERT_EQ(all[static_cast<std::size_t>(r) * n + e],
                  static_cast<float>(r) * 1e6f + static_cast<float>(e));
    again.assign(all.size(), -1.0f);
    std::copy(mine.begin(), mine.end(), again.begin() + static_cast<std::ptrdiff_t>(rank * n));
    comm.all_gather(
        exec, over(again).rows(rank * static_cast<std::int64_t>(n), static_cast<std::int64_t>(n)),
        over(again));
    EXPECT_EQ(again, all);
    again.assign(all.size(), -1.0f);
    {
      // In the background of other collectives.
      const auto pending = comm.start_all_gather(exec, over(mine), over(again));
      std::vector<float> ones(5, 1.0f);
      comm.all_reduce_sum(exec, over(ones));
      EXPECT_EQ(ones[4], static_cast<float>(size));
      pending->wait(exec);
    }
    EXPECT_EQ(again, all);
    for (int root = 0; root < size; ++root) {
      std::vector<float> sent(n, static_cast<float>(rank));
      comm.broadcast(exec, over(sent), root);
      EXPECT_EQ(sent, std::vector<float>(n, static_cast<float>(root)));
    }
    if (size == 1) continue;
    // Around the ring, everybody at once.
    std::vector<float> from_before(n, -1.0f);
    comm.exchange(exec, over(mine), (rank + 1) % size, over(from_before), (rank + size - 1) % size);
    EXPECT_EQ(from_before[n - 1],
              static_cast<float>((rank + size - 1) % size) * 1e6f + static_cast<float>(n - 1));
    // Both ways around at once; of two ranks both tensors go to the same one.
    std::vector<float> forth(n, static_cast<float>(rank)), back(n, static_cast<float>(-rank));
    std::vector<float> from_left(n, -1.0f), from_right(n, -1.0f);
    const int left = (rank + size - 1) % size, right = (rank + 1) % size;
    comm.exchange_all(exec, std::array{Message{over(forth), right}, Message{over(back), left}},
                      std::array{Message{over(from_left), left}, Message{over(from_right), right}});
    EXPECT_EQ(from_left, std::vector<float>(n, static_cast<float>(left)));
    EXPECT_EQ(from_right, std::vector<float>(n, static_cast<float>(-right)));
    // Down the line: halves left out.
    std::vector<float> token(n, static_cast<float>(rank));
    comm.exchange(exec, {}, 0, rank > 0 ? over(token) : kernels::Tensor{}, rank - 1);
    EXPECT_EQ(token[0], static_cast<float>(std::max(0, rank - 1)));
    token.assign(n, static_cast<float>(rank));
    comm.exchange(exec, rank + 1 < size ? over(token) : kernels::Tensor{}, rank + 1, {}, 0);
  }
  comm.barrier(exec);
}

/// Groups of every layout of `size` ranks: each rank sums its gang rank within each group.
inline void check_groups(Communicator& gang, kernels::Exec& exec) {
  const int size = gang.size();
  for (int tp = 1; tp <= size; ++tp)
    for (int pp = 1; tp * pp <= size; ++pp) {
      if (size % (tp * pp) != 0) continue;
      const Layout layout{size / (tp * pp), tp, pp};
      const Groups groups = make_groups(gang, layout);
      const int at = gang.rank();
      const int d = layout.dp_rank(at), t = layout.tp_rank(at), p = layout.pp_rank(at);
      EXPECT_EQ(layout.rank_of(d, t, p), at);
      EXPECT_EQ(groups.tp->rank(), t);
      EXPECT_EQ(groups.dp->rank(), d);
      EXPECT_EQ(groups.pp->rank(), p);
      EXPECT_EQ(groups.model->rank(), p * tp + t);
      const auto sum = [&](Communicator& comm) {
        std::vector<float> x{static_cast<float>(1 << at)};
        comm.all_reduce_sum(exec, over(x));
        return static_cast<int>(x[0]);  // the members as bits
      };
      int want_tp = 0, want_dp = 0, want_pp = 0, want_model = 0;
      for (int r = 0; r < size; ++r) {
        const bool same_d = layout.dp_rank(r) == d, same_t = layout.tp_rank(r) == t,
                   same_p = layout.pp_rank(r) == p;
        want_tp |= same_d && same_p ? 1 << r : 0;
        want_dp |= same_t && same_p ? 1 << r : 0;
        want_pp |= same_d && same_t ? 1 << r : 0;
        want_model |= same_d ? 1 << r : 0;
      }
      EXPECT_EQ(sum(*groups.tp), want_tp) << layout.to_string();
      EXPECT_EQ(sum(*groups.dp), want_dp) << layout.to_string();
      EXPECT_EQ(sum(*groups.pp), want_pp) << layout.to_string();
      EXPECT_EQ(sum(*groups.model), want_model) << layout.to_string();
    }
}

}  // namespace tandem::worker::comm
