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

TEST(Settings, NamesAMissingConfigurationFile) {
  const auto settings = Settings::load({}, "/nonexistent/x.yaml");
  ASSERT_FALSE(settings.ok());
  EXPECT_EQ(settings.status().code(), StatusCode::kNotFound);
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
