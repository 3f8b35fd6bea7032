// Chunked loss over the vocabulary and log-probabilities.
#include "tests/kernels/op_param.h"
#include "tests/kernels/reference.h"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::testing {
namespace {

struct LossShape {
  std::int64_t t, c, v;
  int ignore_every;  ///< every n-th row is ignored; 0: none; 1: all
};
// The last crosses a chunk of rows, (48 << 20) / (4 v) at most, and many blocks of the vocabulary.
constexpr LossShape kLoss[] = {{0, 4, 5, 0},    {1, 1, 1, 0},      {3, 7, 33, 2},
                               {5, 64, 100, 1}, {50, 24, 1001, 3}, {45, 2, 300'001, 4}};

class LinearCrossEntropy : public OpTest {
 protected:
  /// Of the gradient. In f16 what training scales its loss by, or the softmax of 300,001 tokens
  /// would be subnormal numbers, whose rounding is not a share of their size.
  static double scale() { return dtype() == DType::kF16 ? 1024.0 : 0.125; }
  static std::vector<std::int32_t> labels(const LossShape& s) {
    std::vector<std::int32_t> out;
    for (std::int64_t r = 0; r < s.t; ++r)
      out.push_back(s.ignore_every > 0 && r % s.ignore_every == 0
                        ? static_cast<std::int32_t>(kIgnoreLabel)
                        : static_cast<std::int32_t>(r * 7919 % s.v));
    return out;
  }
  static Outputs run(const LossShape& s, const Values& x, const Values& w,
                     const std::vector<std::int32_t>& at, bool backward) {
    const auto t = static_cast<std::int64_t>(at.size());
    return run_op(backend(), [&](TestDevice& device) {
      const PackedWeight packed = device.weight(w, dtype(), s.v, s.c);
      device.ops().linear_cross_entropy(
          device.exec(), {device.input(x, dtype(), {t, s.c}), &packed, device.ints(at),
                          static_cast<float>(scale()), device.output("loss", DType::kF32, {t}),
                          device.output("correct", DType::kF32, {t}),
                          backward ? device.output("dx", dtype(), {t, s.c}) : Tensor{}});
    });
  }
};
TANDEM_OP_TEST(LinearCrossEntropy, kLoss);

TEST_P(LinearCrossEntropy, MatchesTheReference) {
  const LossShape& s = row(kLoss);
  const std::vector<std::int32_t> at = labels(s);
  const Values x = random_values(s.t * s.c, dtype(), 1);
  const Values w = random_values(s.v * s.c, dtype(), 2, 2.0 / std::sqrt(static_cast<double>(s.c)));
  const CrossEntropyResult want = cross_entropy(x, w, at, s.c, s.v, scale());
  const Outputs got = run(s, x, w, at, true),
                evaluated = s.v > 100'000 ? got : run(s, x, w, at, false);
  // The loss is a difference of f32 numbers of the size of the logits; inputs are exact.
  expect_close("loss", got.at("loss").values(), want.loss, tolerance(DType::kF32, s.v + s.c, 16));
  EXPECT_EQ(got.at("correct").values(), want.correct);
  EXPECT_EQ(got.at("loss").bytes, evaluated.at("loss").bytes);
  // softmax - one-hot is rounded once to the compute dtype, and so is dx; with one token in the
  // vocabulary the gradient is exactly 0.
  if (s.v > 1)
    expect_close("dx", got.at("dx").values(), want.dx,
                 tolerance(dtype(), s.v, is_16_bit(dtype()) ? 2 : 16));
  const Values dx = got.at("dx").values();
  for (std::int64_t r = 0; r < s.t; ++r) {
    if (at[static_cast<std::size_t>(r)] >= 0) continue;
    EXPECT_EQ(got.at("loss").values()[static_cast<std::size_t>(r)], 0.0);
    for (std::int64_t j = 0; j < s.c; ++j)
      ASSERT_EQ(dx[static_cast<std::size_t>(r * s.c + j)], 0.0) << "ignored row " << r;
  }
}

TEST_P(LinearCrossEntropy, RowsInF32DoNotDependOnTheBatchAndEqualLogprob) {
  const LossShape& s = row(kLoss);
  if (dtype() != DType::kF32 || s.v > 100'000) return;  // one table is enough for the large ones
  const std::vector<std::int32_t> at = labels(s);
  const Values x = random_values(s.t * s.c, dtype(), 1), w = random_values(s.v * s.c, dtype(), 2);
  const Outputs all = run(s, x, w, at, true);
  const Values loss = all.at("loss").values();
  for (std::int64_t r = 0; r < s.t; ++r) {
    const std::int32_t label = at[static_cast<std::size_t>(r)];
    const Values part(x.begin() + r * s.c, x.begin() + (r + 1) * s.c);
    const Outputs one = run(s, part, w, {label}, true);
    EXPECT_EQ(one.at("loss").bytes, all.at("loss").rows(r, 1)) << "row " << r;
    EXPECT_EQ(one.at("dx").bytes, all.at("dx").rows(r, 1)) << "row " << r;
    if (label < 0) continue;
    const Outputs served = run_op(backend(), [&](TestDevice& device) {
      const PackedWeight packed = device.weight(w, dtype(), s.v, s.c);
      const Tensor logits = device.output("logits", DType::kF32, {1, s.v});
      device.ops().linear_forward(
          device.exec(),
          {device.input(part, dtype(), {1, s.c}), &packed, {}, {}, nullptr, logits, {}});
      device.ops().logprob(device.exec(), {logits, device.ints({label}),
                                           device.output("logprob", DType::kF32, {1})});
    });
    EXPECT_EQ(served.at("logprob").values()[0], -loss[static_cast<std::size_t>(r)]) << "row " << r;
  }
}

TEST(Logprob, IsTheLogarithmOfTheSoftmax) {
  for (const std::string& backend : executing_backends())
    for (const std::int64_t v : {1, 2, 15, 16, 17, 1000}) {
      const std::int64_t s = 4;
      Values logits = random_values(s * v, DType::kF32, 3, 5.0);
      // One row whose exponentials would overflow, one with an impossible token.
      logits[0] = 200.0;
      if (v > 1) logits[static_cast<std::size_t>(v + 1)] = -INFINITY;
      std::vector<std::int32_t> ids;
      for (std::int64_t r = 0; r < s; ++r) ids.push_back(static_cast<std::int32_t>((r * 31) % v));
      const Outputs got = run_op(backend, [&](TestDevice& device) {
        device.ops().logprob(device.exec(),
                             {device.input(logits, DType::kF32, {s, v}), device.ints(ids),
                              device.output("logprob", DType::kF32, {s})});
      });
      Values want;
      for (std::int64_t r = 0; r < s; ++r) {
        const auto begin = logits.begin() + r * v;
        const double top = *std::max_element(begin, begin + v);
        double sum = 0.0;
        for (std::int64_t j = 0; j < v; ++j) sum += std::exp(begin[j] - top);
        want.push_back(begin[ids[static_cast<std::size_t>(r)]] - top - std::log(sum));
      }
      const Values values = got.at("logprob").values();
      for (std::size_t r = 0; r < values.size(); ++r) {
        if (std::isinf(want[r])) {
          EXPECT_EQ(values[r], want[r]) << "an impossible token";
          continue;
        }
        // A difference of numbers of size |top|: absolute, not relative.
        EXPECT_NEAR(values[r], want[r], 200.0 * tolerance(DType::kF32, v)) << v << " row " << r;
      }
    }
}

}  // namespace
}  // namespace tandem::kernels::testing
