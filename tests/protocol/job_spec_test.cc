#include "protocol/job_spec.h"

#include <gtest/gtest.h>

namespace tandem::protocol {
namespace {

TEST(TrainSettings, RoundTripsEveryField) {
  TrainSettings settings;
  settings.learning_rate = 1e-3;
  settings.target_modules = {"q_proj", "v_proj"};
  settings.over_length = OverLength::kDrop;
  settings.lr_scheduler_type = Schedule::kLinear;
  const auto again = TrainSettings::parse(settings.to_json());
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  EXPECT_EQ(again->to_json(), settings.to_json());
  EXPECT_EQ(again->learning_rate, 1e-3);
}

TEST(TrainSettings, NamesTheNearestFieldForAnUnknownOne) {
  const auto r = TrainSettings::parse(R"({"learning_rat": 1e-4})");
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.status().message().find("did you mean \"learning_rate\""), std::string::npos);
}

TEST(TrainSettings, RefusesValuesOutOfRangeWithRangeAndValue) {
  const auto r = TrainSettings::parse(R"({"lora_r": 0})");
  ASSERT_FALSE(r.ok());
  EXPECT_EQ(r.status().message(), "lora_r must be in 1..512, not 0");
  EXPECT_FALSE(TrainSettings::parse(R"({"lora_dropout": 1.0})").ok());
  EXPECT_FALSE(TrainSettings::parse(R"({"learning_rate": "fast"})").ok());
  EXPECT_FALSE(TrainSettings::parse("[1]").ok());
  EXPECT_FALSE(TrainSettings::parse("{").ok());
}

TEST(JobSpec, NeedsModelDatasetAndAdapter) {
  EXPECT_FALSE(JobSpec::parse(R"({"model": "m", "dataset": "d"})").ok());
  const auto spec =
      JobSpec::parse(R"({"model":"m","dataset":"d","adapter":"a","train":{"lora_r":8}})");
  ASSERT_TRUE(spec.ok()) << spec.status().to_string();
  EXPECT_EQ(spec->train.lora_r, 8);
  EXPECT_EQ(JobSpec::parse(spec->to_json())->to_json(), spec->to_json());
}

}  // namespace
}  // namespace tandem::protocol
