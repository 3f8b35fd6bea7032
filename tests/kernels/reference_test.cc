// The references' backward functions against central differences of their forward ones, in f64.
#include "tests/kernels/reference.h"

#include <gtest/gtest.h>

namespace tandem::kernels::testing {
namespace {

constexpr double kDifferenceTolerance = 1e-7;  // steps of 1e-5 in f64: about 1e-9 here

Values draw(std::int64_t n, std::uint64_t seed) {
  return random_values(n, DType::kF32, seed);
}

TEST(Reference, RmsNormBackwardIsTheDerivative) {
  const std::int64_t t = 3, c = 7;
  const Values x = draw(t * c, 1), w = draw(c, 2), dy = draw(t * c, 3);
  const Values numeric = numeric_gradient(
      [&](const Values& at) { return dot(dy, rms_norm(at, {}, w, t, c, 1e-5).y); }, x);
  expect_close("dx", rms_norm_backward(dy, x, w, t, c, 1e-5), numeric, kDifferenceTolerance);
}

TEST(Reference, SiluMulBackwardIsTheDerivative) {
  const std::int64_t t = 3, f = 5;
  const Values x = draw(t * 2 * f, 1), dout = draw(t * f, 2);
  const Values numeric =
      numeric_gradient([&](const Values& at) { return dot(dout, silu_mul(at, t, f)); }, x);
  expect_close("dgate_up", silu_mul_backward(dout, x, t, f), numeric, kDifferenceTolerance);
}

TEST(Reference, RopeTurnedBackIsTheTranspose) {
  const std::vector<std::int32_t> positions{0, 3, 17};
  const Values freq{1.0, 0.25}, x = draw(3 * 8, 1), dy = draw(3 * 8, 2);
  const Values numeric = numeric_gradient(
      [&](const Values& at) { return dot(dy, rope(at, positions, freq, 1.5, 1, 4, 8, 1.0)); }, x);
  expect_close("dx", rope(dy, positions, freq, 1.5, 1, 4, 8, -1.0), numeric, kDifferenceTolerance);
}

TEST(Reference, QkNormBackwardIsTheDerivative) {
  const QkvShape s{3, 4, 2, 6};
  const Values x = draw(s.t * s.width(), 1), w = draw(12, 2), dy = draw(s.t * s.width(), 3);
  const QkNormGrads grads = qk_norm_backward(s, dy, x, w, 1e-5);
  expect_close(
      "draw", grads.draw,
      numeric_gradient([&](const Values& at) { return dot(dy, qk_norm(s, at, w, 1e-5)); }, x),
      kDifferenceTolerance);
  expect_close(
      "dweight", grads.dweight,
      numeric_gradient([&](const Values& at) { return dot(dy, qk_norm(s, x, at, 1e-5)); }, w),
      kDifferenceTolerance);
}

TEST(Reference, AttentionBackwardIsTheDerivative) {
  for (const auto& [window, cap] : {std::pair{0, 0.0f}, {3, 0.0f}, {0, 2.0f}}) {
    const AttentionSpec spec{4, 2, 4, 0.5f, window, cap};
    const std::int64_t t = 9, width = 8 * 4;
    const std::vector<std::int32_t> offsets{0, 3, 8};  // the last row is inert
    const Values x = draw(t * width, 1), dout = draw(t * 16, 2);
    const Values numeric = numeric_gradient(
        [&](const Values& at) { return dot(dout, attention(spec, at, offsets, t).out); }, x);
    expect_close("dqkv", attention_backward(spec, dout, x, offsets, t), numeric,
                 kDifferenceTolerance);
  }
}

TEST(Reference, LinearBackwardIsTheDerivative) {
  LinearCase c;
  c.t = 5, c.i = 4, c.n = 6;
  c.w = draw(c.n * c.i, 1);
  c.bias = draw(c.n, 2);
  c.sites = {{0, 2, {{2, 0.5, draw(8, 3), draw(4, 4)}, {1, 2.0, draw(4, 5), draw(2, 6)}}, {}},
             {3, 3, {{1, 1.5, draw(4, 7), draw(3, 8)}, {3, 1.0, draw(12, 9), draw(9, 10)}}, {}}};
  for (Site& site : c.sites) site.mask = random_values(c.t * c.i, DType::kF32, 11);
  c.segment_offsets = {0, 2, 3, 5};
  c.segment_slots = {1, -1, 0};
  const Values x = draw(c.t * c.i, 12), dy = draw(c.t * c.n, 13);
  const LinearGrads g = linear_backward(c, x, dy);
  expect_close("dx", g.dx,
               numeric_gradient([&](const Values& at) { return dot(dy, linear(c, at)); }, x),
               kDifferenceTolerance);
  for (std::size_t s = 0; s < 2; ++s)
    for (std::size_t k = 0; k < 2; ++k) {
      const auto with = [&](Values Adapter::*member) {
        return [&, member](const Values& at) {
          LinearCase changed = c;
          changed.sites[s].slots[k].*member = at;
          return dot(dy, linear(changed, x));
        };
      };
      const Adapter& adapter = c.sites[s].slots[k];
      expect_close("da", g.da[s][k], numeric_gradient(with(&Adapter::a), adapter.a),
                   kDifferenceTolerance);
      expect_close("db", g.db[s][k], numeric_gradient(with(&Adapter::b), adapter.b),
                   kDifferenceTolerance);
    }
}

TEST(Reference, CrossEntropyGradientIsTheDerivative) {
  const std::vector<std::int32_t> labels{2, -100, 0, 6};
  const std::int64_t c = 3, v = 7;
  const Values x = draw(4 * c, 1), w = draw(v * c, 2);
  const Values numeric = numeric_gradient(
      [&](const Values& at) {
        double sum = 0.0;
        for (double loss : cross_entropy(at, w, labels, c, v, 1.0).loss) sum += loss;
        return 0.25 * sum;
      },
      x);
  expect_close("dx", cross_entropy(x, w, labels, c, v, 0.25).dx, numeric, kDifferenceTolerance);
}

}  // namespace
}  // namespace tandem::kernels::testing
