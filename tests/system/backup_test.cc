// One object's backup and its restore into another registry, both coordinators running, as a user
// does it with the CLI.
#include "protocol/base/str.h"
#include "storage/file_io.h"
#include "storage/manifest.h"
#include "tests/support/tiny_model.h"
#include "tests/system/platform.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

class ObjectBackup : public testing::Test {
 protected:
  static std::unique_ptr<Platform> start() {
    auto platform = std::make_unique<Platform>(
        std::vector<std::string>{"--dtype", "f32", "--threads", "1", "--kv-bytes-max", "8MiB",
                                 "--memory-bytes-max", "64MiB"});
    platform->start_coordinator();
    platform->start_worker();
    return platform;
  }
  /// A base model, a finished job with one checkpoint and an evaluation set, and its adapter.
  static void SetUpTestSuite() {
    source_ = start();
    target_ = start();
    write_tiny_model(file("model"), 7);
    write_tiny_dataset(file("train.jsonl"), 16, 8);
    write_tiny_dataset(file("eval.jsonl"), 4, 9);
    run(*source_, {"model", "add", "tiny", file("model")});
    run(*source_, {"train", "--model", "tiny", "--data", file("train.jsonl"), "--eval-data",
                   file("eval.jsonl"), "--adapter", "guide", "--max-steps", "4", "--save-steps",
                   "2", "--max-length", "128", "--follow"});
    job_ = shown(*source_, {"job", "list"})["jobs"][0]["job"];
    ASSERT_TRUE(eventually(60'000, [] {
      return shown(*source_, {"job", "show", job_})["state"] == "done";
    })) << shown(*source_, {"job", "show", job_}).dump(1);
    for (const std::string& object : {std::string("tiny"), std::string("guide"), job_})
      run(*source_, {"registry", "backup", file("backup-" + object), "--object", object});
  }
  static void TearDownTestSuite() {
    source_.reset();
    target_.reset();
  }

  static std::string file(const std::string& name) { return source_->directory() + "/" + name; }
  static void run(const Platform& platform, const std::vector<std::string>& arguments) {
    const auto output = platform.cli(arguments);
    ASSERT_EQ(output.code, 0) << output.out << output.err;
  }
  static Json shown(const Platform& platform, std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "--json");
    Json json = Json::parse(platform.cli(arguments).out, nullptr, false);
    return json.is_object() ? json : Json::object();
  }
  static void expect(const std::vector<std::string>& arguments, int code,
                     const std::vector<std::string>& words) {
    const auto output = target_->cli(arguments);
    EXPECT_EQ(output.code, code) << output.out << output.err;
    for (const auto& word : words)
      EXPECT_NE(output.err.find(word), std::string::npos)
          << "no \"" << word << "\" in: " << output.err;
  }
  /// A copy of a backup, to be damaged.
  static std::string copy(const std::string& backup, const std::string& name) {
    fs::copy(file(backup), file(name), fs::copy_options::recursive);
    return file(name);
  }
  static void replace(const std::string& path, const std::string& from, const std::string& to) {
    std::ifstream in(path, std::ios::binary);
    std::string text((std::istreambuf_iterator<char>(in)), {});
    const auto at = text.find(from);
    ASSERT_NE(at, std::string::npos) << path;
    std::ofstream(path, std::ios::binary | std::ios::trunc) << text.replace(at, from.size(), to);
  }

  static std::unique_ptr<Platform> source_, target_;
  static std::string job_;
};
std::unique_ptr<Platform> ObjectBackup::source_, ObjectBackup::target_;
std::string ObjectBackup::job_;

// In the order in which they stand: a target that lacks the base first.

TEST_F(ObjectBackup, AnAdapterWithoutItsBaseIsRefusedAndSaysWhatIsMissing) {
  expect({"registry", "restore", file("backup-guide")}, 3, {"guide", "base model"});
  expect({"registry", "restore", file("backup-" + job_)}, 3, {job_, "base model"});
}

TEST_F(ObjectBackup, EveryObjectComesBackWithItsDigestAndAJobGoesOnToTheSameBits) {
  run(*target_, {"registry", "restore", file("backup-tiny"), "--name", "renamed"});
  EXPECT_EQ(shown(*target_, {"model", "show", "renamed"})["digest"],
            shown(*source_, {"model", "show", "tiny"})["digest"]);
  run(*target_, {"registry", "restore", file("backup-tiny")});  // again, under a name of its own
  EXPECT_EQ(shown(*target_, {"model", "show", "tiny"})["digest"],
            shown(*target_, {"model", "show", "renamed"})["digest"]);
  run(*target_, {"model", "rm", "tiny"});
  run(*target_, {"registry", "restore", file("backup-guide")});
  const Json adapter = shown(*source_, {"adapter", "show", "guide"});
  EXPECT_EQ(shown(*target_, {"adapter", "show", "guide"})["digest"], adapter["digest"]);
  run(*target_, {"registry", "restore", file("backup-guide")});  // again: nothing new
  EXPECT_EQ(shown(*target_, {"adapter", "show", "guide"})["version"], 1);
  run(*target_, {"registry", "restore", file("backup-guide"), "--name", "other"});
  EXPECT_EQ(shown(*target_, {"adapter", "show", "other"})["digest"], adapter["digest"]);

  run(*target_, {"registry", "restore", file("backup-" + job_)});
  run(*target_, {"registry", "restore", file("backup-" + job_)});  // again: nothing new
  const Json restored = shown(*target_, {"job", "show", job_});
  ASSERT_EQ(restored.value("state", ""), "paused");
  ASSERT_EQ(restored["checkpoints"].size(), 1u);
  EXPECT_EQ(restored["checkpoints"][0]["digest"],
            shown(*source_, {"job", "show", job_})["checkpoints"][0]["digest"]);
  run(*target_, {"job", "resume", job_});
  ASSERT_TRUE(eventually(120'000, [] {
    return shown(*target_, {"job", "show", job_})["state"] == "done";
  })) << shown(*target_, {"job", "show", job_}).dump(1);
  EXPECT_EQ(shown(*target_, {"job", "show", job_})["published"], adapter["digest"]);
  run(*target_, {"registry", "check"});
  expect({"registry", "restore", file("backup-" + job_)}, 0, {});  // it has that checkpoint
}

TEST_F(ObjectBackup, WhatCannotBeBackedUpIsNamed) {
  expect({"registry", "backup", file("b1"), "--object", "nothing"}, 3,
         {"no model, adapter or job nothing"});
  expect({"registry", "backup", file("b1"), "--object", "guide@9"}, 3, {"guide has no version 9"});
  expect({"registry", "backup", file("b1"), "--object", "job-000000000000"}, 3,
         {"job-000000000000"});
  EXPECT_FALSE(fs::exists(file("b1/backup.json")));
  expect({"registry", "backup", file("backup-guide"), "--object", "renamed"}, 4,
         {"backup-guide", "holds a backup"});
}

TEST_F(ObjectBackup, ADamagedBackupIsRefusedBeforeAnythingIsVisible) {
  const std::string cut = copy("backup-guide", "cut");
  const auto blob = fs::directory_iterator(cut + "/blobs")->path();
  fs::resize_file(blob, fs::file_size(blob) - 1);
  expect({"registry", "restore", cut, "--name", "cut"}, 1, {blob.filename().string(), "damaged"});
  fs::remove(blob);
  expect({"registry", "restore", cut, "--name", "cut"}, 3, {blob.filename().string()});
  expect({"adapter", "show", "cut"}, 3, {"cut"});

  const std::string manifest = copy("backup-guide", "manifest");
  replace(fs::directory_iterator(manifest + "/manifests")->path().string(), "\"r\":", "\"R\":");
  expect({"registry", "restore", manifest, "--name", "cut"}, 1, {"damaged"});

  const std::string unfinished = copy("backup-guide", "unfinished");
  fs::remove(unfinished + "/backup.json");
  expect({"registry", "restore", unfinished}, 3, {"backup.json"});
  std::ofstream(unfinished + "/backup.json") << "{\"format\": ";
  expect({"registry", "restore", unfinished}, 1, {"backup.json"});

  const std::string newer = copy("backup-guide", "newer");
  replace(newer + "/backup.json", "\"version\": 1", "\"version\": 9");
  expect({"registry", "restore", newer}, 4, {"version 9"});
}

TEST_F(ObjectBackup, AModelsFilesStayInsideTheBackupAndHaveItsDigest) {
  run(*target_, {"adapter", "rm", "other"});
  auto fresh = start();
  const auto restore = [&](const std::string& folder) {
    return fresh->cli({"registry", "restore", folder});
  };
  const std::string outside = copy("backup-tiny", "outside");
  replace(outside + "/backup.json", "\"config.json\"", "\"../../config.json\"");
  auto output = restore(outside);
  EXPECT_EQ(output.code, 2) << output.err;
  EXPECT_NE(output.err.find("outside"), std::string::npos) << output.err;
  const std::string changed = copy("backup-tiny", "changed");
  write_tiny_model(file("changed/model"), 8);  // other weights
  output = restore(changed);
  EXPECT_EQ(output.code, 1) << output.err;
  EXPECT_NE(output.err.find("digest"), std::string::npos) << output.err;
  EXPECT_EQ(fresh->cli({"model", "show", "tiny"}).code, 3);
  EXPECT_EQ(restore(file("backup-tiny")).code, 0);
}

TEST_F(ObjectBackup, AJobThatCannotBeRestoredLeavesNoDataBehind) {
  auto fresh = start();
  run(*fresh, {"registry", "restore", file("backup-tiny")});
  const std::string cut = copy("backup-" + job_, "cut-job"), odd = copy("backup-" + job_, "odd");
  fs::remove(fs::directory_iterator(cut + "/manifests")->path());
  replace(odd + "/backup.json", "\"learning_rate\"", "\"learning_rat\"");
  for (const std::string& folder : {cut, odd}) {
    EXPECT_NE(fresh->cli({"registry", "restore", folder}).code, 0) << folder;
    EXPECT_TRUE(shown(*fresh, {"data", "list"})["data"].empty()) << folder;
  }
  run(*fresh, {"registry", "restore", file("backup-" + job_)});
  EXPECT_NE(fresh->cli({"registry", "restore", odd}).code, 0);
  EXPECT_EQ(shown(*fresh, {"data", "list"})["data"].size(), 2u) << "the job that is there has them";
}

TEST_F(ObjectBackup, ACheckpointWhoseManifestIsLargerThanACallComesBackAndIsBackedUpAgain) {
  const std::string folder = copy("backup-" + job_, "large");
  const fs::path small = fs::directory_iterator(folder + "/manifests")->path();
  auto manifest = storage::parse_manifest(storage::read_file(small.string(), 16 << 20).value());
  ASSERT_TRUE(manifest.ok()) << manifest.status().message();
  const auto piece = manifest->tensors.back();
  while (manifest->tensors.size() < 20'000) {  // as of many blocks over many ranks
    manifest->tensors.push_back(piece);
    manifest->tensors.back().name += str(".piece.", manifest->tensors.size());
  }
  const std::string text = storage::encode_manifest(*manifest).value();
  ASSERT_GT(static_cast<std::int64_t>(text.size()), protocol::kFrameBytesMax);
  fs::remove(small);
  const std::string digest = storage::manifest_digest(text).hex();
  std::ofstream(folder + "/manifests/" + digest, std::ios::binary) << text;
  const std::string before = small.filename().string();
  for (int i = 0; i < 2; ++i) replace(folder + "/backup.json", before, digest);

  auto fresh = start();
  run(*fresh, {"registry", "restore", file("backup-tiny")});
  run(*fresh, {"registry", "restore", folder});
  EXPECT_EQ(shown(*fresh, {"job", "show", job_})["checkpoints"].at(0)["digest"], digest);
  run(*fresh, {"registry", "backup", file("large-again"), "--object", job_});
  EXPECT_EQ(storage::read_file(file("large-again/manifests/" + digest), 16 << 20).value(), text);
  run(*fresh, {"registry", "check"});
}

TEST_F(ObjectBackup, ANameIsForABackupOfOneObject) {
  run(*source_, {"registry", "backup", file("whole")});
  expect({"registry", "restore", file("whole"), "--name", "x"}, 4, {"whole", "--name"});
}

}  // namespace
}  // namespace tandem::test
