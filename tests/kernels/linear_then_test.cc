// Linears that run the op behind them: the values of both ops apart, whatever kernel does it.
#include "tests/kernels/op_param.h"
#include "tests/kernels/reference.h"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::testing {
namespace {

/// Outputs are (heads + 2 kv_heads) * head_dim, of which silu * up makes half as many.
struct ThenShape {
  std::int64_t t, i, heads, kv_heads, head_dim;
  bool bias;
};
/// One row, few, many; sizes that kernels of few rows take and do not; more tiles than a GPU has
/// multiprocessors; every width of tiles, the last of which are not whole; inner sizes that blocks
/// share.
constexpr ThenShape kThen[] = {
    {0, 8, 1, 1, 16, false},      {1, 7, 1, 1, 10, true},      {1, 64, 4, 2, 64, true},
    {1, 200, 3, 1, 128, false},   {1, 520, 40, 4, 128, false}, {2, 64, 2, 1, 32, false},
    {5, 72, 3, 1, 34, true},      {7, 320, 9, 3, 64, true},    {33, 136, 4, 2, 128, false},
    {64, 512, 16, 2, 128, true},  {64, 64, 64, 8, 128, false}, {61, 1024, 16, 2, 128, false},
    {17, 1024, 30, 2, 64, false}, {70, 256, 8, 2, 64, true},   {3, 128, 98, 14, 128, false},
    {24, 128, 172, 2, 64, true},  {64, 72, 252, 2, 64, false}, {40, 96, 196, 14, 128, false},
    {50, 64, 192, 64, 128, true},
};

class LinearThen : public OpTest {
 protected:
  enum class What { kSiluMul, kRope, kRopeWithNorm };
  enum class Sites { kNone, kAll, kLast };  ///< with adapters
  static constexpr std::int64_t kBlocks = 6, kBlockSize = 16;

  static std::int64_t outputs_of(const ThenShape& s) {
    return (s.heads + 2 * s.kv_heads) * s.head_dim;
  }
  static Values x_of(const ThenShape& s) { return random_values(s.t * s.i, dtype(), 3); }
  static Values w_of(const ThenShape& s) {
    return random_values(outputs_of(s) * s.i, dtype(), 1,
                         1.0 / std::sqrt(static_cast<double>(s.i)));
  }
  static Values bias_of(const ThenShape& s) {
    return s.bias ? random_values(outputs_of(s), dtype(), 2) : Values{};
  }
  static std::vector<std::int32_t> positions_of(const ThenShape& s) {
    std::vector<std::int32_t> positions;
    for (std::int64_t r = 0; r < s.t; ++r)
      positions.push_back(static_cast<std::int32_t>(r * 1117 % 9000));
    return positions;
  }
  static Values frequencies_of(const ThenShape& s) {
    Values frequencies;
    for (std::int64_t j = 0; j < s.head_dim / 2; ++j)
      frequencies.push_back(static_cast<float>(
          std::pow(10000.0, -2.0 * static_cast<double>(j) / static_cast<double>(s.head_dim))));
    return frequencies;
  }

  /// Adapters of three ranks and none at all, of every site that the outputs have or of one.
  struct Adapters {
    std::vector<LoraSite> sites;
    AdapterRows rows;
  };
  static Adapters adapters_of(TestDevice& device, const ThenShape& s, What what, Sites which) {
    constexpr std::int64_t kRanks[] = {16, 3, 40};
    const std::int64_t n = outputs_of(s), q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    const std::vector<std::int64_t> sizes =
        what == What::kRope ? std::vector{q, kv, kv} : std::vector{n / 2, n - n / 2};
    Adapters made;
    std::int64_t begin = 0;
    for (const std::int64_t size : sizes) {
      std::vector<LoraEntry> entries;
      for (const std::int64_t rank : kRanks) {
        const auto seed = static_cast<std::uint64_t>(20 + begin + rank);
        LoraEntry entry;
        entry.rank = static_cast<std::int32_t>(rank);
        entry.scale = 0.5f;
        entry.a = device
                      .input(random_values(rank * s.i, dtype(), seed,
                                           1.0 / std::sqrt(static_cast<double>(s.i))),
                             dtype(), {rank, s.i})
                      .data;
        entry.b =
            device.input(random_values(size * rank, dtype(), seed + 1), dtype(), {size, rank}).data;
        entries.push_back(entry);
      }
      const auto bytes = static_cast<std::int64_t>(entries.size() * sizeof(LoraEntry));
      made.sites.push_back({begin, size, device.bytes(entries.data(), bytes), 7});
      begin += size;
    }
    if (which == Sites::kLast) made.sites = {made.sites.back()};
    const auto part = [&](std::int64_t of4) { return static_cast<std::int32_t>(s.t * of4 / 4); };
    made.rows.segments_max = 4;
    made.rows.segment_offsets = device.ints({0, part(1), part(2), part(3), part(4)});
    made.rows.segment_slots = device.ints({2, -1, 0, 1});
    made.rows.rank_max = 40;
    return made;
  }

  /// Row 1 is inert; the others land in scattered slots. The first `rows` rows.
  Outputs forward(const ThenShape& s, What what, bool joined, Numerics numerics, std::int64_t rows,
                  Sites sites = Sites::kNone) const {
    const std::int64_t n = outputs_of(s);
    const auto first = [&](auto all, std::int64_t width) {
      all.resize(static_cast<std::size_t>(rows * width));
      return all;
    };
    std::vector<std::int32_t> slots;
    for (std::int64_t r = 0; r < rows; ++r)
      slots.push_back(r == 1 ? -1
                             : static_cast<std::int32_t>((r * 19 + 5) % (kBlocks * kBlockSize)));
    return run_op(backend(), [&](TestDevice& device) {
      device.exec().numerics = numerics;
      const PackedWeight weight = device.weight(w_of(s), dtype(), n, s.i);
      const Shape cache_shape{kBlocks, s.kv_heads, kBlockSize, s.head_dim};
      const Values empty(static_cast<std::size_t>(cache_shape.elements()), 0.0);
      const bool rotates = what != What::kSiluMul;
      const KvCache cache{rotates ? device.in_out("k", empty, dtype(), cache_shape) : Tensor{},
                          rotates ? device.in_out("v", empty, dtype(), cache_shape) : Tensor{},
                          kBlockSize};
      // Where silu * up reads it, y is undefined afterwards.
      const Tensor y = rotates
                           ? device.output("y", dtype(), {rows, n})
                           : device.in_out("scratch", Values(static_cast<std::size_t>(rows * n)),
                                           dtype(), {rows, n});
      LinearReader then;
      if (rotates)
        then.rope = {y,
                     device.ints(first(positions_of(s), 1)),
                     device.input(frequencies_of(s), DType::kF32, {s.head_dim / 2}),
                     1.25f,
                     s.heads,
                     s.kv_heads,
                     s.head_dim,
                     &cache,
                     device.ints(slots)};
      else
        then.silu_mul = {y, device.output("out", dtype(), {rows, n / 2})};
      if (what == What::kRopeWithNorm) {
        then.rope.qk_norm =
            device.input(random_values(2 * s.head_dim, dtype(), 9), dtype(), {2 * s.head_dim});
        then.rope.norm_eps = 1e-6f;
      }
      LinearArgs args{device.input(first(x_of(s), s.i), dtype(), {rows, s.i}),
                      &weight,
                      s.bias ? device.input(bias_of(s), dtype(), {n}) : Tensor{},
                      {},
                      nullptr,
                      y,
                      {}};
      Adapters adapters;
      if (sites != Sites::kNone) {
        adapters = adapters_of(device, s, what, sites);
        args.sites = adapters.sites;
        args.adapters = &adapters.rows;
      }
      if (joined) args.then = then;
      device.ops().linear_forward(device.exec(), args);
      if (joined) return;
      if (rotates)
        device.ops().rope_forward(device.exec(), then.rope);
      else
        device.ops().silu_mul_forward(device.exec(), then.silu_mul);
    });
  }
};
TANDEM_OP_TEST(LinearThen, kThen);

TEST_P(LinearThen, MatchesTheReference) {
  const ThenShape& s = row(kThen);
  const std::int64_t n = outputs_of(s);
  if (backend() == "cpu" && s.i * n > 1 << 18) GTEST_SKIP() << "one path for all sizes";
  LinearCase c;
  c.t = s.t, c.i = s.i, c.n = n;
  c.w = w_of(s), c.bias = bias_of(s);
  const Values y = linear(c, x_of(s));
  const double close = tolerance(dtype(), s.i, 3);
  expect_close("silu * up",
               forward(s, What::kSiluMul, true, Numerics::kReplay, s.t).at("out").values(),
               silu_mul(y, s.t, n / 2), close);
  const Outputs rotated = forward(s, What::kRope, true, Numerics::kReplay, s.t);
  expect_close(
      "rotated", rotated.at("y").values(),
      rope(y, positions_of(s), frequencies_of(s), 1.25, s.heads + s.kv_heads, s.head_dim, n, 1.0),
      close);
  // The cache holds what y does.
  const Values got = rotated.at("y").values(), k = rotated.at("k").values(),
               v = rotated.at("v").values();
  for (std::int64_t r = 0; r < s.t; ++r) {
    if (r == 1) continue;
    const std::int64_t slot = (r * 19 + 5) % (kBlocks * kBlockSize);
    for (std::int64_t h = 0; h < s.kv_heads; ++h)
      for (std::int64_t d = 0; d < s.head_dim; ++d) {
        const auto at = static_cast<std::size_t>(
            ((slot / kBlockSize * s.kv_heads + h) * kBlockSize + slot % kBlockSize) * s.head_dim +
            d);
        const auto from = static_cast<std::size_t>(r * n + (s.heads + h) * s.head_dim + d);
        ASSERT_EQ(k[at], got[from]) << "key of row " << r << ", head " << h;
        ASSERT_EQ(v[at], got[from + static_cast<std::size_t>(s.kv_heads * s.head_dim)])
            << "value of row " << r << ", head " << h;
      }
  }
}

/// A norm of heads stands between the product and the rotation: the op runs behind the product.
TEST_P(LinearThen, NormsHeadsAsTheOpsApartDo) {
  const ThenShape& s = row(kThen);
  if (backend() == "cpu" && s.i * outputs_of(s) > 1 << 18) GTEST_SKIP() << "one path for all sizes";
  const Outputs apart = forward(s, What::kRopeWithNorm, false, Numerics::kReplay, s.t);
  const Outputs joined = forward(s, What::kRopeWithNorm, true, Numerics::kReplay, s.t);
  for (const auto& [name, output] : apart) EXPECT_EQ(joined.at(name).bytes, output.bytes) << name;
}

/// A reader reads what adapters have added. A kernel that joins it may have other tiles, and so
/// another order of sums.
TEST_P(LinearThen, TakesAdaptersAsTheOpsApartDo) {
  const ThenShape& s = row(kThen);
  if (s.t == 0) GTEST_SKIP() << "no rows, no adapters";
  if (backend() == "cpu" && s.i * outputs_of(s) > 1 << 18) GTEST_SKIP() << "one path for all sizes";
  for (const What what : {What::kSiluMul, What::kRope})
    for (const Sites sites : {Sites::kAll, Sites::kLast}) {
      const Outputs apart = forward(s, what, false, Numerics::kReplay, s.t, sites);
      const Outputs joined = forward(s, what, true, Numerics::kReplay, s.t, sites);
      for (const auto& [name, output] : apart)
        if (name != "scratch")
          expect_close(name, joined.at(name).values(), output.values(), tolerance(dtype(), s.i, 4));
    }
}

/// Under kInvariant a row has the bits of both ops apart, in a batch of any size.
TEST_P(LinearThen, InvariantRowsHaveTheBitsOfBothOpsApart) {
  const ThenShape& s = row(kThen);
  if (backend() == "cpu" && s.i * outputs_of(s) > 1 << 18) GTEST_SKIP() << "one path for all sizes";
  for (const What what : {What::kSiluMul, What::kRope}) {
    const Outputs want = forward(s, what, false, Numerics::kInvariant, s.t);
    const Outputs got = forward(s, what, true, Numerics::kInvariant, s.t);
    for (const auto& [name, output] : want) {
      if (name == "scratch") continue;
      EXPECT_EQ(got.at(name).bytes, output.bytes) << name;
    }
    if (s.t == 0 || (dtype() != DType::kF32 && backend() == "cpu")) continue;
    const std::string y = what == What::kRope ? "y" : "out";
    EXPECT_EQ(forward(s, what, true, Numerics::kInvariant, 1).at(y).bytes, want.at(y).rows(0, 1));
  }
}

}  // namespace
}  // namespace tandem::kernels::testing
