// The worker's side of the bulk socket against the coordinator's.
#include "worker/runtime/bulk_client.h"

#include "coordinator/bulk_server.h"
#include "coordinator/model_files.h"
#include "protocol/inproc_transport.h"
#include "storage/registry.h"
#include "worker/runtime/model_files.h"

#include <gtest/gtest.h>

#include <sys/stat.h>

#include <algorithm>
#include <deque>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

namespace tandem::worker::runtime {
namespace {

struct BulkClientTest : testing::Test {
  std::vector<std::byte> bytes(std::size_t count, int seed) {
    std::vector<std::byte> made(count);
    for (std::size_t i = 0; i < count; ++i)
      made[i] = static_cast<std::byte>((i * 31 + i / 251 + static_cast<std::size_t>(seed)) & 255);
    return made;
  }
  BlobView keep(std::size_t count) {
    kept.push_back(bytes(count, static_cast<int>(kept.size())));
    return {sha256(kept.back()), kept.back()};
  }

  SystemClock clock;
  protocol::InprocNetwork network{clock};
  std::unique_ptr<storage::Registry> registry = storage::Registry::in_memory(clock);
  coordinator::ServedFiles files;
  coordinator::BulkServer server{network.listen("bulk").value(), *registry, files};
  BulkClient client{network.connect("bulk", "worker"), clock};
  std::deque<std::vector<std::byte>> kept;
};

TEST_F(BulkClientTest, AnUploadArrivesWholeInFewMessagesWhileItIsMade) {
  const BlobView first = keep(10);
  ASSERT_TRUE(client.put(std::span(&first, 1), "pin", 10'000).ok());  // connected
  std::vector<BlobView> blobs;
  for (int i = 0; i < 30; ++i) blobs.push_back(keep(300'000));
  blobs.push_back(keep(3 << 20));  // alone in its message
  blobs.push_back(keep(5));
  BulkClient::Upload upload(client, "pin");
  const auto before = network.counters().sent;
  for (const BlobView& blob : blobs) upload.add(blob);
  // What was complete travels before anyone waits for the rest.
  const auto arrived = [&] { return registry->blobs().has(blobs[0].digest).value(); };
  for (TimeMs wait = 0; wait < scaled_ms(2000) && !arrived(); ++wait)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(arrived());
  EXPECT_FALSE(registry->blobs().has(blobs.back().digest).value());
  upload.send();  // the last one too, though its message took more
  for (int wait = 0; wait < 2000 && !registry->blobs().has(blobs.back().digest).value(); ++wait)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(registry->blobs().has(blobs.back().digest).value());
  const Status status = upload.finish(10'000);
  ASSERT_TRUE(status.ok()) << status.to_string();
  EXPECT_LE(network.counters().sent - before, 14u) << "seven messages and their answers";
  std::vector<Digest> digests;
  for (const BlobView& blob : blobs) digests.push_back(blob.digest);
  const auto back = client.get(digests, 10'000);
  ASSERT_TRUE(back.ok()) << back.status().to_string();
  for (std::size_t i = 0; i < blobs.size(); ++i)
    EXPECT_TRUE(std::equal((*back)[i].begin(), (*back)[i].end(), blobs[i].bytes.begin(),
                           blobs[i].bytes.end()));
}

TEST_F(BulkClientTest, WhatIsLargeAndThereAlreadyIsNotSentAgain) {
  std::vector<BlobView> blobs;
  for (int i = 0; i < 5; ++i) blobs.push_back(keep(4 << 20));
  ASSERT_TRUE(client.put(blobs, "pin", 10'000).ok());
  const auto before = network.counters().sent;
  ASSERT_TRUE(client.put(blobs, "pin", 10'000).ok());
  EXPECT_EQ(network.counters().sent - before, 2u) << "a question and its answer";
}

TEST_F(BulkClientTest, ADamagedBlobIsTheUploadsError) {
  BlobView blob = keep(1000);
  blob.digest = sha256("another");
  BulkClient::Upload upload(client, "pin");
  upload.add(blob);
  EXPECT_EQ(upload.finish(10'000).code(), StatusCode::kInvalid);
}

/// Two engines of a host, the second of which begins when the first has fetched most of a model.
TEST_F(BulkClientTest, WhoFetchesAModelBesideAnotherProcessGetsAllOfIt) {
  namespace fs = std::filesystem;
  const std::string folder = testing::TempDir() + "fetch_test";
  fs::remove_all(folder);
  fs::create_directories(folder);
  const auto content = bytes(5 * static_cast<std::size_t>(kDigestLeafBytes) + 1000, 1);
  coordinator::ModelRecord record;
  record.name = "m";
  record.path = folder + "/m.gguf";
  std::ofstream(record.path, std::ios::binary)
      .write(reinterpret_cast<const char*>(content.data()),
             static_cast<std::streamsize>(content.size()));
  struct stat info {};
  ASSERT_EQ(::stat(record.path.c_str(), &info), 0);
  coordinator::ModelFile file;
  file.root = content_root(content, 2);
  file.bytes = info.st_size;
  file.mtime_ns = info.st_mtim.tv_sec * 1'000'000'000ll + info.st_mtim.tv_nsec;
  record.files.push_back(file);
  files.add(record);
  protocol::ModelRef model;
  model.name = "m";
  model.digest = sha256("m");
  model.files.emplace_back("", file.root);

  const std::string data = folder + "/data";
  BulkClient other{network.connect("bulk", "other"), clock};
  const auto locate = [&](BulkClient& with) {
    const auto path = locate_model(model, data, with);
    ASSERT_TRUE(path.ok()) << path.status().to_string();
    std::ifstream in(*path, std::ios::binary);
    const std::string now((std::istreambuf_iterator<char>(in)), {});
    EXPECT_EQ(sha256(now), sha256(content)) << "of " << now.size() << " bytes";
  };
  std::thread first([&] { locate(client); });
  const auto most_is_there = [&] {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(data + "/cache/models", error))
      if (fs::file_size(entry.path(), error) >= 4 * kDigestLeafBytes && !error) return true;
    return false;
  };
  for (TimeMs wait = 0; wait < scaled_ms(60'000) && !most_is_there(); ++wait)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  locate(other);
  first.join();
  fs::remove_all(folder);
}

}  // namespace
}  // namespace tandem::worker::runtime
