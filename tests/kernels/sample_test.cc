// Sampling against a simple implementation in f64, its randomness, and what it reports.
#include "protocol/base/random.h"
#include "tests/kernels/reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

namespace tandem::kernels::testing {
namespace {

struct RowSettings {
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f;
  std::int32_t top_k = 0;
  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
  std::int64_t seed = 1, position = 0;
  struct Seen {
    std::int32_t id, prompt, output;
  };
  std::vector<Seen> history;
};

/// A batch as host vectors; run() gives ids, logprob, top_ids, top_logprob, logits.
struct Batch {
  std::int64_t v = 0;
  Values logits;
  std::vector<RowSettings> rows;
  std::int64_t top = 0;
  bool penalties = true;

  [[nodiscard]] Outputs run(const std::string& backend) const {
    return run_op(backend, [&](TestDevice& device) {
      const auto s = static_cast<std::int64_t>(rows.size());
      const auto floats = [&](float RowSettings::*member) {
        Values values;
        for (const RowSettings& r : rows) values.push_back(r.*member);
        return device.input(values, DType::kF32, {s});
      };
      const auto longs = [&](std::int64_t RowSettings::*member) {
        std::vector<std::int64_t> values;
        for (const RowSettings& r : rows) values.push_back(r.*member);
        return device.longs(values);
      };
      std::vector<std::int32_t> top_k, offsets{0}, ids, prompt, output;
      for (const RowSettings& r : rows) {
        top_k.push_back(r.top_k);
        for (const RowSettings::Seen& seen : r.history) {
          ids.push_back(seen.id);
          prompt.push_back(seen.prompt);
          output.push_back(seen.output);
        }
        offsets.push_back(static_cast<std::int32_t>(ids.size()));
      }
      SampleArgs a;
      a.logits = device.in_out("logits", logits, DType::kF32, {s, v});
      a.temperature = floats(&RowSettings::temperature);
      a.top_k = device.ints(top_k);
      a.top_p = floats(&RowSettings::top_p);
      a.min_p = floats(&RowSettings::min_p);
      a.seed = longs(&RowSettings::seed);
      a.position = longs(&RowSettings::position);
      if (penalties) {
        a.repetition_penalty = floats(&RowSettings::repetition);
        a.presence_penalty = floats(&RowSettings::presence);
        a.frequency_penalty = floats(&RowSettings::frequency);
        a.history_offsets = device.ints(offsets);
        a.history_ids = device.ints(ids);
        a.history_prompt_counts = device.ints(prompt);
        a.history_output_counts = device.ints(output);
      }
      a.ids = device.output("ids", DType::kI32, {s});
      a.logprob = device.output("logprob", DType::kF32, {s});
      a.top_logprobs = top;
      if (top > 0) {
        a.top_ids = device.output("top_ids", DType::kI32, {s, top});
        a.top_logprob = device.output("top_logprob", DType::kF32, {s, top});
      }
      device.ops().sample(device.exec(), a);
    });
  }
};

struct Token {
  std::int64_t id;
  double p;
};

/// The distribution a row is drawn from, by id: sort everything, filter step by step.
std::vector<Token> distribution(Values logits, const RowSettings& r) {
  for (const RowSettings::Seen& seen : r.history) {
    double& l = logits[static_cast<std::size_t>(seen.id)];
    l = l > 0 ? l / r.repetition : l * r.repetition;
    if (seen.output > 0) l -= r.presence + r.frequency * seen.output;
  }
  const double top = *std::max_element(logits.begin(), logits.end());
  std::vector<Token> tokens;
  for (std::size_t j = 0; j < logits.size(); ++j)
    tokens.push_back({static_cast<std::int64_t>(j), std::exp((logits[j] - top) / r.temperature)});
  std::stable_sort(tokens.begin(), tokens.end(),
                   [](const Token& a, const Token& b) { return a.p > b.p; });
  if (r.top_k > 0 && static_cast<std::size_t>(r.top_k) < tokens.size())
    tokens.resize(static_cast<std::size_t>(r.top_k));
  const auto total = [&] {
    return std::accumulate(tokens.begin(), tokens.end(), 0.0,
                           [](double sum, const Token& t) { return sum + t.p; });
  };
  if (r.top_p < 1.0f) {
    const double target = r.top_p * total();
    double sum = 0.0;
    std::size_t kept = 0;
    while (kept < tokens.size() && sum < target) sum += tokens[kept++].p;
    tokens.resize(std::max<std::size_t>(1, kept));
  }
  while (tokens.back().p < r.min_p) tokens.pop_back();
  const double sum = total();
  for (Token& t : tokens) t.p /= sum;
  std::sort(tokens.begin(), tokens.end(),
            [](const Token& a, const Token& b) { return a.id < b.id; });
  return tokens;
}

Values row_of(const Values& all, std::int64_t v, std::size_t row) {
  const auto begin = all.begin() + static_cast<std::int64_t>(row) * v;
  return {begin, begin + v};
}

double log_softmax(const Values& logits, std::int64_t id) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (double l : logits) sum += std::exp(l - top);
  return logits[static_cast<std::size_t>(id)] - top - std::log(sum);
}

std::vector<RowSettings> many_settings(std::int64_t v) {
  std::vector<RowSettings> rows;
  for (const float temperature : {0.3f, 1.0f, 1.7f})
    for (const std::int32_t top_k : {0, 1, 5, 1000})
      for (const float top_p : {1.0f, 0.9f, 0.3f, 0.0f})
        for (const float min_p : {0.0f, 0.1f}) {
          RowSettings r;
          r.temperature = temperature, r.top_k = top_k, r.top_p = top_p, r.min_p = min_p;
          r.position = static_cast<std::int64_t>(rows.size());
          r.seed = 1000 - r.position;
          if (rows.size() % 3 == 0) {
            r.repetition = 1.3f, r.presence = 0.5f, r.frequency = 0.25f;
            r.history = {
                {static_cast<std::int32_t>(rows.size() % static_cast<std::size_t>(v)), 1, 0}};
            if (v > 1 && r.history[0].id != 0) r.history.push_back({0, 0, 3});
          }
          rows.push_back(r);
        }
  return rows;
}

class Sample : public ::testing::TestWithParam<std::tuple<std::string, std::int64_t>> {
 protected:
  static const std::string& backend() { return std::get<0>(GetParam()); }
  static std::int64_t vocabulary() { return std::get<1>(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Backends, Sample,
                         ::testing::Combine(::testing::ValuesIn(executing_backends()),
                                            ::testing::Values(1, 2, 31, 1000, 5003)));

TEST_P(Sample, DrawsWhatTheSimpleImplementationDraws) {
  Batch batch;
  batch.v = vocabulary();
  batch.rows = many_settings(batch.v);
  const auto s = static_cast<std::int64_t>(batch.rows.size());
  batch.logits = random_values(s * batch.v, DType::kF32, 5, 2.0);
  const Outputs got = batch.run(backend());
  const Values ids = got.at("ids").values(), logprob = got.at("logprob").values();
  for (std::size_t r = 0; r < batch.rows.size(); ++r) {
    const RowSettings& settings = batch.rows[r];
    const Values logits = row_of(batch.logits, batch.v, r);
    const double u = random_uniform(static_cast<std::uint64_t>(settings.seed), 0,
                                    static_cast<std::uint64_t>(settings.position));
    double sum = 0.0, margin = 1.0;
    std::int64_t want = -1;
    for (const Token& t : distribution(logits, settings)) {
      sum += t.p;
      margin = std::min(margin, std::abs(sum - u));
      if (want < 0 && sum > u) want = t.id;
    }
    // A draw within f32 rounding of a boundary may fall on either side of it.
    if (margin > 1e-5) {
      EXPECT_EQ(ids[r], want) << "row " << r;
    }
    // Of the unmodified logits, whatever the penalties and filters did.
    EXPECT_NEAR(logprob[r], log_softmax(logits, static_cast<std::int64_t>(ids[r])),
                16.0 * tolerance(DType::kF32, batch.v));
  }
}

TEST_P(Sample, GreedyTakesTheFirstOfTheLargestAndListsTheMostLikely) {
  Batch batch;
  batch.v = vocabulary();
  batch.rows.resize(3);
  for (RowSettings& r : batch.rows) r.temperature = 0.0f;
  batch.penalties = false;
  batch.top = std::min<std::int64_t>(5, batch.v);
  batch.logits = random_values(3 * batch.v, DType::kF32, 6);
  // Row 1: all equal.
  std::fill_n(batch.logits.begin() + batch.v, batch.v, 0.5);
  const Outputs got = batch.run(backend());
  EXPECT_EQ(got.at("logits").values(), batch.logits) << "no penalties: logits stay";
  for (std::size_t r = 0; r < 3; ++r) {
    const Values logits = row_of(batch.logits, batch.v, r);
    std::vector<std::int64_t> order(static_cast<std::size_t>(batch.v));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
    });
    EXPECT_EQ(got.at("ids").values()[r], static_cast<double>(order[0])) << r;
    for (std::int64_t j = 0; j < batch.top; ++j) {
      const std::size_t at = r * static_cast<std::size_t>(batch.top) + static_cast<std::size_t>(j);
      EXPECT_EQ(got.at("top_ids").values()[at],
                static_cast<double>(order[static_cast<std::size_t>(j)]));
      EXPECT_NEAR(got.at("top_logprob").values()[at],
                  log_softmax(logits, order[static_cast<std::size_t>(j)]),
                  16.0 * tolerance(DType::kF32, batch.v));
    }
  }
}

TEST_P(Sample, ARowDoesNotDependOnTheBatch) {
  Batch batch;
  batch.v = vocabulary();
  batch.rows = many_settings(batch.v);
  batch.rows.resize(20);
  batch.logits = random_values(20 * batch.v, DType::kF32, 7, 3.0);
  const Outputs all = batch.run(backend());
  for (std::size_t r = 0; r < 20; ++r) {
    Batch one = batch;
    one.rows = {batch.rows[r]};
    one.logits = row_of(batch.logits, batch.v, r);
    const Outputs got = one.run(backend());
    const auto at = static_cast<std::int64_t>(r);
    EXPECT_EQ(got.at("ids").bytes, all.at("ids").rows(at, 1));
    EXPECT_EQ(got.at("logprob").bytes, all.at("logprob").rows(at, 1));
  }
}

TEST(SampleTemperature, NearlyZeroIsGreedy) {
  for (const std::string& backend : executing_backends())
    for (const float temperature : {1e-3f, 1e-30f, 1e-45f}) {
      Batch batch;
      batch.v = 40;
      batch.penalties = false;
      batch.logits = random_values(batch.v, DType::kF32, 9);
      batch.logits[17] = 10.0;
      batch.rows.resize(1);
      batch.rows[0].temperature = temperature;
      EXPECT_EQ(batch.run(backend).at("ids").values(), Values{17.0}) << temperature;
    }
}

TEST(SamplePenalties, CountPromptTokensForRepetitionOnly) {
  for (const std::string& backend : executing_backends()) {
    Batch batch;
    batch.v = 4;
    batch.logits = {2.0, -2.0, 1.0, 0.5};
    RowSettings r;
    r.temperature = 0.0f, r.repetition = 2.0f, r.presence = 0.25f, r.frequency = 0.125f;
    r.history = {{0, 3, 0}, {1, 0, 2}, {2, 0, 0}};
    batch.rows = {r};
    // 2 / 2; -2 * 2 - 0.25 - 2 * 0.125; an entry without any occurrence; untouched.
    EXPECT_EQ(batch.run(backend).at("logits").values(), (Values{1.0, -4.5, 1.0, 0.5}));
  }
}

TEST(SampleRandomness, FrequenciesFollowTheSoftmax) {
  // 20,000 draws at distinct positions of one seed over 12 tokens. Chi-square with 11 degrees of
  // freedom exceeds 44.3 with probability 6e-6; the draws are fixed, so this never flickers.
  constexpr std::int64_t kDraws = 20'000, kTokens = 12;
  for (const std::string& backend : executing_backends()) {
    Batch batch;
    batch.v = kTokens;
    batch.penalties = false;
    const Values logits = random_values(kTokens, DType::kF32, 8);
    batch.rows.resize(kDraws);
    for (std::int64_t j = 0; j < kDraws; ++j) {
      batch.rows[static_cast<std::size_t>(j)].seed = 42;
      batch.rows[static_cast<std::size_t>(j)].position = j;
      batch.logits.insert(batch.logits.end(), logits.begin(), logits.end());
    }
    std::map<double, double> counts;
    for (double id : batch.run(backend).at("ids").values()) counts[id] += 1.0;
    double chi_square = 0.0;
    for (std::int64_t id = 0; id < kTokens; ++id) {
      const double expected = kDraws * std::exp(log_softmax(logits, id));
      const double difference = counts[static_cast<double>(id)] - expected;
      chi_square += difference * difference / expected;
    }
    EXPECT_LT(chi_square, 44.3);
    EXPECT_GT(chi_square, 1.0) << "too even to be random";
  }
}

}  // namespace
}  // namespace tandem::kernels::testing
