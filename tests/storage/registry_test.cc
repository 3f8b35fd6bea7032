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
  Result<Resolved> resolve(const std::string& reference) {
    return registry_->begin_read()->resolve(reference);
  }
  Digest current(const std::string& name) { return resolve(name).value().digest; }
  std::string findings() {
    std::string text;
    const auto found = registry_->check().value();
    for (const Finding& finding : found) text += finding.where + ": " + finding.message + "\n";
    return text;
  }
  void put_job(const std::string& id, JobState state = JobState::kRunning,
               std::uint64_t epoch = 1) {
    JobRecord job;
    job.id = id;
    job.state = state;
    job.epoch = epoch;
    job.model = base_;
    auto txn = registry_->begin_write().value();
    ASSERT_TRUE(txn.put(job).ok());
    ASSERT_TRUE(txn.commit().ok());
  }
  Status checkpoint(const std::string& job, std::int64_t step, std::uint64_t epoch = 1) {
    const std::string data = "state " + std::to_string(step);
    TANDEM_RETURN_IF_ERROR(registry_->blobs().put_chunk(sha256(data), as_bytes(data)));
    const std::string manifest = manifest_of(ManifestKind::kCheckpoint, "{}", data);
    auto txn = registry_->begin_write().value();
    TANDEM_RETURN_IF_ERROR(
        txn.put_checkpoint({job, step, epoch, manifest_digest(manifest), 0}, manifest));
    return txn.commit();
  }
  ManualClock clock_;
  std::unique_ptr<Registry> registry_;
  Digest base_;
};

TEST_F(RegistryTest, PublishWritesManifestVersionAndAliasTogether) {
  const auto record = publish(*registry_, "support", base_, "v1");
  ASSERT_TRUE(record.ok()) << record.status().to_string();
  EXPECT_EQ(record->version, 1u);
  const Resolved resolved = resolve("support").value();
  EXPECT_EQ(resolved.kind, Resolved::Kind::kAdapter);
  EXPECT_EQ(resolved.digest, record->digest);
  EXPECT_EQ(resolved.base_model, base_);
  EXPECT_EQ(registry_->begin_read()->manifest(record->digest)->kind, ManifestKind::kAdapter);
  EXPECT_EQ(findings(), "");
}

TEST_F(RegistryTest, APublishThatIsNotCommittedLeavesNothing) {
  put_data(*registry_, "v1");
  {
    auto txn = registry_->begin_write().value();
    ASSERT_TRUE(
        txn.publish_adapter({"support", adapter_manifest(base_, "v1"), base_, "", 0, ""}).ok());
    EXPECT_TRUE(txn.resolve("support").ok());  // visible to itself
  }
  EXPECT_EQ(resolve("support").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(findings(), "");
}

TEST_F(RegistryTest, PublishRefusesBytesThatAreNotThere) {
  auto txn = registry_->begin_write().value();
  const auto record =
      txn.publish_adapter({"support", adapter_manifest(base_, "absent"), base_, "", 0, ""});
  EXPECT_EQ(record.status().code(), StatusCode::kInvalid);
  EXPECT_NE(record.status().message().find("1 of 1 chunks are not in the blob store"),
            std::string::npos);
}

TEST_F(RegistryTest, PublishRefusesAnotherBaseAndAnotherKind) {
  put_data(*registry_, "v1");
  auto txn = registry_->begin_write().value();
  EXPECT_EQ(txn.publish_adapter({"a", adapter_manifest(sha256("other"), "v1"), base_, "", 0, ""})
                .status()
                .code(),
            StatusCode::kInvalid);
  EXPECT_EQ(txn.publish_adapter(
                   {"a", manifest_of(ManifestKind::kCheckpoint, "{}", "v1"), base_, "", 0, ""})
                .status()
                .code(),
            StatusCode::kInvalid);
  EXPECT_EQ(txn.publish_adapter({"a", "{}", base_, "", 0, ""}).status().code(),
            StatusCode::kInvalid);
}

TEST_F(RegistryTest, VersionsRiseAndTheAliasFollows) {
  const Digest one = publish(*registry_, "support", base_, "v1")->digest;
  const Digest two = publish(*registry_, "support", base_, "v2")->digest;
  EXPECT_EQ(current("support"), two);
  EXPECT_EQ(current("support@1"), one);
  EXPECT_EQ(current("support@2"), two);
  EXPECT_EQ(resolve("support@3").status().code(), StatusCode::kNotFound);
  const auto alias = registry_->begin_read()->get<AliasRecord>("support").value();
  ASSERT_EQ(alias.history.size(), 2u);
  EXPECT_EQ(alias.history[0].reason, "publish");
}

TEST_F(RegistryTest, ARepeatedPublishAnswersAsTheFirstDid) {
  put_job("job-1");
  const auto first = publish(*registry_, "support", base_, "v1", "job-1", 1);
  const auto again = publish(*registry_, "support", base_, "v1", "job-1", 1);
  EXPECT_EQ(again->version, first->version);
  EXPECT_EQ(registry_->begin_read()->adapter_versions("support")->size(), 1u);
}

TEST_F(RegistryTest, AnOldEpochPublishesNothing) {
  put_job("job-1", JobState::kRunning, 2);
  EXPECT_EQ(publish(*registry_, "support", base_, "v1", "job-1", 1).status().code(),
            StatusCode::kConflict);
  EXPECT_EQ(checkpoint("job-1", 5, 1).code(), StatusCode::kConflict);
  EXPECT_EQ(publish(*registry_, "support", base_, "v1", "no-job", 1).status().code(),
            StatusCode::kNotFound);
  EXPECT_EQ(resolve("support").status().code(), StatusCode::kNotFound);
}

TEST_F(RegistryTest, RollbackGoesBackOneVersionAtATimeAndPins) {
  const Digest one = publish(*registry_, "support", base_, "v1")->digest;
  const Digest two = publish(*registry_, "support", base_, "v2")->digest;
  publish(*registry_, "support", base_, "v3").value();
  auto rollback = [&] {
    auto txn = registry_->begin_write().value();
    const auto alias = txn.rollback_alias("support");
    return alias.ok() ? txn.commit() : alias.status();
  };
  ASSERT_TRUE(rollback().ok());
  EXPECT_EQ(current("support"), two);
  publish(*registry_, "support", base_, "v4").value();
  EXPECT_EQ(current("support"), two);  // pinned
  EXPECT_TRUE(resolve("support@4").ok());
  ASSERT_TRUE(rollback().ok());
  EXPECT_EQ(current("support"), one);
  EXPECT_EQ(rollback().code(), StatusCode::kRefused);
  EXPECT_EQ(findings(), "");
}

TEST_F(RegistryTest, AnAliasPointsAtAnyAdaptersVersion) {
  const Digest one = publish(*registry_, "support", base_, "v1")->digest;
  publish(*registry_, "support", base_, "v2").value();
  auto txn = registry_->begin_write().value();
  ASSERT_TRUE(txn.set_alias("prod", "support@1", false).ok());
  EXPECT_EQ(txn.set_alias("base", "support@1", false).status().code(),
            StatusCode::kConflict);  // a model's name
  EXPECT_EQ(txn.set_alias("x@1", "support@1", false).status().code(), StatusCode::kInvalid);
  EXPECT_EQ(txn.set_alias("prod", "nothing", false).status().code(), StatusCode::kNotFound);
  ASSERT_TRUE(txn.commit().ok());
  EXPECT_EQ(current("prod"), one);
  EXPECT_EQ(publish(*registry_, "prod", base_, "v9").status().code(), StatusCode::kConflict);
  auto again = registry_->begin_write().value();
  EXPECT_EQ(again.remove_adapter_version("support", 1).code(), StatusCode::kConflict);
  EXPECT_EQ(again.remove_adapter_version("support", 2).code(), StatusCode::kConflict);
  EXPECT_TRUE(again.remove_alias("prod").ok());
  EXPECT_TRUE(again.remove_adapter_version("support", 1).ok());
  EXPECT_TRUE(
      again.remove_adapter_version("support", 2).ok());  // the last one takes its own alias along
  ASSERT_TRUE(again.commit().ok());
  EXPECT_EQ(resolve("support").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(findings(), "");
}

TEST_F(RegistryTest, ResolvesDigestsByTwelveDigitsOrMore) {
  const Digest digest = publish(*registry_, "support", base_, "v1")->digest;
  EXPECT_EQ(resolve(digest.hex()).value().digest, digest);
  EXPECT_EQ(resolve(digest.hex().substr(0, 12)).value().digest, digest);
  EXPECT_EQ(resolve(digest.hex().substr(0, 13)).value().kind, Resolved::Kind::kAdapter);
  EXPECT_EQ(resolve(base_.hex().substr(0, 12)).value().kind, Resolved::Kind::kModel);
  EXPECT_EQ(resolve(digest.hex().substr(0, 11)).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(resolve(std::string(12, '0')).status().code(), StatusCode::kNotFound);
}

TEST_F(RegistryTest, AnUnknownNameGetsTheNearestOne) {
  publish(*registry_, "support", base_, "v1").value();
  EXPECT_NE(resolve("suport").status().message().find("did you mean support?"), std::string::npos);
  for (const char* bad :
       {"", "support@", "support@0", "support@x", "support@1@2", "support@99999999999"})
    EXPECT_EQ(resolve(bad).status().code(), StatusCode::kInvalid) << bad;
}

TEST(RegistryNames, AllowSlashesAndColonsAndReserveTheRest) {
  for (const std::string good : {"a", "HuggingFaceTB/SmolLM2-135M", "team:support_v2", "a.b-c"})
    EXPECT_TRUE(validate_name(good, "model").ok()) << good;
  for (const std::string& bad :
       {std::string(), std::string("a@b"), std::string("-a"), std::string("a b"),
        std::string("a//b"), std::string("a/../b"), std::string("a/"), std::string("a\nb"),
        std::string("a\0b", 3), std::string("caf\xc3\xa9"), std::string("0123456789ab"),
        std::string(kNameBytesMax + 1, 'a')})
    EXPECT_EQ(validate_name(bad, "model").code(), StatusCode::kInvalid) << bad;
}

TEST_F(RegistryTest, OneNameSpaceForModelsAndAdapters) {
  EXPECT_EQ(publish(*registry_, "base", base_, "v1").status().code(), StatusCode::kConflict);
  publish(*registry_, "support", base_, "v1").value();
  const std::string manifest = manifest_of(ManifestKind::kModel, "{}", "x");
  ModelRecord model;
  model.name = "support";
  model.digest = manifest_digest(manifest);
  auto txn = registry_->begin_write().value();
  EXPECT_EQ(txn.add_model(model, manifest).code(), StatusCode::kConflict);
  model.name = "base";  // the same name, other content
  EXPECT_EQ(txn.add_model(model, manifest).code(), StatusCode::kConflict);
  model.name = "second";
  model.digest = sha256("lie");
  EXPECT_EQ(txn.add_model(model, manifest).code(), StatusCode::kInvalid);
}

TEST_F(RegistryTest, AModelInUseIsNotRemoved) {
  publish(*registry_, "support", base_, "v1").value();
  put_job("job-1");
  auto txn = registry_->begin_write().value();
  EXPECT_EQ(txn.remove_model("base").code(), StatusCode::kConflict);
  ASSERT_TRUE(txn.remove_adapter_version("support", 1).ok());
  EXPECT_NE(txn.remove_model("base").message().find("job-1"), std::string::npos);
  JobRecord job = txn.get<JobRecord>("job-1").value();
  job.state = JobState::kDone;
  ASSERT_TRUE(txn.put(job).ok());
  EXPECT_TRUE(txn.remove_model("base").ok());
}

TEST_F(RegistryTest, SubmittingTwiceWithOneKeyMakesOneJob) {
  JobRecord job;
  job.id = "job-1";
  job.tenant = "t";
  job.idempotency_key = "key";
  auto submit = [&](const std::string& id, const std::string& request) {
    auto txn = registry_->begin_write().value();
    job.id = id;
    auto result = txn.submit_job(job, sha256(request));
    if (result.ok()) {
      EXPECT_TRUE(txn.commit().ok());
    }
    return result;
  };
  EXPECT_TRUE(submit("job-1", "train")->second);
  const auto again = submit("job-2", "train");
  EXPECT_FALSE(again->second);
  EXPECT_EQ(again->first.id, "job-1");
  EXPECT_EQ(submit("job-3", "train something else").status().code(), StatusCode::kConflict);
  job.tenant = "another";
  EXPECT_TRUE(submit("job-4", "train")->second);
  job.idempotency_key.clear();
  EXPECT_EQ(submit("job-4", "train").status().code(), StatusCode::kConflict);  // the id itself
  EXPECT_EQ(registry_->begin_read()->list<JobRecord>()->size(), 2u);
}

TEST_F(RegistryTest, KeepsTheNewestEventsOfAJob) {
  put_job("job-1");
  put_job("job-10");
  auto txn = registry_->begin_write().value();
  for (std::size_t i = 1; i <= kJobEventsMax + 10; ++i)
    ASSERT_EQ(txn.append_event({"job-1", 0, 0, "info", "step", "m", ""}).value(), i);
  EXPECT_EQ(txn.append_event({"job-10", 0, 0, "info", "step", "m", ""}).value(), 1u);
  const auto events = txn.list<JobEventRecord>(name_prefix("job-1")).value();
  EXPECT_EQ(events.size(), kJobEventsMax);
  EXPECT_EQ(events.front().seq, 11u);
  const auto page =
      txn.list<JobEventRecord>(name_prefix("job-1"), 3, event_key("job-1", 100)).value();
  ASSERT_EQ(page.size(), 3u);
  EXPECT_EQ(page.front().seq, 101u);
}

TEST_F(RegistryTest, KeepsTheTwoNewestCheckpointsAndResolvesThem) {
  put_job("job-1");
  for (int step : {10, 20, 300}) ASSERT_TRUE(checkpoint("job-1", step).ok());
  auto txn = registry_->begin_read().value();
  const auto all = txn.list<CheckpointRecord>(name_prefix("job-1")).value();
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].step, 20);
  EXPECT_EQ(txn.latest_checkpoint("job-1").value()->step, 300);
  EXPECT_EQ(txn.resolve("job-1@latest")->digest, all[1].manifest);
  EXPECT_EQ(txn.resolve("job-1@latest")->base_model, base_);
  EXPECT_EQ(txn.resolve("job-1@step-20")->digest, all[0].manifest);
  EXPECT_EQ(txn.resolve("job-1@step-10").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(txn.latest_checkpoint("job-2").value(), std::nullopt);
}

TEST_F(RegistryTest, RemovesAJobWithAllThatIsItsOwn) {
  put_job("job-1");
  ASSERT_TRUE(checkpoint("job-1", 1).ok());
  auto txn = registry_->begin_write().value();
  ASSERT_TRUE(txn.append_event({"job-1", 0, 0, "info", "step", "m", ""}).ok());
  EXPECT_EQ(txn.remove_job("job-1").code(), StatusCode::kConflict);
  JobRecord job = txn.get<JobRecord>("job-1").value();
  job.state = JobState::kFailed;
  ASSERT_TRUE(txn.put(job).ok());
  ASSERT_TRUE(txn.remove_job("job-1").ok());
  ASSERT_TRUE(txn.commit().ok());
  EXPECT_EQ(findings(), "");
  EXPECT_TRUE(registry_->begin_read()->list<JobEventRecord>()->empty());
}

TEST_F(RegistryTest, GarbageCollectionKeepsWhatAnythingNeeds) {
  put_job("job-1");
  const Digest one = publish(*registry_, "support", base_, "v1")->digest;
  publish(*registry_, "support", base_, "v2").value();
  for (int step : {1, 2, 3}) ASSERT_TRUE(checkpoint("job-1", step).ok());
  {
    auto txn = registry_->begin_write().value();
    ASSERT_TRUE(
        txn.put(ResultRecord{sha256("old"), one, 0, clock_.unix_ms() + 1, 1, "p", "t"}).ok());
    ASSERT_TRUE(txn.put(ResultRecord{sha256("ever"), one, 0, 0, 1, "p", "t"}).ok());
    ASSERT_TRUE(txn.remember("t", "k", sha256("r"), "x").ok());
    ASSERT_TRUE(txn.remove_adapter_version("support", 1).ok());
    ASSERT_TRUE(txn.commit().ok());
  }
  auto result = registry_->gc().value();
  EXPECT_EQ(result.manifests_removed, 0);  // all are young
  clock_.advance(kIdempotencyKeepMs);
  result = registry_->gc().value();
  EXPECT_EQ(result.manifests_removed, 2);  // support@1 and the checkpoint of step 1
  EXPECT_EQ(result.results_removed, 1);
  EXPECT_EQ(result.idempotency_removed, 1);
  EXPECT_EQ(result.blobs.removed, 2);
  EXPECT_EQ(findings(), "");
  EXPECT_EQ(resolve(one.hex()).status().code(), StatusCode::kNotFound);
  EXPECT_TRUE(registry_->blob(sha256("v2")).ok());
  EXPECT_EQ(registry_->blob(sha256("v1")).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(registry_->blob(current("support")).value().size(),
            adapter_manifest(base_, "v2").size());  // a manifest by its digest
}

TEST_F(RegistryTest, DataSetsAreFoundByNameAndDigest) {
  put_data(*registry_, "rows");
  const std::string manifest = manifest_of(ManifestKind::kDataset, "{}", "rows");
  auto txn = registry_->begin_write().value();
  ASSERT_TRUE(
      txn.add_dataset({manifest_digest(manifest), "train.jsonl", 1, 4, 5, "messages"}, manifest)
          .ok());
  ASSERT_TRUE(txn.commit().ok());
  auto read = registry_->begin_read().value();
  EXPECT_EQ(read.resolve_dataset("train.jsonl")->rows, 1);
  EXPECT_EQ(read.resolve_dataset(manifest_digest(manifest).hex().substr(0, 12))->bytes, 4);
  EXPECT_EQ(read.resolve_dataset("other").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(read.resolve(manifest_digest(manifest).hex()).status().code(),
            StatusCode::kNotFound);  // nothing to generate with
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
  clock.advance(kIdempotencyKeepMs);
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
  EXPECT_EQ(txn.resolve("support")->digest, big);
  EXPECT_EQ(txn.resolve("support@1")->digest, small);
  EXPECT_EQ(txn.resolve("support@3").status().code(), StatusCode::kNotFound);
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
  EXPECT_EQ(registry->begin_read()->resolve("support")->digest, first);
  EXPECT_TRUE(registry->check()->empty());
}

}  // namespace
}  // namespace tandem::storage
