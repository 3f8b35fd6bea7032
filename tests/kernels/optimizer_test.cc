// AdamW against torch.optim.AdamW's recurrence in f64, and the global norm.
#include "tests/kernels/op_param.h"
#include "tests/kernels/reference.h"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::testing {
namespace {

constexpr std::int64_t kSizes[] = {0, 1, 15, 16, 33, 1000, 70'001};

class AdamW : public OpTest {};
TANDEM_OP_TEST(AdamW, kSizes);

TEST_P(AdamW, FollowsTheRecurrenceForThreeSteps) {
  const std::int64_t n = row(kSizes);
  const float lr = 1e-2f, beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, decay = 0.1f;
  for (const float max_norm : {0.0f, 0.5f}) {
    Values p = random_values(n, DType::kF32, 1), m(p.size(), 0.0), v(p.size(), 0.0);
    Values got_p = p, got_m = m, got_v = v;
    for (int step = 1; step <= 3; ++step) {
      const Values g = random_values(n, DType::kF32, 10 + static_cast<std::uint64_t>(step));
      const double norm = dot(g, g);
      const Outputs got = run_op(backend(), [&](TestDevice& device) {
        const Tensor squared = device.output("squared", DType::kF32, {1});
        const Tensor grad = device.input(g, DType::kF32, {n});
        device.ops().squared_norm(device.exec(), {{grad}, squared});
        device.ops().adamw(
            device.exec(),
            {device.in_out("p", got_p, DType::kF32, {n}), grad,
             device.in_out("m", got_m, DType::kF32, {n}),
             device.in_out("v", got_v, DType::kF32, {n}), device.output("cd", dtype(), {n}),
             max_norm > 0.0f ? squared : Tensor{}, max_norm, lr, beta1, beta2, eps, decay, step});
      });
      const double clip =
          max_norm > 0.0f ? std::min(1.0, max_norm / (std::sqrt(norm) + 1e-6)) : 1.0;
      for (std::size_t j = 0; j < p.size(); ++j) {
        const double d = g[j] * clip;
        p[j] *= 1.0 - static_cast<double>(lr) * decay;
        m[j] = beta1 * m[j] + (1.0 - static_cast<double>(beta1)) * d;
        v[j] = beta2 * v[j] + (1.0 - static_cast<double>(beta2)) * d * d;
        const double mh = m[j] / (1.0 - std::pow(static_cast<double>(beta1), step));
        const double vh = v[j] / (1.0 - std::pow(static_cast<double>(beta2), step));
        p[j] -= lr * mh / (std::sqrt(vh) + eps);
      }
      got_p = got.at("p").values(), got_m = got.at("m").values(), got_v = got.at("v").values();
      // 1 - beta2 of an f32 beta2 is off by 2^-25 / 1e-3 relative; a dozen roundings per step.
      const double allowed = tolerance(DType::kF32, 1, 32 * step);
      expect_close("p", got_p, p, allowed);
      expect_close("m", got_m, m, allowed);
      expect_close("v", got_v, v, allowed);
      EXPECT_EQ(got.at("cd").values(), rounded(got_p, dtype()));
    }
  }
}

TEST_P(AdamW, PiecesWhereverTheyLieGiveTheBitsOfTheWhole) {
  const std::int64_t n = row(kSizes);
  if (n == 0) return;
  const auto random = [&](std::uint64_t seed) { return random_values(n, DType::kF32, seed); };
  Values squares = random(4);  // of v
  for (double& value : squares) value *= value;
  squares = rounded(squares, DType::kF32);
  const auto update = [&](const std::vector<std::int64_t>& cuts, std::int64_t offset) {
    return run_op(backend(), [&](TestDevice& device) {
      const Tensor param = device.in_out("p", random(1), DType::kF32, {n});
      const Tensor grad = device.input(random(2), DType::kF32, {n});
      const Tensor m = device.in_out("m", random(3), DType::kF32, {n});
      const Tensor v = device.in_out("v", squares, DType::kF32, {n});
      const Tensor squared = device.input({9.0}, DType::kF32, {1});
      const Tensor cd = device.in_out("cd", Values(static_cast<std::size_t>(n + offset), 0.0),
                                      dtype(), {n + offset});
      std::int64_t begin = 0;
      for (const std::int64_t end : cuts) {
        const auto part = [&](const Tensor& x, std::int64_t from) {
          return x.rows(from + begin, end - begin);
        };
        device.ops().adamw(device.exec(),
                           {part(param, 0), part(grad, 0), part(m, 0), part(v, 0), part(cd, offset),
                            squared, 0.5f, 1e-2f, 0.9f, 0.999f, 1e-8f, 0.1f, 3});
        begin = end;
      }
    });
  };
  const Outputs whole = update({n}, 0);
  EXPECT_EQ(whole.at("cd").values(), rounded(whole.at("p").values(), dtype()));
  for (const std::int64_t offset : {0, 1, 4}) {
    const Outputs pieces = update({n / 7, n / 7 + n / 2, n}, offset);
    for (const char* name : {"p", "m", "v"})
      EXPECT_EQ(pieces.at(name).bytes, whole.at(name).bytes) << name << " offset " << offset;
    EXPECT_EQ(pieces.at("cd").rows(offset, n), whole.at("cd").bytes) << "offset " << offset;
  }
}

/// Gradients computed with a loss scale, a power of two: the same bits as without, clipped or not.
TEST_P(AdamW, TakesALossScaleOutOfTheGradientAndItsNorm) {
  const std::int64_t n = row(kSizes);
  for (const float max_norm : {0.0f, 0.5f}) {
    const auto update = [&](double scale) {
      Values g = random_values(n, DType::kF32, 2);
      for (double& value : g) value *= scale;
      return run_op(backend(), [&](TestDevice& device) {
        const Tensor squared = device.output("squared", DType::kF32, {1});
        const Tensor grad = device.input(g, DType::kF32, {n});
        device.ops().squared_norm(device.exec(), {{grad}, squared});
        AdamWArgs args{device.in_out("p", random_values(n, DType::kF32, 1), DType::kF32, {n}),
                       grad,
                       device.in_out("m", Values(g.size(), 0.0), DType::kF32, {n}),
                       device.in_out("v", Values(g.size(), 0.0), DType::kF32, {n}),
                       device.output("cd", dtype(), {n}),
                       max_norm > 0.0f ? squared : Tensor{},
                       max_norm,
                       1e-2f,
                       0.9f,
                       0.999f,
                       1e-8f,
                       0.1f,
                       1};
        args.grad_factor = static_cast<float>(1.0 / scale);
        device.ops().adamw(device.exec(), args);
      });
    };
    const Outputs plain = update(1.0), scaled = update(65536.0);
    for (const char* name : {"p", "m", "v", "cd"})
      EXPECT_EQ(scaled.at(name).bytes, plain.at(name).bytes) << name << " max_norm " << max_norm;
  }
}

class SquaredNorm : public OpTest {};
TANDEM_OP_TEST(SquaredNorm, kSizes);

TEST_P(SquaredNorm, SumsAllTensorsInF64) {
  const std::int64_t n = row(kSizes);
  const Values a = random_values(n, DType::kF32, 1, 1e3), b = random_values(7, DType::kF32, 2);
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    device.ops().squared_norm(
        device.exec(), {{device.input(a, DType::kF32, {n}), device.input(b, DType::kF32, {7}),
                         device.input({}, DType::kF32, {0})},
                        device.output("out", DType::kF32, {1})});
  });
  // The sum is f64; only its end is rounded.
  expect_close("out", got.at("out").values(), {dot(a, a) + dot(b, b)},
               1.01 * unit_roundoff(DType::kF32));
}

// More tensors than one kernel takes, of no, one and several chunks.
TEST(SquaredNorm, OfManyTensorsIsTheirSum) {
  constexpr std::int64_t kSizesOfMany[] = {1, 0, 5, 70001, 64, 4096, 2};
  double want = 0.0;
  std::vector<Values> tensors;
  for (std::uint64_t i = 0; i < 300; ++i) {
    tensors.push_back(random_values(kSizesOfMany[i % 7], DType::kF32, i, i % 5 == 0 ? 30.0 : 1.0));
    want += dot(tensors.back(), tensors.back());
  }
  for (const std::string& backend : executing_backends()) {
    const Outputs got = run_op(backend, [&](TestDevice& device) {
      std::vector<Tensor> placed;
      for (const Values& x : tensors)
        placed.push_back(device.input(x, DType::kF32, {static_cast<std::int64_t>(x.size())}));
      device.ops().squared_norm(device.exec(), {placed, device.output("out", DType::kF32, {1})});
    });
    expect_close("out", got.at("out").values(), {want}, 1.01 * unit_roundoff(DType::kF32));
  }
}

TEST(SquaredNorm, OfNothingIsZero) {
  for (const std::string& backend : executing_backends()) {
    const Outputs got = run_op(backend, [&](TestDevice& device) {
      device.ops().squared_norm(device.exec(), {{}, device.output("out", DType::kF32, {1})});
    });
    EXPECT_EQ(got.at("out").values(), Values{0.0});
  }
}

}  // namespace
}  // namespace tandem::kernels::testing
