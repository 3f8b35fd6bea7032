// Sums that GPUs of one host take over each other's memory: the same bits on every rank, whatever
// the size, whatever came before, recorded or not.
#include "protocol/base/random.h"
#include "tests/worker/train/gpu_gang.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace tandem::test {
namespace {

using kernels::Shape;
using kernels::Tensor;

/// Numbers of about one, of rank r, whose sums depend on their order.
template <class T>
std::vector<T> addends(int r, std::int64_t n, std::uint64_t seed) {
  std::vector<T> x(static_cast<std::size_t>(n));
  for (std::size_t e = 0; e < x.size(); ++e) {
    const std::uint64_t bits = mix64(seed ^ (static_cast<std::uint64_t>(r) << 32) ^ e);
    x[e] = from_f32<T>(static_cast<float>(bits >> 40) * 0x1p-22f - 2.0f);
  }
  return x;
}
/// Their sums in rank order, in f32, rounded once.
template <class T>
std::vector<T> sums(std::int64_t n, std::uint64_t seed) {
  std::vector<float> sum(static_cast<std::size_t>(n), 0.0f);
  for (int r = 0; r < gang().size(); ++r) {
    const auto x = addends<T>(r, n, seed);
    for (std::size_t e = 0; e < sum.size(); ++e) sum[e] += to_f32(x[e]);
  }
  std::vector<T> rounded(sum.size());
  for (std::size_t e = 0; e < sum.size(); ++e) rounded[e] = from_f32<T>(sum[e]);
  return rounded;
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}
bool is_hopper() {
  return device->backend.ops->profile().compute_capability == 90;
}

/// Elements of `bytes` of T, and one fewer and one more.
template <class T>
std::vector<std::int64_t> around(std::int64_t bytes) {
  const auto n = bytes / static_cast<std::int64_t>(sizeof(T));
  return {n - 1, n, n + 1};
}

template <class T>
void check_every_size(DType dtype) {
  constexpr std::int64_t kKiB = 1 << 10, kMiB = 1 << 20;
  const kernels::ArenaScope scope(device->tensors);
  const Tensor room = device->tensors.alloc({(8 * kMiB) / std::int64_t{sizeof(T)} + 16}, dtype);
  std::vector<std::int64_t> sizes{1, 2, 3, 7, 8, 9, 4095, 100'001};
  for (const std::int64_t bytes : {16 * kKiB, 256 * kKiB, kMiB, 4 * kMiB, 5 * kMiB, 8 * kMiB - 512})
    for (const std::int64_t n : around<T>(bytes)) sizes.push_back(n);
  for (const std::int64_t n : sizes)
    for (const std::int64_t first : {0, 1}) {
      const Tensor x = room.rows(first, n);  // with an odd beginning no vector fits
      const auto seed = static_cast<std::uint64_t>(2 * n + first);
      device->upload(addends<T>(gang().rank(), n, seed), x);
      gang().all_reduce_sum(device->exec, x);
      ASSERT_TRUE(same_bits(device->get<T>(x), sums<T>(n, seed)))
          << n << " " << dtype_name(dtype) << " from element " << first;
    }
}

TEST(PeerSums, AreTakenInRankOrderAtEverySize) {
  check_every_size<float>(DType::kF32);
  check_every_size<bf16>(DType::kBF16);
  check_every_size<f16>(DType::kF16);
}

TEST(PeerSums, FollowEachOtherWithoutWaiting) {
  constexpr int kTurns = 5;
  const kernels::ArenaScope scope(device->tensors);
  std::vector<std::int64_t> sizes;
  for (std::uint64_t i = 0; i < 60; ++i) {
    const std::uint64_t bits = mix64(i);
    sizes.push_back(1 + static_cast<std::int64_t>(bits >> 8) % (std::int64_t{1} << bits % 21));
  }
  std::vector<Tensor> tensors;
  for (const std::int64_t n : sizes)
    tensors.push_back(device->put(numbers<float>(gang().rank(), n), DType::kF32));
  device->backend.ops->synchronize(device->exec);
  for (int turn = 0; turn < kTurns; ++turn)
    for (const Tensor& x : tensors) gang().all_reduce_sum(device->exec, x);
  const int size = gang().size();
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const auto got = device->get<float>(tensors[i]);
    for (std::int64_t e = 0; e < sizes[i]; ++e) {
      float want = 0.0f;
      for (int r = 0; r < size; ++r) want += static_cast<float>(e % 7 + 3 * r);
      for (int turn = 1; turn < kTurns; ++turn) want *= static_cast<float>(size);
      ASSERT_EQ(got[static_cast<std::size_t>(e)], want) << sizes[i] << " element " << e;
    }
  }
}

template <class T>
void check_nans(DType dtype) {
  for (const std::int64_t n : {5, 1000, 1'000'003}) {
    const kernels::ArenaScope scope(device->tensors);
    // On one rank every other run of 100 bytes is all ones.
    auto values = numbers<T>(gang().rank(), n);
    const auto is_nan = [](std::int64_t e) { return e / (100 / sizeof(T)) % 2 == 0; };
    if (gang().rank() == 1)
      for (std::int64_t e = 0; e < n; ++e)
        if (is_nan(e)) std::memset(&values[static_cast<std::size_t>(e)], 0xff, sizeof(T));
    const Tensor x = device->put(values, dtype);
    gang().all_reduce_sum(device->exec, x);
    const auto got = device->get<T>(x);
    for (std::int64_t e = 0; e < n; ++e)
      ASSERT_EQ(std::isnan(to_f32(got[static_cast<std::size_t>(e)])), is_nan(e)) << n << " " << e;
  }
}

TEST(PeerSums, PassOnWhatIsNoNumber) {
  check_nans<float>(DType::kF32);
  check_nans<bf16>(DType::kBF16);
  check_nans<f16>(DType::kF16);
}

/// One set of tensors that a sum and its norm want.
struct NormCase {
  Tensor x, delta, weight, y, rstd;
  template <class T>
  static NormCase make(DType dtype, std::int64_t rows, std::int64_t columns) {
    const auto n = rows * columns;
    const Shape shape{rows, columns};
    NormCase c{device->put(addends<T>(gang().rank(), n, 1), dtype).reshaped(shape),
               device->put(addends<T>(100, n, 2), dtype).reshaped(shape),
               device->put(addends<T>(101, columns, 3), dtype),
               device->put(addends<T>(102, n, 4), dtype).reshaped(shape),
               device->tensors.alloc({rows}, DType::kF32)};
    return c;
  }
  [[nodiscard]] kernels::AddRmsNormArgs args(bool with_delta) const {
    return {x, with_delta ? delta : Tensor{}, weight, 1e-5f, y, rstd};
  }
};

/// The factor 1 / rms from sums of `columns` squares, each rounded in f32, in whatever order; then
/// a product of three, rounded to T, which may be the next number of T.
template <class T>
float norm_tolerance(std::int64_t columns) {
  const float sums = static_cast<float>(columns) * 0x1p-24f;
  return sums + 3 * 0x1p-23f +
         (sizeof(T) == 4            ? 0.0f
          : std::is_same_v<T, bf16> ? 0x1p-7f
                                    : 0x1p-10f);
}

template <class T>
void check_norms(DType dtype, std::int64_t rows, std::int64_t columns, bool with_delta) {
  const kernels::ArenaScope scope(device->tensors);
  const auto n = rows * columns;
  const auto apart = NormCase::make<T>(dtype, rows, columns);
  gang().all_reduce_sum(device->exec, apart.x);
  device->backend.ops->add_rms_norm_forward(device->exec, apart.args(with_delta));
  const auto together = NormCase::make<T>(dtype, rows, columns);
  ASSERT_TRUE(gang().sum_and_norm(device->exec, together.args(with_delta)))
      << rows << " x " << columns;
  ASSERT_TRUE(same_bits(device->get<T>(together.x), device->get<T>(apart.x)))
      << rows << " x " << columns << (with_delta ? " with delta" : "");
  const auto want = device->get<T>(apart.y), got = device->get<T>(together.y);
  const float tolerance = norm_tolerance<T>(columns);
  for (std::size_t e = 0; e < want.size(); ++e) {
    const float w = to_f32(want[e]), g = to_f32(got[e]);
    // The smallest numbers of f16 are further apart than the relative bound says.
    ASSERT_LE(std::abs(g - w), tolerance * std::abs(w) + 0x1p-24f) << rows << " x " << columns;
  }
  const auto r0 = device->get<float>(apart.rstd), r1 = device->get<float>(together.rstd);
  for (std::size_t e = 0; e < r0.size(); ++e)
    ASSERT_LE(std::abs(r1[e] - r0[e]), norm_tolerance<float>(columns) * std::abs(r0[e]));
  const Tensor all = device->tensors.alloc({n * gang().size()}, dtype);
  gang().all_gather(device->exec, together.y.reshaped({n}), all);
  const auto everybodys = device->get<T>(all);
  for (int r = 0; r < gang().size(); ++r)
    ASSERT_EQ(std::memcmp(everybodys.data() + r * n, got.data(), got.size() * sizeof(T)), 0)
        << "rank " << r << " has another norm of " << rows << " x " << columns;
}

TEST(PeerSums, ComeWithTheirNorms) {
  if (!is_hopper()) GTEST_SKIP() << "the kernel wants a Hopper";
  for (const std::int64_t columns : {8192, 4096, 576})
    for (const std::int64_t rows : {1, 3, 16, 17, 64, 65, 200, 255})
      for (const bool with_delta : {true, false}) {
        check_norms<bf16>(DType::kBF16, rows, columns, with_delta);
        if (columns < 8192 || rows < 100)
          check_norms<float>(DType::kF32, rows, columns, with_delta);
      }
  check_norms<f16>(DType::kF16, 256, 8192, true);
  check_norms<f16>(DType::kF16, 5, 8, true);
}

TEST(PeerSums, LeaveNormsThatNoClusterHolds) {
  const kernels::ArenaScope scope(device->tensors);
  const auto wide = NormCase::make<float>(DType::kF32, 2, 16384);
  EXPECT_FALSE(gang().sum_and_norm(device->exec, wide.args(true)));
  const auto many = NormCase::make<bf16>(DType::kBF16, 1025, 8192);
  EXPECT_FALSE(gang().sum_and_norm(device->exec, many.args(true)));
  const auto odd = NormCase::make<bf16>(DType::kBF16, 4, 100);
  EXPECT_FALSE(gang().sum_and_norm(device->exec, odd.args(true)));
}

TEST(PeerSums, GatherColumns) {
  const int size = gang().size();
  for (const std::int64_t columns : {4, 32064})
    for (const std::int64_t rows : {1, 7, 64}) {
      const kernels::ArenaScope scope(device->tensors);
      const auto n = rows * columns;
      const Tensor x = device->put(addends<float>(gang().rank(), n, 5), DType::kF32);
      const Tensor out = device->tensors.alloc({rows, size * columns}, DType::kF32);
      ASSERT_TRUE(gang().gather_columns(device->exec, x.reshaped({rows, columns}), out));
      const auto got = device->get<float>(out);
      for (int r = 0; r < size; ++r) {
        const auto part = addends<float>(r, n, 5);
        for (std::int64_t row = 0; row < rows; ++row)
          ASSERT_EQ(
              std::memcmp(got.data() + (row * size + r) * columns, part.data() + row * columns,
                          static_cast<std::size_t>(columns) * sizeof(float)),
              0)
              << rows << " x " << columns << ", row " << row << " of rank " << r;
      }
    }
  const kernels::ArenaScope scope(device->tensors);
  EXPECT_FALSE(gang().gather_columns(device->exec, device->tensors.alloc({2, 5}, DType::kF32),
                                     device->tensors.alloc({2, 5 * size}, DType::kF32)));
}

TEST(PeerSums, AreReplayedAmongOthers) {
  const kernels::ArenaScope scope(device->tensors);
  kernels::Ops& ops = *device->backend.ops;
  const int rank = gang().rank();
  const std::vector<std::int64_t> sizes{9'000'000, 8192, 524'288, 3, 100'001};
  std::vector<Tensor> from, to;
  for (const std::int64_t n : sizes) {
    from.push_back(device->put(numbers<float>(rank, n), DType::kF32));
    to.push_back(device->tensors.alloc({n}, DType::kF32));
  }
  const auto norm = NormCase::make<bf16>(DType::kBF16, 16, 4096);
  const auto fresh = device->put(addends<bf16>(rank, 16 * 4096, 1), DType::kBF16);
  const Tensor other = device->put(numbers<float>(0, 50'000), DType::kF32);
  ASSERT_TRUE(gang().records());
  std::vector<bf16> first;
  for (int run = 0; run < 7; ++run) {
    for (const Tensor& x : to) ops.fill_zero(device->exec, x);
    gang().issue_recorded(device->exec, [&] {
      ops.replay(device->exec, 77, [&] {
        for (std::size_t i = 0; i < sizes.size(); ++i) {
          ops.copy(device->exec, from[i], to[i]);
          gang().all_reduce_sum(device->exec, to[i]);
        }
        ops.copy(device->exec, fresh.reshaped({16, 4096}), norm.x);
        if (is_hopper()) (void)gang().sum_and_norm(device->exec, norm.args(true));
      });
    });
    // An odd number of others: both sides of the rooms see the recording.
    for (int i = 0; i < 1 + run % 3; ++i) gang().all_reduce_sum(device->exec, other);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const auto got = device->get<float>(to[i]);
      for (std::size_t e = 0; e < got.size(); ++e) {
        float want = 0.0f;
        for (int r = 0; r < gang().size(); ++r) want += static_cast<float>(e % 7) + 3.0f * r;
        ASSERT_EQ(got[e], want) << "run " << run << ", " << sizes[i] << ", " << e;
      }
    }
    if (!is_hopper()) continue;
    const auto y = device->get<bf16>(norm.y);
    if (run == 0) first = y;
    ASSERT_TRUE(same_bits(y, first)) << "run " << run;
  }
}

}  // namespace
}  // namespace tandem::test
