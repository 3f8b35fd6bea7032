#include "protocol/settings.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace tandem::protocol {
namespace {

std::string write_config(const std::string& text) {
  const std::string path = testing::TempDir() + "tandem_settings_test.yaml";
  std::ofstream(path) << text;
  return path;
}

TEST(Settings, AFlagBeatsTheEnvironmentWhichBeatsAFile) {
  const std::string file = write_config("threads: 3\ndtype: f32\nlease_ms: 7000\n");
  setenv("TANDEM_THREADS", "4", 1);
  setenv("TANDEM_DTYPE", "bf16", 1);
  const auto settings = Settings::load({{"threads", "5"}}, file);
  unsetenv("TANDEM_THREADS");
  unsetenv("TANDEM_DTYPE");
  ASSERT_TRUE(settings.ok()) << settings.status().to_string();
  EXPECT_EQ(settings->get("threads"), "5");
  EXPECT_EQ(settings->all().at("threads").origin, "flag");
  EXPECT_EQ(settings->all().at("dtype").origin, "TANDEM_DTYPE");
  EXPECT_EQ(settings->all().at("lease_ms").origin, file);
  EXPECT_EQ(settings->all().at("workers").origin, "default");
}

TEST(Settings, RefusesAnUnknownKeyWithFileLineAndNearestName) {
  const auto settings = Settings::load({}, write_config("threads: 3\nthread: 4\n"));
  ASSERT_FALSE(settings.ok());
  EXPECT_NE(
      settings.status().message().find(":2: unknown setting \"thread\"; did you mean \"threads\"?"),
      std::string::npos)
      << settings.status().message();
}

TEST(Settings, RefusesAFileThatCannotBeReadAndANameThatStandsTwice) {
  const Status folder = Settings::load({}, testing::TempDir()).status();
  EXPECT_EQ(folder.code(), StatusCode::kRefused);
  EXPECT_NE(folder.message().find(testing::TempDir()), std::string::npos) << folder.message();
  const Status twice = Settings::load({}, write_config("threads: 3\nthreads: 5\n")).status();
  EXPECT_NE(twice.message().find(":2: threads stands there twice"), std::string::npos)
      << twice.message();
  EXPECT_TRUE(Settings::load({}, write_config("")).ok());
}

TEST(Settings, NamesAMissingConfigurationFile) {
  const auto settings = Settings::load({}, "/nonexistent/x.yaml");
  ASSERT_FALSE(settings.ok());
  EXPECT_EQ(settings.status().code(), StatusCode::kNotFound);
}

TEST(Settings, SaysWhereAValueWasSetThatItMayNotHave) {
  const auto message = [](const std::string& name, const std::string& value) {
    return Settings::load({{name, value}}, "").status().message();
  };
  EXPECT_EQ(message("train_share_min", "abc"),
            "train_share_min must be a number from 0 to 1, not \"abc\" (flag)");
  EXPECT_NE(message("train_share_min", "7"), "");
  EXPECT_EQ(message("train_share_min", "0.5"), "");
  EXPECT_EQ(
      message("serve_interval_ms", "never"),
      "serve_interval_ms must be auto or a whole number in 0..86400000, not \"never\" (flag)");
  for (const char* good : {"auto", "0", "22"}) EXPECT_EQ(message("serve_interval_ms", good), "");
  EXPECT_NE(message("batch_tokens_beside", "-1"), "");
}

TEST(Settings, TheLogsLevelIsOneOfItsWords) {
  const auto level = [](const char* word) {
    return Settings::load({{"log_level", word}}, "")->log_level();
  };
  EXPECT_EQ(level("debug"), LogLevel::kDebug);
  EXPECT_EQ(level("info"), LogLevel::kInfo);
  EXPECT_EQ(level("warn"), LogLevel::kWarn);
  EXPECT_EQ(level("error"), LogLevel::kError);
}

TEST(Settings, ReadsSizesWithUnits) {
  EXPECT_EQ(*parse_bytes("512MiB"), 512ll << 20);
  EXPECT_EQ(*parse_bytes("1.5 GiB"), 3ll << 29);
  EXPECT_FALSE(parse_bytes("12 parsecs").ok());
  EXPECT_FALSE(parse_bytes("").ok());
  EXPECT_FALSE(parse_bytes("-1").ok());
}

}  // namespace
}  // namespace tandem::protocol
