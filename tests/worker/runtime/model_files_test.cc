#include "worker/runtime/model_files.h"

#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/stat.h>

#include <ctime>
#include <filesystem>
#include <fstream>

namespace tandem::worker::runtime {
namespace {

namespace fs = std::filesystem;

TEST(ModelCache, OfCopiesThatNobodyUsesTheOldestGoUntilTheDiskHasRoom) {
  const std::string models = testing::TempDir() + "model_cache_test";
  fs::remove_all(models);
  const auto copy = [&](const std::string& name, std::int64_t used_s_ago) {
    fs::create_directories(models + "/" + name);
    std::ofstream(models + "/" + name + "/model.safetensors") << name;
    const timespec times[] = {{::time(nullptr) - used_s_ago, 0}, {0, UTIME_OMIT}};
    ASSERT_EQ(::utimensat(AT_FDCWD, (models + "/" + name).c_str(), times, 0), 0);
  };
  const Digest kept = sha256("kept"), old = sha256("old"), fresh = sha256("fresh");
  copy(kept.hex(), 3 * kModelSpareS);
  copy(old.hex(), 2 * kModelSpareS);
  copy(fresh.hex(), 60);
  copy("draft-of-a-job", 4 * kModelSpareS);
  trim_model_cache(models, kept, 0);
  EXPECT_TRUE(fs::exists(models + "/" + old.hex())) << "there was room";
  trim_model_cache(models, kept, INT64_MAX);
  EXPECT_FALSE(fs::exists(models + "/" + old.hex()));
  for (const std::string& name : {kept.hex(), fresh.hex(), std::string("draft-of-a-job")})
    EXPECT_TRUE(fs::exists(models + "/" + name)) << name;
  fs::remove_all(models);
}

}  // namespace
}  // namespace tandem::worker::runtime
