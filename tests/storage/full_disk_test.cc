// The registry on a file system that is really full: a small tmpfs of its own. Needs root (or
// another way to mount); says so and skips where that cannot be had.
#include "protocol/base/clock.h"
#include "tests/storage/registry_fixture.h"

#include <sys/mount.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

namespace tandem::storage {

namespace fs = std::filesystem;

class FullDisk : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/tandem-full-disk-XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    mount_point_ = name;
    if (::mount("tmpfs", name, "tmpfs", 0, "size=48m,mode=0700") != 0)
      GTEST_SKIP() << "cannot mount a tmpfs (" << std::strerror(errno)
                   << "): the full disk is not tested here";
    mounted_ = true;
  }
  void TearDown() override {
    if (mounted_) ::umount2(mount_point_.c_str(), MNT_DETACH);
    ::rmdir(mount_point_.c_str());
  }

  [[nodiscard]] Result<std::unique_ptr<Registry>> open(std::int64_t blob_budget_bytes) const {
    RegistryOptions options;
    options.directory = mount_point_ + "/data";
    options.registry_map_bytes = 8 << 20;
    options.blob_map_bytes = 1 << 30;
    options.blob_budget_bytes = blob_budget_bytes;
    return Registry::open(options, clock_);
  }
  /// Takes every byte that is left.
  void fill() const {
    std::ofstream ballast(mount_point_ + "/ballast", std::ios::binary | std::ios::app);
    for (std::size_t bytes = 1 << 20; bytes > 0; bytes /= 2) {
      const std::string block(bytes, 'x');
      while (ballast.write(block.data(), static_cast<std::streamsize>(bytes)).flush()) continue;
      ballast.clear();
    }
    ASSERT_EQ(fs::space(mount_point_).available, 0u);
  }
  void refuses_and_loses_nothing(std::int64_t blob_budget_bytes) const;
  void make_room() const { fs::remove(mount_point_ + "/ballast"); }

  std::string mount_point_;
  bool mounted_ = false;
  SystemClock clock_;
};

namespace {

const std::string kFirst(1 << 20, 'a'), kSecond(4 << 20, 'b');

/// Everything of the first publish is there and nothing of the second.
void expect_intact(Registry& registry) {
  const auto bytes = registry.blobs().get(sha256(kFirst));
  ASSERT_TRUE(bytes.ok()) << bytes.status().to_string();
  EXPECT_EQ(std::memcmp(bytes->data(), kFirst.data(), kFirst.size()), 0);
  EXPECT_FALSE(registry.blobs().has(sha256(kSecond)).value());
  auto txn = registry.begin_read().value();
  EXPECT_EQ(txn.list<AdapterVersionRecord>().value().size(), 1u);
  const auto findings = registry.check(true).value();
  EXPECT_TRUE(findings.empty()) << findings[0].where << ": " << findings[0].message;
}

}  // namespace

void FullDisk::refuses_and_loses_nothing(std::int64_t blob_budget_bytes) const {
  auto registry = open(blob_budget_bytes).value();
  const Digest base = add_base(*registry);
  ASSERT_TRUE(publish(*registry, "guide", base, kFirst).ok());
  fill();
  const auto refused = publish(*registry, "guide", base, kSecond);
  ASSERT_EQ(refused.status().code(), StatusCode::kInternal);
  EXPECT_NE(refused.status().message().find("disk full"), std::string::npos)
      << refused.status().message();
  EXPECT_FALSE(registry->backup(mount_point_ + "/backup").ok());
  expect_intact(*registry);
  // Small work goes on: the records' file has its full size from the start.
  {
    auto txn = registry->begin_write().value();
    EXPECT_TRUE(txn.put(SettingRecord{"small", "work"}).ok());
    EXPECT_TRUE(txn.commit().ok());
  }
  registry.reset();

  auto again = open(blob_budget_bytes);
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  expect_intact(**again);
  make_room();
  EXPECT_TRUE(publish(**again, "guide", base, kSecond).ok());
  again->reset();
  EXPECT_TRUE(open(blob_budget_bytes).value()->blobs().has(sha256(kSecond)).value());
}

TEST_F(FullDisk, ChunksInTheStoreAreRefusedNothingIsLostAndTheRegistryStillOpens) {
  refuses_and_loses_nothing(1 << 30);
}

TEST_F(FullDisk, ChunksInFilesAreRefusedNothingIsLostAndTheRegistryStillOpens) {
  refuses_and_loses_nothing(0);
}

TEST_F(FullDisk, ANewRegistryIsRefusedAndOpensOnceThereIsRoom) {
  fill();
  const auto refused = open(1 << 30);
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("disk full"), std::string::npos)
      << refused.status().message();
  make_room();
  const auto opened = open(1 << 30);
  EXPECT_TRUE(opened.ok()) << opened.status().to_string();
}

}  // namespace tandem::storage
