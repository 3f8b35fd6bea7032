#include "storage/manifest.h"
#include "storage/safetensors.h"
#include "tests/coordinator/core_harness.h"

#include <gtest/gtest.h>

namespace tandem::coordinator {
namespace {

using protocol::JobAck;
using protocol::StartJob;

struct PublishTest : testing::Test {
  PublishTest() {
    base = h.add_model("base");
    h.add_data("rows");
    h.engine(0);
    id = h.submit();
    epoch = h.to_engine<StartJob>(0).at(0).epoch;
    h.beat(0, {{id, epoch, 0}});
    h.to_engine<JobAck>(0);
  }
  void publish(const std::string& text) {
    h.from_engine(0, protocol::Publish{id, epoch, 10, text, R"({"loss":1})"});
  }
  void end() { h.from_engine(0, protocol::JobEnded{id, epoch, {}, 10, "{}"}); }
  CoreHarness h;
  Digest base;
  JobId id;
  Epoch epoch = 0;
};

TEST_F(PublishTest, ManifestVersionAliasAndJobAreOneTransactionAndTheAckComesAfterIt) {
  const std::string text = h.manifest(ManifestKind::kAdapter, base, "weights");
  const std::size_t before = h.persists().size();
  publish(text);
  ASSERT_EQ(h.persists().size(), before + 1);
  int manifests = 0, versions = 0, aliases = 0, jobs = 0;
  for (const Write& write : h.persists().back().writes) {
    manifests += std::holds_alternative<ManifestRecord>(write);
    versions += std::holds_alternative<AdapterVersionRecord>(write);
    aliases += std::holds_alternative<AliasRecord>(write);
    jobs += std::holds_alternative<Job>(write);
  }
  EXPECT_EQ(manifests + versions + aliases, 3);
  EXPECT_GE(jobs, 1);
  EXPECT_TRUE(std::holds_alternative<Persist>(h.last().front()));
  const auto ack = h.to_engine<JobAck>(0).at(0);
  EXPECT_TRUE(ack.status.ok());
  EXPECT_EQ(ack.name, "tuned@1");
  EXPECT_EQ(ack.digest, sha256(text));
  EXPECT_EQ(h.to_engine<protocol::Announce>(0).at(0).adapter, sha256(text));
}

TEST_F(PublishTest, ARepeatMakesNoSecondVersion) {
  const std::string text = h.manifest(ManifestKind::kAdapter, base, "weights");
  publish(text);
  publish(text);
  end();
  publish(text);
  EXPECT_EQ(h.tables().adapters.size(), 1u);
  for (const JobAck& ack : h.to_engine<JobAck>(0))
    EXPECT_TRUE(ack.status.ok()) << ack.of << ": " << ack.status.message();
  EXPECT_EQ(h.job(id).state, JobState::kSucceeded);
}

TEST_F(PublishTest, AChunkThatIsNotDurableKeepsTheAdapterInvisible) {
  publish(h.manifest(ManifestKind::kAdapter, base, "never uploaded", false));
  EXPECT_TRUE(h.tables().adapters.empty());
  EXPECT_TRUE(h.tables().aliases.empty());
  EXPECT_EQ(h.to_engine<JobAck>(0).at(0).status.code(), StatusCode::kNotFound);
}

TEST_F(PublishTest, AnAdapterOfAnotherBaseIsRefused) {
  publish(h.manifest(ManifestKind::kAdapter, sha256("another base"), "weights"));
  EXPECT_TRUE(h.tables().adapters.empty());
  EXPECT_EQ(h.to_engine<JobAck>(0).at(0).status.code(), StatusCode::kInvalid);
}

TEST_F(PublishTest, ANameThatAModelHasByThenEndsTheJobWithTheReason) {
  const Incarnation engine = h.job(id).engine;
  h.add_model("tuned");
  h.engine(0, engine, {{id, epoch, 9}});
  publish(h.manifest(ManifestKind::kAdapter, base, "weights"));
  const Status refused = h.to_engine<JobAck>(0).back().status;
  EXPECT_EQ(refused.code(), StatusCode::kRefused) << "a conflict means that another has the job";
  h.from_engine(0, protocol::JobEnded{id, epoch, refused, 10, "{}"});
  EXPECT_EQ(h.job(id).state, JobState::kFailed);
  EXPECT_NE(h.job(id).error.find("named tuned"), std::string::npos) << h.job(id).error;
  const auto resumed = h.call("job.resume", {{"job", id.value}}, "r");
  EXPECT_EQ(resumed.status.code(), StatusCode::kConflict) << "it would fail again";
}

TEST_F(PublishTest, AFullDiskMakesNothingVisibleAcknowledgesNothingAndTheRepeatSucceeds) {
  const std::string text = h.manifest(ManifestKind::kAdapter, base, "weights");
  h.fail_commits(1);
  publish(text);
  EXPECT_TRUE(h.tables().adapters.empty());
  EXPECT_TRUE(h.tables().aliases.empty());
  EXPECT_TRUE(h.job(id).published.empty());
  EXPECT_TRUE(h.to_engine<JobAck>(0).empty());
  publish(text);
  EXPECT_EQ(h.to_engine<JobAck>(0).at(0).name, "tuned@1");
}

TEST_F(PublishTest, AnEpochThatEndedWhileTheManifestWasReadDoesNotPublish) {
  const std::string text = h.manifest(ManifestKind::kAdapter, base, "weights");
  h.hold_work = true;
  publish(text);
  h.engine(0);  // the process was replaced meanwhile: another epoch
  h.release_work();
  EXPECT_TRUE(h.tables().adapters.empty());
  EXPECT_GT(h.job(id).epoch, epoch);
}

TEST_F(PublishTest, AnEnginesDeathAfterThePublishLeavesTheJobDone) {
  publish(h.manifest(ManifestKind::kAdapter, base, "weights"));
  h.engine(0);
  EXPECT_EQ(h.job(id).state, JobState::kSucceeded);
  EXPECT_TRUE(h.to_engine<StartJob>(0).empty());
}

TEST_F(PublishTest, OldCheckpointsGoWhenMoreThanTheLimitAreThere) {
  for (std::int64_t step = 1; step <= 5; ++step)
    h.from_engine(
        0, protocol::CheckpointReady{
               id, epoch, step, h.manifest(ManifestKind::kCheckpoint, base, str("state ", step))});
  EXPECT_EQ(h.tables().checkpoints.size(), 2u);
  EXPECT_EQ(h.tables().latest_checkpoint(id)->step, 5);
  for (const auto& [key, checkpoint] : h.tables().checkpoints)
    EXPECT_FALSE(h.tables().manifest(checkpoint.manifest).empty());
}

TEST_F(PublishTest, RollbackIsANewVersionWithTheOldDigestAndHistoryStays) {
  const std::string first = h.manifest(ManifestKind::kAdapter, base, "one");
  publish(first);
  end();
  const JobId second = h.submit();
  const auto start = h.to_engine<StartJob>(0).back();
  h.from_engine(0, protocol::Publish{second, start.epoch, 10,
                                     h.manifest(ManifestKind::kAdapter, base, "two"), "{}"});
  EXPECT_EQ(h.tables().current_adapter("tuned")->version, 2u);
  const auto reply = h.call("adapter.rollback", {{"alias", "tuned"}}, "r");
  ASSERT_TRUE(reply.status.ok()) << reply.status.message();
  EXPECT_EQ(h.tables().current_adapter("tuned")->version, 3u);
  EXPECT_EQ(h.tables().current_adapter("tuned")->digest, sha256(first));
  EXPECT_EQ(h.tables().aliases.at("tuned").history.size(), 3u);
  const auto again = h.call("adapter.rollback", {{"alias", "tuned"}}, "r");
  EXPECT_EQ(again.result_json, reply.result_json);
  EXPECT_EQ(h.tables().adapters.size(), 3u) << "a repeated call with its key did it twice";
}

TEST_F(PublishTest, EachRollbackGoesOneVersionFurtherBackAndPastRemovedOnes) {
  std::vector<Digest> digests;
  const auto publish_next = [&] {
    const JobId job = digests.empty() ? id : h.submit();
    const Epoch at = digests.empty() ? epoch : h.to_engine<StartJob>(0).back().epoch;
    const std::string manifest =
        h.manifest(ManifestKind::kAdapter, base, str("weights ", digests.size()));
    h.from_engine(0, protocol::Publish{job, at, 10, manifest, "{}"});
    h.from_engine(0, protocol::JobEnded{job, at, {}, 10, "{}"});
    digests.push_back(sha256(manifest));
  };
  int calls = 0;
  const auto rollback = [&](const std::string& alias) {
    return h.call("adapter.rollback", {{"alias", alias}}, str("r", ++calls)).status;
  };
  const auto current = [&](const std::string& alias) {
    return h.tables().aliases.at(alias).digest;
  };
  for (int i = 0; i < 4; ++i) publish_next();
  for (const char* version : {"tuned@2", "tuned@3", "tuned@4"})
    h.call("adapter.alias", {{"alias", "live"}, {"target", version}}, str("a", version));
  ASSERT_TRUE(rollback("tuned").ok());
  EXPECT_EQ(current("tuned"), digests[2]);
  ASSERT_TRUE(rollback("tuned").ok());
  EXPECT_EQ(current("tuned"), digests[1]) << "it went forward again";
  publish_next();
  ASSERT_TRUE(rollback("tuned").ok());
  EXPECT_EQ(current("tuned"), digests[1]);
  ASSERT_TRUE(rollback("tuned").ok());
  EXPECT_EQ(current("tuned"), digests[0]);
  EXPECT_EQ(rollback("tuned").code(), StatusCode::kNotFound);
  // An alias of other names' versions goes back among these, and stays one.
  const std::size_t versions = h.tables().adapters.size();
  ASSERT_TRUE(h.call("adapter.rm", {{"adapter", "tuned@3"}}, "rm").status.ok());
  ASSERT_TRUE(rollback("live").ok());
  EXPECT_EQ(current("live"), digests[1]) << "version 3 is removed";
  EXPECT_EQ(h.tables().aliases.at("live").adapter, "tuned");
  EXPECT_EQ(h.tables().adapters.size(), versions - 1);
}

struct PublishModelTest : testing::Test {
  PublishModelTest() {
    h.add_model("base");
    h.add_data("rows");
    h.agent(0);
    h.engine(0);
    id = h.submit({{"adapter", ""}, {"name", "made"}, {"train", {{"method", "full"}}}});
    start = h.to_agent<StartJob>(0).at(0);
    h.gang(0, start.gang, {{id, start.epoch, 1}});
    h.to_gang<JobAck>(0);
  }
  /// A folder's files as a gang uploads them, and the manifest that names them.
  std::string upload(const std::string& config = R"({"model_type":"llama"})") {
    const std::vector<float> values(4, 1.0f);
    const storage::TensorInfo tensor{"w", DType::kF32, {2, 2}, std::as_bytes(std::span(values))};
    const auto weights = storage::encode_safetensors(std::span(&tensor, 1), {}).value();
    storage::Manifest manifest;
    manifest.kind = ManifestKind::kModel;
    for (const auto& [name, bytes] : {std::pair<std::string, std::span<const std::byte>>{
                                          "config.json", std::as_bytes(std::span(config))},
                                      {"model.safetensors", weights}}) {
      manifest.tensors.push_back(
          storage::describe_tensor(name, "u8", {static_cast<std::int64_t>(bytes.size())}, bytes));
      EXPECT_TRUE(h.registry().blobs().put_chunk(manifest.tensors.back().chunks.at(0), bytes).ok());
    }
    return storage::encode_manifest(manifest).value();
  }
  void publish(const std::string& text) {
    h.from_gang(0, protocol::Publish{id, start.epoch, 10, text, R"({"train_loss_last":1})"});
  }
  CoreHarness h;
  JobId id;
  StartJob start;
};

TEST_F(PublishModelTest, ManifestModelAndJobAreOneTransactionAndKnowTheirOrigin) {
  const std::size_t before = h.persists().size();
  publish(upload());
  ASSERT_EQ(h.persists().size(), before + 1);
  int manifests = 0, models = 0, jobs = 0;
  for (const Write& write : h.persists().back().writes) {
    manifests += std::holds_alternative<ManifestRecord>(write);
    models += std::holds_alternative<ModelRecord>(write);
    jobs += std::holds_alternative<Job>(write);
  }
  EXPECT_EQ(manifests, 1);
  EXPECT_EQ(models, 1);
  EXPECT_GE(jobs, 1);
  const ModelRecord& model = h.tables().models.at("made");
  const auto ack = h.to_gang<JobAck>(0).at(0);
  EXPECT_TRUE(ack.status.ok()) << ack.status.message();
  EXPECT_EQ(ack.digest, model.digest);
  EXPECT_EQ(model.job, id.value);
  EXPECT_EQ(model.base_model, h.job(id).model);
  EXPECT_TRUE(model.path.empty());
  publish(upload());  // a repeat
  EXPECT_TRUE(h.to_gang<JobAck>(0).at(0).status.ok());
  h.from_gang(0, protocol::JobEnded{id, start.epoch, {}, 10, "{}"});
  EXPECT_EQ(h.job(id).state, JobState::kSucceeded);
  h.restart();
  EXPECT_EQ(h.tables().models.at("made").files.size(), 2u);
  EXPECT_EQ(h.tables().models.at("made").files[0].chunks.size(), 1u);
  EXPECT_TRUE(h.registry().check().value().empty());
}

TEST_F(PublishModelTest, NobodyTakesItsNameMeanwhile) {
  const std::string text = h.manifest(ManifestKind::kAdapter, h.job(id).model, "weights");
  const auto import = [&](const std::string& name) {
    return h
        .call("adapter.import",
              {{"name", name},
               {"model", "base"},
               {"manifest", text},
               {"metadata", nlohmann::json::object()}},
              name)
        .status;
  };
  EXPECT_EQ(import("made").code(), StatusCode::kConflict);
  ASSERT_TRUE(import("other").ok());
  const auto alias = h.call("adapter.alias", {{"alias", "made"}, {"target", "other"}}, "a").status;
  EXPECT_EQ(alias.code(), StatusCode::kConflict);
  EXPECT_NE(alias.message().find(id.value), std::string::npos) << alias.message();
}

TEST_F(PublishModelTest, WhatIsNoModelMakesNothingVisible) {
  publish(upload(R"({"model_type":"mamba"})"));
  EXPECT_EQ(h.to_gang<JobAck>(0).at(0).status.code(), StatusCode::kRefused);
  EXPECT_FALSE(h.tables().models.contains("made"));
}

TEST_F(PublishModelTest, ItsCheckpointsAreRefusedToRequestsWithTheNameOfTheModel) {
  h.from_gang(
      0, protocol::CheckpointReady{
             id, start.epoch, 4, h.manifest(ManifestKind::kCheckpoint, h.job(id).model, "state")});
  h.from_client("c", protocol::ClientHello{{}, "test"});
  h.generate("r1", id.value + "@latest", "hello");
  const auto chunks = h.to_client<protocol::GenerateChunk>("c");
  ASSERT_FALSE(chunks.empty());
  EXPECT_EQ(chunks.back().status.code(), StatusCode::kRefused);
  EXPECT_NE(chunks.back().status.message().find("made"), std::string::npos);
  const auto manifest = h.call("adapter.manifest", {{"adapter", id.value + "@step-4"}});
  EXPECT_TRUE(manifest.status.ok()) << "a backup reads it: " << manifest.status.message();
}

}  // namespace
}  // namespace tandem::coordinator
