#include "storage/registry.h"

#include "storage/file_io.h"
#include "storage/lmdb_store.h"
#include "storage/memory_store.h"
#include "tests/storage/registry_fixture.h"
#include "tests/storage/scratch.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace tandem::storage {
namespace {

class RegistryTest : public testing::Test {
 protected:
  void SetUp() override {
    registry_ = Registry::in_memory(clock_);
    base_ = add_base(*registry_);
  }
  std::string findings() {
    std::string text;
    const auto found = registry_->check().value();
    for (const Finding& finding : found) text += finding.where + ": " + finding.message + "\n";
    return text;
  }
  void checkpoint(const std::string& job, std::int64_t step) {
    const std::string data = "state " + std::to_string(step);
    ASSERT_TRUE(registry_->blobs().put_chunk(sha256(data), as_bytes(data)).ok());
    const std::string manifest = manifest_of(ManifestKind::kCheckpoint, "{}", data);
    auto txn = registry_->begin_write().value();
    ASSERT_TRUE(
        put_manifest(txn, ManifestKind::kCheckpoint, manifest, base_, clock_.unix_ms()).ok());
    ASSERT_TRUE(txn.put(CheckpointRecord{job, step, 1, manifest_digest(manifest), 0}).ok());
    ASSERT_TRUE(txn.commit().ok());
  }
  ManualClock clock_;
  std::unique_ptr<Registry> registry_;
  Digest base_;
};

TEST_F(RegistryTest, WhatIsNotCommittedLeavesNothing) {
  {
    auto txn = registry_->begin_write().value();
    ASSERT_TRUE(txn.put(SettingRecord{"a", "1"}).ok());
    EXPECT_EQ(txn.find<SettingRecord>("a")->value().value, "1");  // visible to itself
  }
  EXPECT_FALSE(registry_->begin_read()->find<SettingRecord>("a")->has_value());
  EXPECT_EQ(findings(), "");
}

TEST_F(RegistryTest, ListsOneNamesRecordsInTheOrderOfTheirNumbers) {
  auto txn = registry_->begin_write().value();
  for (const std::uint64_t seq : {300u, 2u, 10u})
    ASSERT_TRUE(txn.put(JobEventRecord{"job-1", seq, 0, "info", "step", "m", ""}).ok());
  ASSERT_TRUE(txn.put(JobEventRecord{"job-10", 1, 0, "info", "step", "m", ""}).ok());
  std::vector<std::uint64_t> seqs;
  const auto events = txn.list<JobEventRecord>(name_prefix("job-1")).value();
  for (const JobEventRecord& event : events) seqs.push_back(event.seq);
  EXPECT_EQ(seqs, (std::vector<std::uint64_t>{2, 10, 300}));
}

TEST_F(RegistryTest, GarbageCollectionKeepsWhatAnythingNeeds) {
  const std::int64_t now = clock_.unix_ms();
  const Digest one = publish(*registry_, "support", base_, "v1", now)->digest;
  const Digest two = publish(*registry_, "support", base_, "v2", now)->digest;
  for (int step : {1, 2, 3}) checkpoint("job-1", step);
  {
    auto txn = registry_->begin_write().value();
    JobRecord job;
    job.id = "job-1";
    ASSERT_TRUE(txn.put(job).ok());
    ASSERT_TRUE(txn.put(ResultRecord{sha256("old"), one, 0, now + 1, 1, "p", "t"}).ok());
    ASSERT_TRUE(txn.put(ResultRecord{sha256("ever"), one, 0, 0, 1, "p", "t"}).ok());
    ASSERT_TRUE(txn.remove<AdapterVersionRecord>(adapter_key("support", 1)).ok());
    ASSERT_TRUE(txn.remove<CheckpointRecord>(checkpoint_key("job-1", 1)).ok());
    ASSERT_TRUE(txn.commit().ok());
  }
  auto result = registry_->gc().value();
  EXPECT_EQ(result.manifests_removed, 0);  // all are young
  clock_.advance(kManifestSpareMs);
  result = registry_->gc().value();
  EXPECT_EQ(result.manifests_removed, 2);  // support@1 and the checkpoint of step 1
  EXPECT_EQ(result.results_removed, 1);
  EXPECT_EQ(result.blobs.removed, 2);
  EXPECT_EQ(findings(), "");
  EXPECT_EQ(registry_->begin_read()->manifest(one).status().code(), StatusCode::kNotFound);
  EXPECT_TRUE(registry_->blob(sha256("v2")).ok());
  EXPECT_EQ(registry_->blob(sha256("v1")).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(registry_->blob(two).value().size(),
            adapter_manifest(base_, "v2").size());  // a manifest by its digest
}

// -- check, schema ------------------------------------------------------------

TEST(RegistryCheck, NamesEveryDamagedValueAndBrokenReference) {
  ManualClock clock;
  auto store = std::make_unique<MemoryStore>(registry_tables());
  auto blob_store = std::make_unique<MemoryStore>(BlobStore::tables());
  MemoryStore *records = store.get(), *chunks = blob_store.get();
  auto registry =
      Registry::create(std::move(store),
                       BlobStore::open(std::move(blob_store), "", 1 << 20, clock).value(), clock)
          .value();
  const Digest base = add_base(*registry);
  const auto adapter = publish(*registry, "support", base, "v1").value();
  ASSERT_TRUE(registry->check()->empty());

  ASSERT_TRUE(chunks->flip_bit("chunks", digest_key(sha256("v1")), 390));
  auto findings = registry->check().value();
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].where, "blobs " + sha256("v1").hex());
  EXPECT_NE(findings[0].message.find("needed by adapters support@1"), std::string::npos)
      << findings[0].message;
  EXPECT_TRUE(registry->check(false)->empty());  // only the deep one reads bytes
  EXPECT_EQ(registry->blob(sha256("v1")).status().code(), StatusCode::kCorrupt);

  ASSERT_TRUE(records->flip_bit("manifests", digest_key(adapter.digest), 999));
  findings = registry->check(false).value();
  ASSERT_EQ(findings.size(), 2u);  // the value, and the version that needs it
  EXPECT_NE(findings[0].message.find("checksum"), std::string::npos);
  EXPECT_EQ(findings[0].where, "manifests " + adapter.digest.hex());
  EXPECT_NE(findings[1].where.find("adapters support"), std::string::npos);
  EXPECT_EQ(registry->begin_read()->manifest(adapter.digest).status().code(), StatusCode::kCorrupt);

  auto txn = registry->begin_write().value();
  ASSERT_TRUE(txn.put(AliasRecord{"lost", "nobody", 3, sha256("x"), false, 0, {}}).ok());
  ASSERT_TRUE(txn.put(CheckpointRecord{"no-job", 1, 1, sha256("y"), 0}).ok());
  ASSERT_TRUE(txn.commit().ok());
  std::string text;
  findings = registry->check(false).value();
  for (const Finding& finding : findings) text += finding.where + ": " + finding.message + "\n";
  EXPECT_NE(text.find("aliases lost: nobody@3 is absent"), std::string::npos) << text;
  EXPECT_NE(text.find("the job no-job is absent"), std::string::npos) << text;
}

TEST(RegistryCheck, GarbageCollectionStopsAtAManifestItCannotRead) {
  ManualClock clock;
  auto store = std::make_unique<MemoryStore>(registry_tables());
  MemoryStore* records = store.get();
  auto registry =
      Registry::create(
          std::move(store),
          BlobStore::open(std::make_unique<MemoryStore>(BlobStore::tables()), "", 1 << 20, clock)
              .value(),
          clock)
          .value();
  const auto adapter = publish(*registry, "support", add_base(*registry), "v1").value();
  ASSERT_TRUE(records->flip_bit("manifests", digest_key(adapter.digest), 999));
  clock.advance(kManifestSpareMs);
  EXPECT_EQ(registry->gc().status().code(), StatusCode::kCorrupt);
  EXPECT_TRUE(registry->blobs().has(sha256("v1")).value());
}

TEST(RegistrySchema, MigratesAfterABackupAndRefusesANewerOne) {
  Scratch scratch;
  ManualClock clock;
  int backups = 0;
  auto open = [&](const std::vector<Migration>& migrations) -> Status {
    auto store = open_lmdb_store(
        {scratch / "registry", "registry", registry_tables(), 8 << 20, false, true});
    auto blobs =
        BlobStore::open(std::make_unique<MemoryStore>(BlobStore::tables()), "", 1 << 20, clock)
            .value();
    return Registry::create(std::move(*store), std::move(blobs), clock, migrations,
                            [&]() -> Status {
                              ++backups;
                              return {};
                            })
        .status();
  };
  const Migration good = [](WriteTxn& txn) {
    return txn.put("settings", "migrated",
                   protocol::encode_record(SettingRecord{"migrated", "yes"}));
  };
  const Migration bad = [](WriteTxn& txn) -> Status {
    TANDEM_RETURN_IF_ERROR(txn.put("settings", "half", "done"));
    return internal_error("gave up");
  };
  ASSERT_TRUE(open({}).ok());
  EXPECT_EQ(open({bad}).code(), StatusCode::kInternal);
  EXPECT_EQ(backups, 1);
  ASSERT_TRUE(open({}).ok());  // nothing was changed: the old program still opens it
  ASSERT_TRUE(open({good}).ok());
  EXPECT_EQ(backups, 2);
  ASSERT_TRUE(open({good}).ok());
  EXPECT_EQ(backups, 2);
  const Status older = open({});
  EXPECT_EQ(older.code(), StatusCode::kRefused);
  EXPECT_NE(older.message().find("has schema 2, this program understands up to 1"),
            std::string::npos)
      << older.message();
}

// -- on disk ------------------------------------------------------------------

class RegistryOnDisk : public testing::Test {
 protected:
  std::unique_ptr<Registry> open(const std::string& name) {
    return Registry::open(options(name), clock_).value();
  }
  RegistryOptions options(const std::string& name) {
    RegistryOptions options;
    options.directory = scratch_ / name;
    options.registry_map_bytes = 8 << 20;
    options.blob_map_bytes = 64 << 20;
    options.blob_budget_bytes = 1000;
    return options;
  }
  Scratch scratch_;
  SystemClock clock_;
};

TEST_F(RegistryOnDisk, ASecondCoordinatorIsRefused) {
  auto first = open("data");
  const auto second = Registry::open(options("data"), clock_);
  EXPECT_EQ(second.status().code(), StatusCode::kConflict);
}

TEST_F(RegistryOnDisk, BackupAndRestoreGiveTheSameRegistry) {
  auto registry = open("data");
  const Digest base = add_base(*registry);
  const std::string large(5000, 'l');  // goes to a file
  const Digest small = publish(*registry, "support", base, "v1")->digest,
               big = publish(*registry, "support", base, large)->digest;
  ASSERT_TRUE(registry->backup(scratch_ / "backup").ok());
  publish(*registry, "support", base, "after the backup").value();
  EXPECT_EQ(registry->backup(scratch_ / "backup").code(), StatusCode::kConflict);

  ASSERT_TRUE(Registry::restore(scratch_ / "backup", scratch_ / "restored").ok());
  EXPECT_EQ(Registry::restore(scratch_ / "backup", scratch_ / "restored").code(),
            StatusCode::kConflict);
  auto restored = open("restored");
  EXPECT_TRUE(restored->check()->empty());
  auto txn = restored->begin_read().value();
  EXPECT_EQ(txn.find<AliasRecord>("support")->value().digest, big);
  const auto versions = txn.list<AdapterVersionRecord>().value();
  ASSERT_EQ(versions.size(), 2u);
  EXPECT_EQ(versions[0].digest, small);
  EXPECT_EQ(restored->blob(sha256(large))->size(), 5000u);
}

TEST_F(RegistryOnDisk, ADamagedBackupIsFoundOutWhenItIsRestored) {
  auto registry = open("data");
  const std::string inside(600, 'i'), file(5000, 'f');
  const Digest base = add_base(*registry);
  for (const std::string& weights : {inside, file})
    publish(*registry, "support", base, weights).value();
  const auto damage = [&](const std::string& part, const std::string& bytes,
                          const std::string& name) {
    ASSERT_TRUE(registry->backup(scratch_ / name).ok());
    for (const auto& entry :
         std::filesystem::recursive_directory_iterator(scratch_ / (name + "/blobs/" + part))) {
      if (!entry.is_regular_file()) continue;
      std::string text = *read_file(entry.path().string(), 1 << 30);
      const auto at = text.find(bytes);
      if (at == std::string::npos) continue;
      text[at + 7] ^= 1;
      std::ofstream(entry.path(), std::ios::binary | std::ios::trunc) << text;
    }
    const Status status = Registry::restore(scratch_ / name, scratch_ / (name + "-restored"));
    EXPECT_EQ(status.code(), StatusCode::kCorrupt) << part << ": " << status.message();
    EXPECT_NE(status.message().find("problem"), std::string::npos) << status.message();
  };
  damage("lmdb", inside, "one");
  damage("files", file, "two");
}

TEST_F(RegistryOnDisk, AnUnfinishedBackupIsNotRestored) {
  auto registry = open("data");
  ASSERT_TRUE(registry->backup(scratch_ / "backup").ok());
  std::filesystem::remove(scratch_ / "backup/backup.json");
  EXPECT_EQ(Registry::restore(scratch_ / "backup", scratch_ / "restored").code(),
            StatusCode::kNotFound);
}

TEST_F(RegistryOnDisk, AFullMapRefusesThePublishAndTheRegistryStillServes) {
  auto small = options("data");
  small.registry_map_bytes = 1 << 20;
  auto registry = Registry::open(small, clock_).value();
  const Digest base = add_base(*registry);
  const Digest first = publish(*registry, "support", base, "v1")->digest;
  Status full;
  for (int i = 0; full.ok() && i < 100; ++i) {
    auto txn = registry->begin_write().value();
    full = txn.put(
        ResultRecord{sha256(std::to_string(i)), first, 0, 0, 0, std::string(50'000, 'x'), ""});
    if (full.ok()) full = txn.commit();
  }
  EXPECT_EQ(full.code(), StatusCode::kInternal);
  EXPECT_NE(full.message().find("the map is full"), std::string::npos);
  EXPECT_EQ(registry->begin_read()->find<AliasRecord>("support")->value().digest, first);
  EXPECT_TRUE(registry->check()->empty());
}

}  // namespace
}  // namespace tandem::storage
