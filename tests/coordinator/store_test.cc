// Records through a real registry, model files, and the bulk socket.
#include "coordinator/bulk_server.h"
#include "coordinator/model_files.h"
#include "coordinator/stored_model.h"
#include "protocol/codec.h"
#include "protocol/inproc_transport.h"
#include "storage/manifest.h"
#include "storage/mapped_file.h"
#include "storage/safetensors.h"
#include "tests/coordinator/core_harness.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <fstream>

namespace tandem::coordinator {
namespace {

namespace fs = std::filesystem;

TEST(RegistryStore, AJobComesBackAsItWas) {
  ManualClock clock;
  auto registry = storage::Registry::in_memory(clock);
  RegistryStore store(*registry);
  Job job;
  job.id = JobId("job-1");
  job.order = 7;
  job.tenant = "t";
  job.spec_json = "{\"a\":1}";
  job.state = JobState::kPausing;
  job.model = sha256("m");
  job.dataset = sha256("d");
  job.eval_dataset = sha256("e");
  job.dataset_manifest = sha256("dm");
  job.adapter = "x";
  job.epoch = 3;
  job.worker = WorkerId("w");
  job.engine = 0xffff'ffff'ffff'fff1u;
  job.attempts = 2;
  job.own_failures = 1;
  job.requeue_after_stop = true;
  job.step = 4;
  job.best_step = 9;
  job.error_code = "internal";
  job.error = "why \xff not UTF-8";
  job.metrics_json = "{\"loss\":1}";
  job.estimate_json = "{\"fits\":true}";
  job.ranks = 4;
  job.members = {WorkerId("h/cpu0"), WorkerId("h/cpu1")};
  job.published = sha256("p");
  job.published_version = 2;
  job.events = 11;
  job.progress_seq = 5;
  ASSERT_TRUE(store.commit({job}).ok());
  const Snapshot snapshot = store.load().value();
  const Job& back = snapshot.tables.jobs.at(job.id);
  EXPECT_EQ(back.order, job.order);
  EXPECT_EQ(back.state, job.state);
  EXPECT_EQ(back.dataset, job.dataset);
  EXPECT_EQ(back.eval_dataset, job.eval_dataset);
  EXPECT_EQ(back.dataset_manifest, job.dataset_manifest);
  EXPECT_EQ(back.engine, job.engine);
  EXPECT_EQ(back.ranks, job.ranks);
  EXPECT_EQ(back.members, job.members);
  EXPECT_EQ(back.attempts, job.attempts);
  EXPECT_EQ(back.own_failures, job.own_failures);
  EXPECT_TRUE(back.requeue_after_stop);
  EXPECT_EQ(back.best_step, job.best_step);
  EXPECT_EQ(back.metrics_json, job.metrics_json);
  EXPECT_EQ(back.estimate_json, job.estimate_json);
  EXPECT_EQ(back.published, job.published);
  EXPECT_EQ(back.events, job.events);
  EXPECT_EQ(back.progress_seq, job.progress_seq);
}

TEST(Tables, UndoTakesBackExactlyWhatWasApplied) {
  Tables tables;
  const AliasRecord one{"a", "a", 1, sha256("1"), false, 1, {}};
  AliasRecord two = one;
  two.version = 2;
  EXPECT_EQ(tables.apply(one).size(), 1u);
  const auto undo = tables.apply(two);
  EXPECT_EQ(tables.aliases.at("a").version, 2u);
  for (const Write& write : undo) tables.apply(write);
  EXPECT_EQ(tables.aliases.at("a").version, 1u);
  for (const Write& write : tables.apply(EraseAlias{"a"})) tables.apply(write);
  EXPECT_EQ(tables.aliases.at("a").version, 1u);
}

struct ModelFilesTest : testing::Test {
  ModelFilesTest() {
    std::string name = "/tmp/tandem-model-XXXXXX";
    folder = ::mkdtemp(name.data());
    write("config.json", R"({"model_type":"llama","hidden_size":2,"_name_or_path":"x"})");
    tensor(1.0f);
  }
  ~ModelFilesTest() override { fs::remove_all(folder); }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder + "/" + name) << text;
  }
  void tensor(float value) const {
    const std::vector<float> values(4, value);
    const storage::TensorInfo info{"w", DType::kF32, {2, 2}, std::as_bytes(std::span(values))};
    ASSERT_TRUE(
        storage::write_safetensors(folder + "/model.safetensors", std::span(&info, 1), {}).ok());
  }
  [[nodiscard]] Result<ModelHashed> hash(const std::vector<std::string>& roots = {}) const {
    return hash_model({"m", folder, false}, roots, 1);
  }
  std::string folder;
};

TEST_F(ModelFilesTest, TheDigestFollowsTheWeightsAndTheSettingsAndNothingElse) {
  const auto first = hash();
  ASSERT_TRUE(first.ok()) << first.status().message();
  EXPECT_EQ(first->model.family, "llama");
  EXPECT_EQ(first->model.digest, sha256(first->manifest));
  write("config.json", R"({"_name_or_path":"renamed","model_type":"llama","hidden_size":2})");
  EXPECT_EQ(hash()->model.digest, first->model.digest);
  write("config.json", R"({"model_type":"llama","hidden_size":2,"rope_theta":5})");
  EXPECT_NE(hash()->model.digest, first->model.digest);
  write("config.json", R"({"model_type":"llama","hidden_size":2})");
  EXPECT_EQ(hash()->model.digest, first->model.digest);
  tensor(2.0f);
  EXPECT_NE(hash()->model.digest, first->model.digest);
}

TEST_F(ModelFilesTest, ModelsThatDifferInTheirGenerationDefaultsAloneAreTwo) {
  const Digest none = hash()->model.digest;
  write("generation_config.json", R"({"temperature":0.5})");
  const Digest one = hash()->model.digest;
  write("generation_config.json", R"({"temperature":0.6})");
  EXPECT_NE(one, none);
  EXPECT_NE(hash()->model.digest, one);
}

TEST_F(ModelFilesTest, ModelsOfEveryFamilyAreTakenAndShowWhereTheirContextEnds) {
  struct Case {
    const char *family, *settings;
    std::int64_t context, window;  // 0: not shown
  };
  for (const Case& c :
       {Case{"llama", R"("x":1)", 500, 0}, Case{"qwen2", R"("sliding_window":9)", 500, 0},
        Case{"qwen2", R"("sliding_window":9,"use_sliding_window":true,"max_window_layers":0)", 9,
             9},
        Case{"qwen3", R"("sliding_window":9,"use_sliding_window":true)", 500, 0},
        Case{"qwen3",
             R"("sliding_window":9,"use_sliding_window":true,"layer_types":["sliding_attention"])",
             9, 9},
        Case{"mistral", R"("sliding_window":9)", 9, 9},
        Case{"mistral", R"("sliding_window":null)", 500, 0},
        Case{"mistral", R"("sliding_window":700)", 500, 0}}) {
    write("config.json",
          str(R"({"num_hidden_layers":2,"max_position_embeddings":500,"model_type":")", c.family,
              "\",", c.settings, "}"));
    const auto hashed = hash();
    ASSERT_TRUE(hashed.ok()) << hashed.status().message();
    EXPECT_EQ(hashed->model.family, c.family);
    const auto summary = nlohmann::json::parse(hashed->model.summary_json);
    EXPECT_EQ(summary.at("context"), c.context) << c.family << " " << c.settings;
    EXPECT_EQ(summary.value("sliding_window", 0), c.window) << c.family << " " << c.settings;
  }
}

TEST_F(ModelFilesTest, AFamilyThatIsNotSupportedAndAPathOutsideTheRootsAreRefused) {
  EXPECT_EQ(hash({"/usr"}).status().code(), StatusCode::kRefused);
  EXPECT_TRUE(hash({"/tmp"}).ok());
  write("config.json", R"({"model_type":"mamba"})");
  const Status family = hash().status();
  EXPECT_EQ(family.code(), StatusCode::kRefused);
  EXPECT_NE(family.message().find("mamba"), std::string::npos);
  EXPECT_EQ(hash_model({"m", folder + "/none", false}, {}, 1).status().code(),
            StatusCode::kNotFound);
}

TEST_F(ModelFilesTest, FilesOfRegisteredModelsAreServedWhileTheyAreWhatWasHashed) {
  const auto hashed = hash();
  ServedFiles files;
  ModelRecord model = hashed->model;
  model.name = "m";
  const ModelFile& file = model.files.back();
  EXPECT_EQ(files.read(file.root, 0, 0).status().code(), StatusCode::kNotFound);
  files.add(model);
  const auto piece = files.read(file.root, 2, 5);
  ASSERT_TRUE(piece.ok()) << piece.status().message();
  EXPECT_EQ(piece->bytes.size(), 5u);
  EXPECT_EQ(piece->total_bytes, file.bytes);
  tensor(3.0f);
  EXPECT_EQ(files.read(file.root, 0, 0).status().code(), StatusCode::kCorrupt);
  files.remove("m");
  EXPECT_EQ(files.read(file.root, 0, 0).status().code(), StatusCode::kNotFound);
}

TEST_F(ModelFilesTest, AFileThatSeveralModelsHaveIsServedWhileAnyOfThemStillHasIt) {
  ModelRecord one = hash()->model, two;
  one.name = "one";
  const std::string copy = folder + "-copy";
  fs::copy(folder, copy);
  two = hash_model({"two", copy, false}, {}, 1)->model;
  two.name = "two";
  const Digest root = one.files.back().root;
  for (const bool removed : {false, true}) {
    ServedFiles files;
    files.add(one);
    files.add(two);
    if (removed) {
      files.remove("one");
    } else {
      fs::remove(folder + "/" + one.files.back().path);
    }
    const auto piece = files.read(root, 0, 0);
    EXPECT_TRUE(piece.ok()) << piece.status().message();
    files.remove("two");
    EXPECT_FALSE(files.read(root, 0, 0).ok());
  }
  fs::remove_all(copy);
}

TEST_F(ModelFilesTest, AFolderInTheBlobStoreIsTheSameModelAndIsReadOutChunkByChunk) {
  SystemClock clock;
  auto registry = storage::Registry::in_memory(clock);
  const auto big = [&](std::size_t bytes) {  // more than one chunk, tensors across its border
    const std::vector<float> a(bytes / 4, 1.5f), b(7, 2.5f);
    const std::vector<storage::TensorInfo> infos{
        {"a", DType::kF32, {static_cast<std::int64_t>(a.size())}, std::as_bytes(std::span(a))},
        {"b", DType::kF32, {7}, std::as_bytes(std::span(b))}};
    ASSERT_TRUE(storage::write_safetensors(folder + "/model.safetensors", infos, {}).ok());
  };
  big((16u << 20) + 4096);
  write("tokenizer.json", "{}");
  const auto on_disk = hash();
  ASSERT_TRUE(on_disk.ok()) << on_disk.status().message();
  storage::Manifest manifest;
  manifest.kind = ManifestKind::kModel;
  std::map<std::string, std::vector<std::byte>> contents;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const auto file = storage::MappedFile::open(entry.path()).value();
    const std::string name = entry.path().filename();
    contents[name].assign(file->bytes().begin(), file->bytes().end());
    manifest.tensors.push_back(storage::describe_tensor(
        name, "u8", {static_cast<std::int64_t>(file->bytes().size())}, file->bytes()));
    for (std::size_t i = 0; i < manifest.tensors.back().chunks.size(); ++i) {
      const std::size_t at = i * kDigestLeafBytes;
      const auto piece = file->bytes().subspan(
          at, std::min<std::size_t>(kDigestLeafBytes, file->bytes().size() - at));
      ASSERT_TRUE(registry->blobs().put_chunk(manifest.tensors.back().chunks[i], piece).ok());
    }
  }
  const auto text = storage::encode_manifest(manifest);
  const auto stored = describe_stored_model(*text, registry->blobs());
  ASSERT_TRUE(stored.ok()) << stored.status().message();
  EXPECT_EQ(stored->model.digest, on_disk->model.digest);
  EXPECT_EQ(stored->manifest, on_disk->manifest);
  EXPECT_EQ(stored->model.bytes, on_disk->model.bytes);

  ModelRecord model = stored->model;
  model.name = "m";
  ServedFiles files(&registry->blobs());
  files.add(model);
  for (const ModelFile& file : model.files) {
    std::vector<std::byte> read;
    for (std::int64_t at = 0; at < file.bytes; at += kDigestLeafBytes) {
      const auto piece = files.read(file.root, at, kDigestLeafBytes);
      ASSERT_TRUE(piece.ok()) << piece.status().message();
      EXPECT_EQ(piece->total_bytes, file.bytes);
      read.insert(read.end(), piece->bytes.begin(), piece->bytes.end());
    }
    EXPECT_EQ(read, contents.at(file.path)) << file.path;
    const auto rest = files.read(file.root, 1, INT64_MAX);
    ASSERT_TRUE(rest.ok()) << rest.status().message();
    EXPECT_EQ(static_cast<std::int64_t>(rest->bytes.size()),
              std::min(file.bytes, kDigestLeafBytes) - 1);
  }
  // A file that belongs to no folder, and a chunk that is not there.
  manifest.tensors.push_back(
      storage::describe_tensor("run.sh", "u8", {2}, std::as_bytes(std::span("x", 2))));
  EXPECT_EQ(
      describe_stored_model(*storage::encode_manifest(manifest), registry->blobs()).status().code(),
      StatusCode::kInvalid);
  auto empty = storage::Registry::in_memory(clock);
  EXPECT_EQ(describe_stored_model(*text, empty->blobs()).status().code(), StatusCode::kNotFound);
}

class BulkServerTest : public testing::Test {
 protected:
  SystemClock clock;
  std::unique_ptr<storage::Registry> registry = storage::Registry::in_memory(clock);
  protocol::InprocNetwork network{clock};
  ServedFiles files;
  BulkServer server{network.listen("bulk").value(), *registry, files};
  std::unique_ptr<protocol::ClientEndpoint> client = network.connect("bulk", "peer");
};

TEST_F(BulkServerTest, StoresWhatMatchesItsDigestAndRefusesTheRestOfTheSameBatchAlone) {
  const std::string good = "good bytes", bad = "bad bytes";
  const auto bytes = [](const std::string& text) {
    const auto span = std::as_bytes(std::span(text));
    return protocol::Bytes(span.begin(), span.end());
  };
  const auto send = [&](const protocol::BulkRequest& request, const protocol::Bytes& payload) {
    while (!client->send(protocol::encode(request), payload).ok()) (void)client->receive(1);
  };
  send(protocol::BlobPut{1, sha256(good), "pin", {}}, bytes(good));
  send(protocol::BlobPut{2, sha256("other"), "pin", {}}, bytes(bad));
  send(protocol::BlobHas{3, {sha256(good), sha256("other")}}, {});
  send(protocol::BlobGet{4, sha256(good), 0, 0}, {});
  std::map<std::uint64_t, protocol::BlobReply> replies;
  protocol::Bytes got;
  for (TimeMs i = 0; i < scaled_ms(500) && replies.size() < 4; ++i)
    if (auto envelope = client->receive(20)) {
      auto reply = protocol::decode_blob_reply(envelope->frame).value();
      if (reply.call == 4) got = envelope->payload;
      replies[reply.call] = reply;
    }
  ASSERT_EQ(replies.size(), 4u);
  EXPECT_TRUE(replies[1].status.ok()) << replies[1].status.message();
  EXPECT_FALSE(replies[2].status.ok());
  EXPECT_EQ(replies[3].has, (std::vector<bool>{true, false}));
  EXPECT_EQ(got, bytes(good));
}

TEST_F(BulkServerTest, WhatIsAnsweredIsThereAndADamagedBlobAmongManyIsRefusedByName) {
  constexpr std::size_t kMessages = 24, kParts = 8, kPartBytes = 300'000, kBad = 11;
  std::vector<std::vector<Digest>> digests(kMessages);
  std::map<std::uint64_t, protocol::BlobReply> replies;
  const auto take = [&](TimeMs wait_ms) {
    const auto envelope = client->receive(wait_ms);
    if (!envelope) return;
    auto reply = protocol::decode_blob_reply(envelope->frame).value();
    if (reply.status.ok()) {  // not only known: there at the moment of its answer
      EXPECT_TRUE(registry->blobs().missing(digests[reply.call]).value().empty()) << reply.call;
    }
    replies[reply.call] = std::move(reply);
  };
  for (std::size_t m = 0; m < kMessages; ++m) {
    protocol::BlobPut put{m, {}, "pin", {}};
    protocol::Bytes payload;
    for (std::size_t p = 0; p < kParts; ++p) {
      const protocol::Bytes part(kPartBytes, static_cast<std::byte>(m * kParts + p));
      digests[m].push_back(sha256(part));
      put.parts.push_back({digests[m].back(), static_cast<std::int64_t>(kPartBytes)});
      payload.insert(payload.end(), part.begin(), part.end());
    }
    if (m == kBad) payload[5 * kPartBytes + 7] ^= std::byte{1};
    while (!client->send(protocol::encode(put), payload).ok()) take(1);
  }
  for (TimeMs i = 0; i < scaled_ms(500) && replies.size() < kMessages; ++i) take(20);
  ASSERT_EQ(replies.size(), kMessages);
  for (const auto& [call, reply] : replies)
    EXPECT_EQ(reply.status.ok(), call != kBad) << call << ": " << reply.status.message();
  EXPECT_EQ(replies[kBad].status.code(), StatusCode::kInvalid);
  EXPECT_NE(replies[kBad].status.message().find(digests[kBad][5].short_hex()), std::string::npos)
      << replies[kBad].status.message();
  EXPECT_EQ(registry->blobs().missing(digests[kBad]).value().size(), kParts);
}

}  // namespace
}  // namespace tandem::coordinator
