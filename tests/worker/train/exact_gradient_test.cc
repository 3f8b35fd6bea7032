// Gradients of every kind of weight through the whole model against central differences in f64:
// what no golden can hide, because nothing but the forward pass says what is right.
#include "tests/support/rank_job.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace tandem::test {
namespace {

using worker::train::StateTensor;
using worker::train::TrainState;

StateTensor& find(TrainState& state, const std::string& name) {
  const auto it = std::find_if(state.tensors.begin(), state.tensors.end(),
                               [&](const StateTensor& t) { return t.name == name; });
  TANDEM_CHECK(it != state.tensors.end(), name);
  return *it;
}

struct Kind {
  const char* name;
  bool tied, bias, qk_norm;
};
class ExactGradient : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Heads, ExactGradient,
                         testing::Values(Kind{"tied", true, true, false},
                                         Kind{"untied", false, false, false},
                                         Kind{"qk_norm", true, false, true}),
                         [](const auto& p) { return p.param.name; });

TEST_P(ExactGradient, OfFullFineTuningIsTheDerivativeOfTheLoss) {
  RankJob job;
  job.full = job.exact = true;
  job.tied = GetParam().tied;
  job.bias = GetParam().bias;
  job.qk_norm = GetParam().qk_norm;
  job.steps = 1;
  job.max_grad_norm = 0.0;
  TrainState after = merged_state({as_one_rank(job)});
  job.stop_after = -1;
  TrainState start = merged_state({as_one_rank(job)});
  job.stop_after = 0;
  job.resume = &start;
  int compared = 0;
  for (const StateTensor& moment : after.tensors) {
    if (!moment.name.ends_with(".exp_avg")) continue;
    if (moment.name.find(".layers.1.") != std::string::npos) continue;  // 0, 2 and 3 are enough
    const std::string name = moment.name.substr(0, moment.name.size() - 7) + "param";
    const auto count = static_cast<std::int64_t>(moment.values.size());
    double difference = 0.0, norm = 0.0;
    for (const std::int64_t at : {count / 7, count / 2, count - 1}) {
      float& value = find(start, name).values[static_cast<std::size_t>(at)];
      const float here = value;
      const float step = 0x1p-10f;
      value = here + step;
      const double up_at = value, up = as_one_rank(job).losses[0];
      value = here - step;
      const double down_at = value, down = as_one_rank(job).losses[0];
      value = here;
      const double slope = (up - down) / (up_at - down_at);
      // exp_avg after one step is (1 - beta1) times the gradient, stored as f32.
      const double gradient = static_cast<double>(moment.values[static_cast<std::size_t>(at)]) /
                              (1.0 - static_cast<double>(0.9f));
      difference += (slope - gradient) * (slope - gradient);
      norm += gradient * gradient;
      ++compared;
    }
    // A central difference is off by h^2 / 6 times the third derivative: about 1e-6 of the slope at
    // h = 2^-10; the loss itself is exact to 1e-15.
    EXPECT_LT(std::sqrt(difference), 1e-4 * std::sqrt(norm) + 1e-9) << name;
  }
  EXPECT_GT(compared, 80);
}

}  // namespace
}  // namespace tandem::test
