// A checkpoint is logical tensors: what one layout saved, any other continues.
#include "protocol/base/random.h"
#include "tests/support/rank_job.h"
#include "worker/train/state_pieces.h"

#include <gtest/gtest.h>

#include <algorithm>

#include <cstdlib>

namespace tandem::test {
namespace {

using worker::comm::Layout;
using worker::train::merge_states;
using worker::train::StateTensor;
using worker::train::TrainState;

constexpr std::int64_t kSaved = 5, kSteps = 15;

std::vector<Layout> all_layouts() {
  std::vector<Layout> layouts = tested_layouts();
  layouts.push_back({});
  return layouts;
}

/// Pairs (saved in, resumed in): a seeded few, or all with TANDEM_TEST_FULL.
std::vector<std::pair<Layout, Layout>> pairs(std::uint64_t seed) {
  const auto layouts = all_layouts();
  std::vector<std::pair<Layout, Layout>> out;
  for (const Layout& a : layouts)
    for (const Layout& b : layouts) out.emplace_back(a, b);
  if (std::getenv("TANDEM_TEST_FULL") != nullptr) return out;
  Random(seed).shuffle(out);
  out.resize(24);
  return out;
}

class ResumeElsewhere : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Methods, ResumeElsewhere, testing::Bool());

TEST_P(ResumeElsewhere, TheNextTenLossesAreThoseOfTheUninterruptedRun) {
  RankJob job;
  job.full = GetParam();
  job.steps = kSteps;
  std::map<std::string, TrainState> saved;
  std::map<std::string, std::vector<double>> losses;
  for (const auto& [from, to] : pairs(GetParam() ? 1 : 2)) {
    const std::string name = layout_name(from);
    job.resume = nullptr;
    job.layout = from;
    if (!saved.contains(name)) {
      job.stop_after = kSaved;
      saved[name] = merged_state(run_as_threads(job));
      job.stop_after = 0;
      losses[name] = run_as_threads(job)[0].losses;
    }
    job.layout = to;
    job.resume = &saved[name];
    const auto resumed = run_as_threads(job);
    for (const RankResult& rank : resumed) {
      ASSERT_EQ(rank.losses.size(), static_cast<std::size_t>(kSteps - kSaved));
      for (std::size_t s = 0; s < rank.losses.size(); ++s)
        EXPECT_NEAR(rank.losses[s], losses[name][s + kSaved], 1e-5)
            << name << " resumed in " << layout_name(to) << ", step " << s + 1 + kSaved;
    }
  }
}

/// Norms of q and k lie whole on every tensor-parallel rank; a checkpoint has them once.
TEST(ResumeElsewhereOfNormedHeads, TheNextLossesAreThoseOfTheUninterruptedRun) {
  RankJob job;
  job.full = job.qk_norm = true;
  job.steps = kSteps;
  const auto expect_resumed = [&](const Layout& from, const Layout& to) {
    job.layout = from;
    job.resume = nullptr;
    const auto whole = run_as_threads(job)[0].losses;
    job.stop_after = kSaved;
    const TrainState saved = merged_state(run_as_threads(job));
    job.stop_after = 0;
    job.layout = to;
    job.resume = &saved;
    const auto resumed = run_as_threads(job)[0].losses;
    ASSERT_EQ(resumed.size(), static_cast<std::size_t>(kSteps - kSaved));
    for (std::size_t s = 0; s < resumed.size(); ++s)
      EXPECT_NEAR(resumed[s], whole[s + kSaved], 1e-5)
          << layout_name(from) << " resumed in " << layout_name(to) << ", step " << s + 1 + kSaved;
  };
  expect_resumed({1, 2, 1, 0}, {2, 1, 1, 3});
  expect_resumed({2, 1, 1, 3}, {1, 2, 2, 0});
  expect_resumed({1, 4, 1, 0, 1, false}, {});
}

TEST(ResumeInPlace, EndsWithTheSameBits) {
  for (const bool full : {false, true})
    for (const Layout& layout : tested_layouts()) {
      RankJob job;
      job.full = full;
      job.layout = layout;
      job.steps = 6;
      const auto whole = merged_state(run_as_threads(job));
      job.stop_after = 2;
      const auto saved = merged_state(run_as_threads(job));
      job.stop_after = 0;
      job.resume = &saved;
      const auto resumed = merged_state(run_as_threads(job));
      ASSERT_EQ(whole.tensors.size(), resumed.tensors.size());
      for (std::size_t t = 0; t < whole.tensors.size(); ++t)
        EXPECT_EQ(whole.tensors[t].values, resumed.tensors[t].values)
            << layout_name(layout) << " " << whole.tensors[t].name;
    }
}

TEST(MergeStates, RefusesWhatIsMissingDoubledOrForeign) {
  const auto piece = [](std::int64_t first, std::vector<float> values) {
    return StateTensor{"w.param", {2, 3}, std::move(values), {0, 2, 0, 3}, first};
  };
  const TrainState head{"{}", {piece(0, {1, 2})}}, tail{"{}", {piece(2, {3, 4, 5, 6})}};
  const auto whole = merge_states(std::vector<TrainState>{head, tail});
  ASSERT_TRUE(whole.ok());
  EXPECT_EQ(whole->tensors.at(0).values, (std::vector<float>{1, 2, 3, 4, 5, 6}));
  const TrainState columns{"{}", {{"w.param", {2, 3}, {9, 8}, {0, 2, 1, 1}, 0}}};
  const auto message = [](std::vector<TrainState> states) {
    return merge_states(states).status().message();
  };
  EXPECT_NE(message({head}).find("element 2 of w.param"), std::string::npos);
  EXPECT_NE(message({head, tail, columns}).find("two ranks"), std::string::npos);
  EXPECT_NE(message({head, {"{\"step\":2}", {}}}).find("different"), std::string::npos);
  EXPECT_NE(message({{"{}", {piece(5, {1, 2})}}}).find("outside"), std::string::npos);
  EXPECT_NE(message({{"{}", {{"w.param", {2, 3}, {1}, {1, 2, 0, 3}, 4}}}}).find("outside"),
            std::string::npos);
}

}  // namespace
}  // namespace tandem::test
