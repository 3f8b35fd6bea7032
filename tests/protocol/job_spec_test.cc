#include "protocol/job_spec.h"

#include "protocol/base/str.h"

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

TEST(TrainSettings, NamesWhatOlderWorkersDoNotKnowOnlyWhereItSaysSomething) {
  TrainSettings settings;
  settings.gradient_accumulation_steps = 4;
  settings.dp = 2;
  const std::string plain = settings.to_json();
  for (const char* recent : {"dp_min", "layout", "ranks_max", "virtual_pipeline_size",
                             "pipeline_balance", "sequence_parallel"})
    EXPECT_EQ(plain.find(str("\"", recent, "\"")), std::string::npos) << plain;
  EXPECT_NE(plain.find("\"zero\""), std::string::npos) << plain;
  settings.dp_min = 1;
  EXPECT_NE(settings.to_json().find("\"dp_min\":1"), std::string::npos) << settings.to_json();
  EXPECT_EQ(TrainSettings::default_of("dp_min"), "0");
  EXPECT_EQ(TrainSettings::default_of("layout"), "\"manual\"");
  EXPECT_EQ(TrainSettings::default_of("no_such"), "");
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
  EXPECT_EQ(TrainSettings::parse(R"({"seed": 18446744073709551615})").status().message(),
            "seed must be in 0..9223372036854775807, not 18446744073709551615");
  EXPECT_FALSE(JobSpec::parse(R"({"model":"m","dataset":"d","adapter":"a",)"
                              R"("priority":18446744073709551615})")
                   .ok())
      << "not -1";
  EXPECT_FALSE(TrainSettings::parse(R"({"lora_dropout": 1.0})").ok());
  EXPECT_FALSE(TrainSettings::parse(R"({"learning_rate": "fast"})").ok());
  EXPECT_FALSE(TrainSettings::parse("[1]").ok());
  EXPECT_FALSE(TrainSettings::parse("{").ok());
}

TEST(TrainSettings, KnowsThreeDtypesAndNamesTheNearestOfOthers) {
  for (const char* name : {"dtype", "adapter_dtype"}) {
    for (const char* word : {"auto", "f32", "bf16", "f16"})
      EXPECT_TRUE(TrainSettings::parse(str("{\"", name, "\":\"", word, "\"}")).ok()) << word;
    const auto r = TrainSettings::parse(str("{\"", name, "\":\"float16\"}"));
    ASSERT_FALSE(r.ok());
    EXPECT_EQ(r.status().message(), str(name,
                                        " must be one of auto, f32, bf16, f16; not "
                                        "\"float16\"; did you mean \"f16\"?"));
  }
}

TEST(TrainSettings, RefusesAnythingNestedDeeperThanTheLimit) {
  const auto r = TrainSettings::parse(R"({"target_modules": )" + std::string(400'000, '['));
  ASSERT_FALSE(r.ok());
  EXPECT_EQ(r.status().message(), "training settings may nest at most 64 levels deep");
  EXPECT_FALSE(JobSpec::parse(R"({"model": )" + std::string(400'000, '[')).ok());
}

TEST(TrainSettings, RefusesALayoutThatCannotWorkAndNamesOneThatDoes) {
  const auto refused = [](const std::string& json, const std::vector<std::string>& words) {
    const auto r = TrainSettings::parse(json);
    ASSERT_FALSE(r.ok()) << json;
    EXPECT_EQ(r.status().code(), StatusCode::kRefused);
    for (const auto& word : words)
      EXPECT_NE(r.status().message().find(word), std::string::npos)
          << word << " in: " << r.status().message();
  };
  refused(R"({"dp": 2})", {"gradient_accumulation_steps is 1", "to 2", "dp to 1"});
  refused(R"({"dp": 4, "gradient_accumulation_steps": 6})", {"to 8", "dp to 2"});
  refused(R"({"zero": 1})", {"zero 1", "dp is 1"});
  refused(R"({"tp": 2, "lora_dropout": 0.1})", {"lora_dropout 0.1", "or use tp 1"});
  refused(R"({"tp": 2, "lora_dropout": 0.1, "gradient_accumulation_steps": 4})",
          {"lora_dropout 0.1", "dp 2 x tp 1 x pp 1"});
  refused(R"({"tp": 64, "pp": 2})", {"128 ranks", "at most 64"});
  refused(R"({"virtual_pipeline_size": 2})", {"pp is 1", "virtual_pipeline_size to 1"});
  refused(R"({"pp": 4, "virtual_pipeline_size": 2, "gradient_accumulation_steps": 6, "dp": 2})",
          {"2 ranks 3 each", "gradient_accumulation_steps to 8"});
  EXPECT_EQ(TrainSettings::parse(R"({"tp": 0})").status().message(), "tp must be in 1..64, not 0");
  refused(R"({"layout": "auto", "tp": 2})", {"layout auto chooses", "tp 2", "leave them out"});
  refused(R"({"layout": "auto", "virtual_pipeline_size": 2})", {"layout auto chooses"});
  EXPECT_TRUE(TrainSettings::parse(R"({"layout": "auto", "ranks_max": 8})").ok());
  EXPECT_FALSE(TrainSettings::parse(R"({"zero": 4})").ok());
  const auto works = TrainSettings::parse(
      R"({"dp": 2, "tp": 2, "pp": 2, "zero": 3, "gradient_accumulation_steps": 2})");
  ASSERT_TRUE(works.ok()) << works.status().to_string();
  EXPECT_EQ(works->ranks(), 8);
  // ZeRO does not go with dp 1, nor dp_min with a smaller dp.
  for (const char* json : {R"({"dp": 2, "zero": 3})", R"({"dp": 2, "dp_min": 2})"}) {
    const std::string said = TrainSettings::parse(json).status().message();
    EXPECT_NE(said.find("set gradient_accumulation_steps to 2"), std::string::npos) << said;
    EXPECT_EQ(said.find("dp to 1"), std::string::npos) << said;
  }
  const auto rows = TrainSettings::parse(R"({"tp": 2, "sequence_parallel": "off"})");
  ASSERT_TRUE(rows.ok()) << rows.status().to_string();
  EXPECT_FALSE(rows->sequence_parallel);
}

TEST(JobSpec, NeedsModelDatasetAndAdapter) {
  EXPECT_FALSE(JobSpec::parse(R"({"model": "m", "dataset": "d"})").ok());
  const auto spec =
      JobSpec::parse(R"({"model":"m","dataset":"d","adapter":"a","train":{"lora_r":8}})");
  ASSERT_TRUE(spec.ok()) << spec.status().to_string();
  EXPECT_EQ(spec->train.lora_r, 8);
  EXPECT_EQ(JobSpec::parse(spec->to_json())->to_json(), spec->to_json());
}

TEST(JobSpec, AFullFineTuneHasItsOwnLearningRateAndPublishesUnderAName) {
  const auto spec = JobSpec::parse(
      R"({"model":"m","dataset":"d","name":"n","train":{"method":"full","dp":2,
          "gradient_accumulation_steps":2}})");
  ASSERT_TRUE(spec.ok()) << spec.status().to_string();
  EXPECT_EQ(spec->train.learning_rate, 2e-5);
  EXPECT_EQ(spec->published_name(), "n");
  EXPECT_EQ(JobSpec::parse(spec->to_json())->to_json(), spec->to_json());
  EXPECT_EQ(TrainSettings::parse(R"({"method":"full","learning_rate":3e-4})")->learning_rate, 3e-4);
  const auto refused = [](const std::string& json, const std::string& word) {
    const auto r = JobSpec::parse(json);
    ASSERT_FALSE(r.ok()) << json;
    EXPECT_NE(r.status().message().find(word), std::string::npos) << r.status().message();
  };
  refused(R"({"model":"m","dataset":"d","adapter":"a","train":{"method":"full"}})", "--name");
  refused(R"({"model":"m","dataset":"d","name":"n"})", "--adapter");
  refused(R"({"model":"m","dataset":"d","name":"n","train":{"method":"full","lora_r":8}})",
          "lora_r is of method");
}

TEST(TrainSettings, AnElasticJobRunsWithAnyDpThatDealsItsMicroBatchesEvenly) {
  const auto elastic =
      TrainSettings::parse(R"({"dp":6,"dp_min":2,"gradient_accumulation_steps":12})");
  ASSERT_TRUE(elastic.ok()) << elastic.status().to_string();
  EXPECT_EQ(elastic->dp_choices(), (std::vector<std::int64_t>{6, 4, 3, 2}));
  EXPECT_EQ(TrainSettings::parse(elastic->to_json())->to_json(), elastic->to_json());
  const auto plain = TrainSettings::parse(R"({"dp":6,"gradient_accumulation_steps":12})");
  EXPECT_EQ(plain->dp_choices(), (std::vector<std::int64_t>{6}));
  EXPECT_EQ(plain->to_json().find("dp_min"), std::string::npos) << "an older worker reads it";
  EXPECT_FALSE(TrainSettings::parse(R"({"dp":2,"dp_min":3,"gradient_accumulation_steps":6})").ok());
  EXPECT_FALSE(
      TrainSettings::parse(R"({"dp":4,"dp_min":1,"zero":1,"gradient_accumulation_steps":4})").ok());
}

TEST(JobSpec, ALoraIsWrittenSoThatAnOlderWorkerReadsIt) {
  const auto spec = JobSpec::parse(R"({"model":"m","dataset":"d","adapter":"a"})");
  EXPECT_EQ(spec->to_json().find("\"name\""), std::string::npos);
}

}  // namespace
}  // namespace tandem::protocol
