// Gradients of weights, new values into packed weights, and the loss over shards of a vocabulary.
#include "tests/kernels/op_param.h"
#include "tests/kernels/reference.h"

#include <cmath>
#include <functional>
#include <numeric>

namespace tandem::kernels::testing {
namespace {

struct Product {
  std::int64_t t, n, i;
};
// Nothing, one, odd, past a block of rows of dW (256) both ways round, a real model's.
constexpr Product kProducts[] = {{0, 4, 5},     {1, 1, 1},     {3, 7, 33},
                                 {70, 300, 20}, {65, 20, 300}, {130, 513, 64}};

Values sum(const Values& a, const Values& b) {
  Values out = a;
  for (std::size_t e = 0; e < out.size(); ++e) out[e] += b[e];
  return out;
}

class LinearWeightGrad : public OpTest {};
TANDEM_OP_TEST(LinearWeightGrad, kProducts);

TEST_P(LinearWeightGrad, AddsTheOuterProductToWhatWasThere) {
  const auto [t, n, i] = row(kProducts);
  const Values dy = random_values(t * n, dtype(), 1), x = random_values(t * i, dtype(), 2);
  const Values old = random_values(n * i, DType::kF32, 3),
               old_bias = random_values(n, DType::kF32, 4);
  for (const bool with_bias : {true, false}) {
    const Outputs got = run_op(backend(), [&](TestDevice& device) {
      const Tensor bias = device.in_out("dbias", old_bias, DType::kF32, {n});
      device.ops().linear_weight_grad(
          device.exec(),
          {device.input(dy, dtype(), {t, n}), device.input(x, dtype(), {t, i}),
           device.in_out("dweight", old, DType::kF32, {n, i}), with_bias ? bias : Tensor{}});
    });
    // Products of bf16 are exact in f32, so the error is that of f32 sums for both dtypes; the
    // result is rounded when it is added to the old value.
    expect_close("dweight", got.at("dweight").values(), sum(matmul_tn(dy, x, t, n, i), old),
                 tolerance(DType::kF32, t, 2));
    const Values ones(static_cast<std::size_t>(t), 1.0);
    expect_close("dbias", got.at("dbias").values(),
                 with_bias ? sum(matmul_tn(dy, ones, t, n, 1), old_bias) : old_bias,
                 tolerance(DType::kF32, 1, 2));
  }
}

TEST_P(LinearWeightGrad, WritesWhereItIsToldThatNothingWasThere) {
  const auto [t, n, i] = row(kProducts);
  const Values dy = random_values(t * n, dtype(), 1), x = random_values(t * i, dtype(), 2);
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    device.ops().linear_weight_grad(
        device.exec(), {device.input(dy, dtype(), {t, n}), device.input(x, dtype(), {t, i}),
                        device.output("dweight", DType::kF32, {n, i}),
                        device.output("dbias", DType::kF32, {n}), true});
  });
  const Values ones(static_cast<std::size_t>(t), 1.0);
  expect_close("dweight", got.at("dweight").values(), matmul_tn(dy, x, t, n, i),
               tolerance(DType::kF32, t, 2));
  expect_close("dbias", got.at("dbias").values(), matmul_tn(dy, ones, t, n, 1),
               tolerance(DType::kF32, 1, 2));
}

// Nothing, one, odd; on a GPU rows of one, two and four accesses of a block's threads, with an end
// that is not whole, more rows than blocks, and too wide for one pass.
constexpr Product kNorms[] = {{0, 4, 0},      {1, 1, 0},     {3, 7, 0},     {70, 300, 0},
                              {130, 513, 0},  {9, 2048, 0},  {33, 4096, 0}, {12, 8000, 0},
                              {700, 1032, 0}, {2000, 40, 0}, {5, 20000, 0}};
class RmsNormWeightGrad : public OpTest {
 protected:
  struct Inputs {
    Values dy, x, weight, rstd, old;
  };
  static Inputs inputs(std::int64_t t, std::int64_t c) {
    const Values x = random_values(t * c, dtype(), 2);
    const Values ones(static_cast<std::size_t>(c), 1.0);
    return {random_values(t * c, dtype(), 1), x, random_values(c, dtype(), 5),
            rounded(rms_norm(x, {}, ones, t, c, 1e-5).rstd, DType::kF32),
            random_values(t * c, dtype(), 4)};
  }
  /// `place`: makes dweight; undefined: not wanted.
  static Outputs run(std::int64_t t, std::int64_t c, const Inputs& in, bool overwrite,
                     const std::function<Tensor(TestDevice&)>& place) {
    return run_op(backend(), [&](TestDevice& device) {
      const Shape shape{t, c};
      device.ops().rms_norm_backward(
          device.exec(),
          {device.input(in.dy, dtype(), shape), device.input(in.x, dtype(), shape),
           device.input(in.weight, dtype(), {c}), device.input(in.rstd, DType::kF32, {t}),
           device.in_out("dresidual", in.old, dtype(), shape), place(device), overwrite});
    });
  }
};
TANDEM_OP_TEST(RmsNormWeightGrad, kNorms);

TEST_P(RmsNormWeightGrad, IsTheGradientOfTheNormByItsWeightBesideTheSameBitsOfItsInputs) {
  const auto [t, c, unused] = row(kNorms);
  const Inputs in = inputs(t, c);
  const Values old = random_values(c, DType::kF32, 3);
  const Outputs got = run(t, c, in, false, [&](TestDevice& device) {
    return device.in_out("dweight", old, DType::kF32, {c});
  });
  Values want = old;
  for (std::int64_t r = 0; r < t; ++r)
    for (std::int64_t j = 0; j < c; ++j) {
      const auto at = static_cast<std::size_t>(r * c + j), column = static_cast<std::size_t>(j);
      want[column] += in.dy[at] * in.x[at] * in.rstd[static_cast<std::size_t>(r)];
    }
  // rstd and its product with x are rounded to f32 per row, and each block's part of the sum is.
  expect_close("dweight", got.at("dweight").values(), want, tolerance(DType::kF32, t, 3));
  const Outputs alone = run(t, c, in, false, [](TestDevice&) { return Tensor{}; });
  EXPECT_EQ(got.at("dresidual").bytes, alone.at("dresidual").bytes);
}

TEST_P(RmsNormWeightGrad, WritesWhereItIsToldThatNothingWasThere) {
  const auto [t, c, unused] = row(kNorms);
  const Inputs in = inputs(t, c);
  const Values zeros(static_cast<std::size_t>(c), 0.0);
  const Outputs written = run(t, c, in, true, [&](TestDevice& device) {
    return device.output("dweight", DType::kF32, {c});
  });
  const Outputs added = run(t, c, in, false, [&](TestDevice& device) {
    return device.in_out("dweight", zeros, DType::kF32, {c});
  });
  EXPECT_EQ(written.at("dweight").values(), added.at("dweight").values());
}

struct Lookup {
  std::int64_t t, c, v;
};
constexpr Lookup kLookups[] = {{0, 4, 5}, {1, 1, 1}, {9, 33, 7}, {300, 70, 50}, {40, 600, 1000}};

class Embedding : public OpTest {
 protected:
  static std::vector<std::int32_t> ids(const Lookup& s) {
    std::vector<std::int32_t> out;  // repeats, in no order
    for (std::int64_t r = 0; r < s.t; ++r)
      out.push_back(static_cast<std::int32_t>(r * r * 31 % s.v));
    return out;
  }
};
TANDEM_OP_TEST(Embedding, kLookups);

TEST_P(Embedding, BackwardAddsEachRowToItsEntryInEveryShard) {
  const Lookup s = row(kLookups);
  const Values dout = random_values(s.t * s.c, dtype(), 1);
  const Values old = random_values(s.v * s.c, DType::kF32, 2);
  Values want = old;
  const auto at = ids(s);
  for (std::int64_t r = 0; r < s.t; ++r)
    for (std::int64_t j = 0; j < s.c; ++j)
      want[static_cast<std::size_t>(at[static_cast<std::size_t>(r)] * s.c + j)] +=
          dout[static_cast<std::size_t>(r * s.c + j)];
  for (const std::int64_t shards : {1, 2, 3}) {
    Values got;
    const std::int64_t width = (s.v + shards - 1) / shards;
    for (std::int64_t first = 0; first < s.v; first += width) {
      const std::int64_t n = std::min(width, s.v - first);
      const Values part(old.begin() + first * s.c, old.begin() + (first + n) * s.c);
      const Outputs one = run_op(backend(), [&](TestDevice& device) {
        device.ops().embedding_backward(
            device.exec(),
            {device.ints(at), device.input(dout, dtype(), {s.t, s.c}),
             device.in_out("dtable", part, DType::kF32, {n, s.c}), first, shards == 1 ? 0 : s.v});
      });
      const Values values = one.at("dtable").values();
      got.insert(got.end(), values.begin(), values.end());
    }
    expect_close("dtable", got, want, tolerance(DType::kF32, s.t));
  }
}

TEST_P(Embedding, ShardsOfTheTableAddUpToItsRows) {
  const Lookup s = row(kLookups);
  const Values table = random_values(s.v * s.c, dtype(), 3);
  const auto at = ids(s);
  Values want, got(static_cast<std::size_t>(s.t * s.c), 0.0);
  for (std::int32_t id : at)
    want.insert(want.end(), table.begin() + id * s.c, table.begin() + (id + 1) * s.c);
  const std::int64_t width = (s.v + 2) / 3;
  for (std::int64_t first = 0; first < s.v; first += width) {
    const std::int64_t n = std::min(width, s.v - first);
    const Outputs one = run_op(backend(), [&](TestDevice& device) {
      const PackedWeight shard = device.weight(
          {table.begin() + first * s.c, table.begin() + (first + n) * s.c}, dtype(), n, s.c);
      device.ops().embedding_forward(
          device.exec(),
          {device.ints(at), &shard, device.output("out", dtype(), {s.t, s.c}), first, s.v});
    });
    got = sum(got, one.at("out").values());
  }
  EXPECT_EQ(got, want);
}

TEST_P(Embedding, ARepackedTableHoldsTheNewRows) {
  const Lookup s = row(kLookups);
  const Values before = random_values(s.v * s.c, dtype(), 4);
  std::vector<std::int32_t> every(static_cast<std::size_t>(s.v));
  std::iota(every.begin(), every.end(), 0);
  for (const DType from : {DType::kF32, dtype()}) {
    const Values after = random_values(s.v * s.c, from, 5);
    const Outputs got = run_op(backend(), [&](TestDevice& device) {
      PackedWeight weight = device.weight(before, dtype(), s.v, s.c);
      device.ops().repack_weight(device.exec(), {device.input(after, from, {s.v, s.c}), &weight});
      device.ops().embedding_forward(
          device.exec(), {device.ints(every), &weight, device.output("out", dtype(), {s.v, s.c})});
    });
    EXPECT_EQ(got.at("out").values(), rounded(after, dtype()));
  }
}

struct LossShape {
  std::int64_t t, v, shards;
};
constexpr LossShape kLoss[] = {{0, 5, 1}, {1, 1, 1},    {4, 7, 1},
                               {4, 7, 3}, {9, 1001, 1}, {9, 1001, 4}};

class CrossEntropy : public OpTest {};
TANDEM_OP_TEST(CrossEntropy, kLoss);

TEST_P(CrossEntropy, OfShardsIsThatOfTheWholeVocabulary) {
  const auto [t, v, shards] = row(kLoss);
  const Values logits = random_values(t * v, DType::kF32, 1, 3.0);
  std::vector<std::int32_t> labels;
  for (std::int64_t r = 0; r < t; ++r)
    labels.push_back(r == 2 ? static_cast<std::int32_t>(kIgnoreLabel)
                            : static_cast<std::int32_t>(r * 7919 % v));
  Values identity(static_cast<std::size_t>(v * v), 0.0);
  for (std::int64_t j = 0; j < v; ++j) identity[static_cast<std::size_t>(j * v + j)] = 1.0;
  const CrossEntropyResult want = cross_entropy(logits, identity, labels, v, v, 0.125);
  const std::int64_t width = (v + shards - 1) / shards;
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    const Tensor stats = device.output("stats", DType::kF32, {shards, t, 4});
    const Tensor at = device.ints(labels);
    std::vector<Tensor> parts;
    for (std::int64_t s = 0; s < shards; ++s) {
      const std::int64_t first = s * width, n = std::min(width, v - first);
      Values part;
      for (std::int64_t r = 0; r < t; ++r)
        part.insert(part.end(), logits.begin() + r * v + first, logits.begin() + r * v + first + n);
      parts.push_back(
          device.in_out(std::string("logits") + std::to_string(s), part, DType::kF32, {t, n}));
      device.ops().cross_entropy_stats(
          device.exec(), {parts.back(), at, first, stats.rows(s, 1).reshaped({t, 4})});
    }
    for (std::int64_t s = 0; s < shards; ++s) {
      const std::string name = std::to_string(s);
      device.ops().cross_entropy(
          device.exec(),
          {parts[static_cast<std::size_t>(s)], at, s * width, stats, 0.125f,
           device.output("loss" + name, DType::kF32, {t}),
           device.output("correct" + name, DType::kF32, {t}),
           device.output("d" + name, dtype(), parts[static_cast<std::size_t>(s)].shape)});
    }
  });
  Values dlogits(static_cast<std::size_t>(t * v));
  for (std::int64_t s = 0; s < shards; ++s) {
    const std::string name = std::to_string(s);
    // A difference of f32 numbers of the size of the logits.
    expect_close("loss", got.at("loss" + name).values(), want.loss, tolerance(DType::kF32, v, 16));
    EXPECT_EQ(got.at("correct" + name).values(), want.correct);
    EXPECT_EQ(got.at("loss" + name).bytes, got.at("loss0").bytes) << "every shard the same bits";
    const Values part = got.at("d" + name).values();
    const std::int64_t first = s * width, n = std::min(width, v - first);
    for (std::int64_t r = 0; r < t; ++r)
      std::copy(part.begin() + r * n, part.begin() + (r + 1) * n, dlogits.begin() + r * v + first);
  }
  if (v > 1)
    expect_close("dlogits", dlogits, want.dx, tolerance(dtype(), v, is_16_bit(dtype()) ? 1 : 16));
}

}  // namespace
}  // namespace tandem::kernels::testing
