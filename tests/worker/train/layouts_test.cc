// Every layout against one rank: the same losses, gradients and state. In f64, so that what is seen
// is the layout and not rounding: a wrong scale, a part counted twice or a stale weight shows at
// 1e-3, two correct layouts differ by about 1e-13.
#include "tests/support/rank_job.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

namespace tandem::test {
namespace {

using worker::comm::Layout;

struct Case {
  bool full;
  Layout layout;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const bool full : {false, true})
    for (const Layout& layout : tested_layouts()) all.push_back({full, layout});
  return all;
}

std::string case_name(const testing::TestParamInfo<Case>& info) {
  return std::string(info.param.full ? "full_" : "lora_") + layout_name(info.param.layout);
}

class Layouts : public testing::TestWithParam<Case> {
 protected:
  [[nodiscard]] static RankJob job() {
    RankJob job;
    job.full = GetParam().full;
    job.layout = GetParam().layout;
    return job;
  }
};
INSTANTIATE_TEST_SUITE_P(All, Layouts, testing::ValuesIn(cases()), case_name);

TEST_P(Layouts, ThirtyLossesInF64AreThoseOfOneRank) {
  RankJob j = job();
  j.exact = true;
  const RankResult want = as_one_rank(j);
  ASSERT_EQ(want.losses.size(), 30u);
  EXPECT_LT(want.losses.back(), 0.9 * want.losses.front()) << "the job learns something";
  const auto got = run_as_threads(j);
  for (const RankResult& rank : got) {
    ASSERT_EQ(rank.losses.size(), want.losses.size());
    for (std::size_t s = 0; s < want.losses.size(); ++s) {
      EXPECT_NEAR(rank.losses[s], want.losses[s], 1e-9) << "step " << s + 1;
      EXPECT_NEAR(rank.norms[s], want.norms[s], 1e-9 * want.norms[s] + 1e-9) << "step " << s + 1;
    }
  }
}

TEST_P(Layouts, GradientsOfTheFirstStepInF32AreThoseOfOneRank) {
  RankJob j = job();
  j.steps = 1;
  j.max_grad_norm = 0.0;  // exp_avg is then (1 - beta1) times the gradient
  const auto want = merged_state({as_one_rank(j)});
  EXPECT_LT(state_error(merged_state(run_as_threads(j)), want, ".exp_avg"), 1e-5);
}

TEST_P(Layouts, TwoRunsInF32EndWithTheSameBits) {
  RankJob j = job();
  j.steps = 4;
  const auto a = run_as_threads(j), b = run_as_threads(j);
  EXPECT_EQ(a[0].losses, b[0].losses);
  const auto left = merged_state(a), right = merged_state(b);
  ASSERT_EQ(left.tensors.size(), right.tensors.size());
  for (std::size_t t = 0; t < left.tensors.size(); ++t)
    EXPECT_EQ(left.tensors[t].values, right.tensors[t].values) << left.tensors[t].name;
}

/// Every sum has the addends that it had, in their order. (Norm weights, which a full fine-tune
/// trains, are summed by parts of the rows: those are other sums.)
TEST(SequenceParallel, ChangesNoBitOfALoraJob) {
  for (const char* recompute : {"none", "elementwise", "mlp", "block"}) {
    RankJob j;
    j.steps = 4;
    j.recompute = recompute;
    j.layout = {1, 2, 2, 0};
    const auto shared = run_as_threads(j);
    j.layout.sequence_parallel = false;
    const auto whole = run_as_threads(j);
    EXPECT_EQ(shared[0].losses, whole[0].losses) << recompute;
    const auto left = merged_state(shared), right = merged_state(whole);
    ASSERT_EQ(left.tensors.size(), right.tensors.size());
    for (std::size_t t = 0; t < left.tensors.size(); ++t)
      EXPECT_EQ(left.tensors[t].values, right.tensors[t].values) << left.tensors[t].name;
  }
}

// -- rows in parts, as where collectives go on in the background
// ------------------------------------

std::vector<Case> stream_cases() {
  std::vector<Case> all;
  for (const Case& c : cases())
    if (c.layout.tp > 1 && c.layout.sequence_parallel) all.push_back(c);
  return all;
}
class StreamParts : public Layouts {};
INSTANTIATE_TEST_SUITE_P(All, StreamParts, testing::ValuesIn(stream_cases()), case_name);

TEST_P(StreamParts, LossesInF64AreThoseOfOneRank) {
  for (const char* recompute : {"none", "elementwise", "mlp", "block"}) {
    RankJob j = job();
    j.exact = j.eval = true;
    j.steps = 6;
    j.recompute = recompute;
    const RankResult want = as_one_rank(j);
    std::array<std::atomic<std::int64_t>, 2> begun{};
    for (const std::int64_t bytes : {std::int64_t{1}, std::int64_t{1} << 40}) {
      j.stream_part_bytes = bytes;
      j.background = &begun[bytes == 1 ? 0 : 1];
      for (const RankResult& rank : run_as_threads(j)) {
        ASSERT_EQ(rank.losses.size(), want.losses.size());
        for (std::size_t s = 0; s < want.losses.size(); ++s) {
          EXPECT_NEAR(rank.losses[s], want.losses[s], 1e-9) << recompute << " step " << s + 1;
          EXPECT_NEAR(rank.norms[s], want.norms[s], 1e-9 * want.norms[s] + 1e-9);
        }
        for (std::size_t e = 0; e < want.eval_losses.size(); ++e)
          EXPECT_NEAR(rank.eval_losses[e], want.eval_losses[e], 1e-9);
      }
    }
    EXPECT_GE(begun[0], 2 * begun[1]) << "parts";
    EXPECT_GT(begun[1], 0) << "all rows as one";
  }
}

TEST_P(StreamParts, ForwardChangesNoBitAndTwoRunsAreTheSame) {
  RankJob j = job();
  j.steps = 4;
  const auto whole = run_as_threads(j);
  std::atomic<std::int64_t> begun = 0;
  j.background = &begun;
  const auto a = run_as_threads(j), b = run_as_threads(j);
  EXPECT_EQ(a[0].losses.front(), whole[0].losses.front()) << "before any update";
  EXPECT_EQ(a[0].losses, b[0].losses);
  const auto left = merged_state(a), right = merged_state(b);
  ASSERT_EQ(left.tensors.size(), right.tensors.size());
  for (std::size_t t = 0; t < left.tensors.size(); ++t)
    EXPECT_EQ(left.tensors[t].values, right.tensors[t].values) << left.tensors[t].name;
}

// -- what else a job may ask for
// -------------------------------------------------------------------

class Variants : public testing::TestWithParam<Case> {
 protected:
  static void expect_same(RankJob job) {
    job.full = GetParam().full;
    job.layout = GetParam().layout;
    job.steps = 6;
    const RankResult want = as_one_rank(job);
    const double allowed = job.exact ? 1e-9 : 1e-5;
    for (const RankResult& rank : run_as_threads(job)) {
      for (std::size_t s = 0; s < want.losses.size(); ++s)
        EXPECT_NEAR(rank.losses[s], want.losses[s], allowed) << "step " << s + 1;
      ASSERT_EQ(rank.eval_losses.size(), want.eval_losses.size());
      for (std::size_t e = 0; e < want.eval_losses.size(); ++e)
        EXPECT_NEAR(rank.eval_losses[e], want.eval_losses[e], allowed);
    }
  }
};
std::vector<Case> variant_cases() {
  std::vector<Case> all;
  for (const bool full : {false, true})
    for (const Layout& layout : {Layout{2, 1, 1, 3}, Layout{1, 2, 2, 0}, Layout{2, 1, 2, 2},
                                 Layout{2, 2, 1, 1}, Layout{2, 2, 1, 3}, Layout{1, 2, 2, 0, 2}})
      all.push_back({full, layout});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Some, Variants, testing::ValuesIn(variant_cases()), case_name);

TEST_P(Variants, AnUntiedHeadWithoutBiases) {
  RankJob job;
  job.exact = true;
  job.tied = job.bias = false;
  expect_same(job);
}
/// Each tensor-parallel rank has heads of its own, and so an addend of the gradient of their norm,
/// whether or not the stream is in parts.
TEST_P(Layouts, NormsOfQAndKAreThoseOfOneRank) {
  for (const char* recompute : {"none", "block"}) {
    RankJob j = job();
    j.exact = j.qk_norm = true;
    j.recompute = recompute;
    j.steps = 5;
    const RankResult want = as_one_rank(j);
    const auto got = run_as_threads(j);
    for (const RankResult& rank : got)
      for (std::size_t s = 0; s < want.losses.size(); ++s) {
        EXPECT_NEAR(rank.losses[s], want.losses[s], 1e-9) << recompute << ", step " << s + 1;
        EXPECT_NEAR(rank.norms[s], want.norms[s], 1e-9 * want.norms[s] + 1e-9)
            << recompute << ", step " << s + 1;
      }
    if (!j.full) continue;
    for (const char* name : {"q_norm.weight.exp_avg", "k_norm.weight.exp_avg", ".param"})
      EXPECT_LT(state_error(merged_state(got), merged_state({want}), name), 1e-6) << name;
  }
}

TEST_P(Variants, NormsOfQAndKInF32) {
  RankJob job;
  job.qk_norm = true;
  expect_same(job);
}

TEST_P(Variants, ActivationsRecomputed) {
  for (const char* recompute : {"elementwise", "mlp", "block"}) {
    RankJob job;
    job.exact = true;
    job.recompute = recompute;
    expect_same(job);
  }
}
TEST_P(Variants, EvaluationAtTheEnd) {
  RankJob job;
  job.exact = job.eval = true;
  expect_same(job);
}
TEST_P(Variants, DropoutFollowsTheMicroBatchNotTheRank) {
  if (GetParam().full || GetParam().layout.tp > 1) return;  // nothing to drop; refused
  RankJob job;
  job.lora_dropout = 0.25;
  expect_same(job);
}

TEST(Refusals, NameWhatWorks) {
  const auto config = rank_job_model({});
  EXPECT_TRUE(worker::model::check_shard(config, 4, 4).ok());
  EXPECT_NE(worker::model::check_shard(config, 3, 1).message().find("divisor of 4"),
            std::string::npos);
  EXPECT_NE(worker::model::check_shard(config, 1, 9).message().find("8"), std::string::npos);
}

}  // namespace
}  // namespace tandem::test
