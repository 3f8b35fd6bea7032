#include "storage/blob_store.h"

#include "storage/file_io.h"
#include "storage/lmdb_store.h"
#include "storage/memory_store.h"
#include "tests/storage/scratch.h"

#include <gtest/gtest.h>

namespace tandem::storage {
namespace {

std::vector<std::byte> bytes_of(const std::string& text) {
  return {as_bytes(text).begin(), as_bytes(text).end()};
}

class BlobStoreTest : public testing::Test {
 protected:
  void SetUp() override { open(100); }
  void open(std::int64_t budget) {
    blobs_.reset();
    auto store =
        open_lmdb_store({scratch_ / "lmdb", "blobs", BlobStore::tables(), 64 << 20, false, true})
            .value();
    blobs_ = BlobStore::open(std::move(store), scratch_ / "files", budget, clock_).value();
  }
  Digest put(const std::string& text, const std::string& pin = "") {
    const Digest digest = sha256(text);
    const Status status = blobs_->put_chunk(digest, as_bytes(text), pin);
    EXPECT_TRUE(status.ok()) << status.to_string();
    return digest;
  }
  std::string path_of(const Digest& digest) {
    return scratch_ / ("files/" + digest.hex().substr(0, 2) + "/" + digest.hex());
  }
  ManualClock clock_;
  Scratch scratch_;
  std::unique_ptr<BlobStore> blobs_;
};

TEST_F(BlobStoreTest, GivesBackWhatWasPutOnce) {
  const Digest digest = put("hello");
  put("hello");
  EXPECT_EQ(blobs_->get(digest).value(), bytes_of("hello"));
  EXPECT_EQ(blobs_->stats().value().chunks, 1);
  EXPECT_EQ(blobs_->get(sha256("other")).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(blobs_->get(put("")).value(), bytes_of(""));
}

TEST_F(BlobStoreTest, RefusesBytesThatDoNotHaveTheirDigest) {
  EXPECT_EQ(blobs_->put_chunk(sha256("a"), as_bytes("b")).code(), StatusCode::kInvalid);
  EXPECT_FALSE(blobs_->has(sha256("a")).value());
  const std::vector<std::byte> large(static_cast<std::size_t>(kBlobChunkBytesMax) + 1);
  EXPECT_EQ(blobs_->put_chunk(sha256(large), large).code(), StatusCode::kInvalid);
}

TEST_F(BlobStoreTest, OfManyChunksVerifiedByThreadsTheDamagedOneIsNamed) {
  std::vector<std::string> texts;
  for (std::size_t i = 0; i < 64; ++i) texts.push_back(std::string(50'000, 'a') + str(i));
  std::vector<BlobChunk> chunks;
  for (const std::string& text : texts) chunks.push_back({sha256(text), as_bytes(text)});
  for (const int threads : {0, 1, 4}) EXPECT_TRUE(BlobStore::verify(chunks, threads).ok());
  for (const std::size_t damaged : {std::size_t{0}, std::size_t{37}, chunks.size() - 1}) {
    const char whole = std::exchange(texts[damaged][25'000], 'b');
    for (const int threads : {0, 1, 4}) {
      const Status status = BlobStore::verify(chunks, threads);
      EXPECT_EQ(status.code(), StatusCode::kInvalid);
      EXPECT_NE(status.message().find(chunks[damaged].digest.short_hex()), std::string::npos)
          << status.message();
    }
    texts[damaged][25'000] = whole;
  }
}

TEST_F(BlobStoreTest, GoesToFilesBeyondTheBudgetBehindTheSameInterface) {
  const Digest small = put(std::string(80, 's')), beyond = put(std::string(80, 'f'));
  EXPECT_EQ(blobs_->stats().value().file_chunks, 1);
  EXPECT_TRUE(std::filesystem::exists(path_of(beyond)));
  EXPECT_EQ(blobs_->get(beyond).value(), bytes_of(std::string(80, 'f')));
  open(100);
  EXPECT_EQ(blobs_->get(small).value(), bytes_of(std::string(80, 's')));
  EXPECT_EQ(blobs_->get(beyond).value(), bytes_of(std::string(80, 'f')));
  EXPECT_EQ(blobs_->stats().value().bytes, 160);
}

TEST_F(BlobStoreTest, ReportsADamagedOrMissingFileAndNeverServesIt) {
  const Digest digest = put(std::string(200, 'f'));
  std::string damaged = read_bytes(path_of(digest));
  damaged[77] = static_cast<char>(damaged[77] ^ 4);
  write_bytes(path_of(digest), damaged);
  EXPECT_EQ(blobs_->get(digest).status().code(), StatusCode::kCorrupt);
  std::filesystem::remove(path_of(digest));
  EXPECT_EQ(blobs_->get(digest).status().code(), StatusCode::kCorrupt);
  int findings = 0;
  ASSERT_TRUE(blobs_
                  ->check([&](const std::string& name, const std::string&) {
                    EXPECT_EQ(name, digest.hex());
                    ++findings;
                  })
                  .ok());
  EXPECT_EQ(findings, 1);
}

TEST_F(BlobStoreTest, CollectsOnlyWhatIsDeadUnpinnedAndOld) {
  const Digest live = put("live"), dead = put("dead"), pinned = put("pinned", "upload"),
               again = put("again");
  const Digest dead_file = put(std::string(200, 'd'));
  clock_.advance(kBlobSpareMs - 1);
  auto result = blobs_->gc({live}).value();
  EXPECT_EQ(result.removed, 0);
  EXPECT_EQ(result.spared, 4);
  put("again");          // young again
  put("new", "upload");  // renews the pin
  clock_.advance(1);
  result = blobs_->gc({live}).value();
  EXPECT_EQ(result.removed, 2);
  EXPECT_EQ(result.kept, 1);
  EXPECT_FALSE(blobs_->has(dead).value());
  EXPECT_FALSE(blobs_->has(dead_file).value());
  EXPECT_FALSE(std::filesystem::exists(path_of(dead_file)));
  EXPECT_EQ(blobs_->get(live).value(), bytes_of("live"));
  EXPECT_TRUE(blobs_->has(pinned).value());
  EXPECT_TRUE(blobs_->has(again).value());

  clock_.advance(kBlobPinMs + kBlobSpareMs);
  EXPECT_EQ(blobs_->gc({live}).value().removed, 3);
  EXPECT_EQ(blobs_->stats().value().chunks, 1);
}

TEST_F(BlobStoreTest, APinThatNobodyRenewsEnds) {
  put("x", "upload");
  clock_.advance(kBlobPinMs + kBlobSpareMs);
  EXPECT_EQ(blobs_->gc({}).value().removed, 1);
}

TEST_F(BlobStoreTest, OfMoreUploadsThanItRemembersTheQuietestLosesItsPins) {
  put("first", "upload 0");
  clock_.advance(kBlobSpareMs);
  const Digest old = put("old", "upload 1");
  for (std::size_t i = 2; i <= kBlobPinsMax; ++i) {
    const std::vector<Digest> wanted{old};
    EXPECT_TRUE(blobs_->missing(wanted, "upload " + std::to_string(i)).ok()) << i;
  }
  clock_.advance(kBlobSpareMs - 1);
  EXPECT_EQ(blobs_->gc({}).value().removed, 1);
  EXPECT_TRUE(blobs_->has(old).value());
}

TEST_F(BlobStoreTest, MissingPinsWhatIsThere) {
  const Digest here = put("here");
  clock_.advance(kBlobSpareMs);
  const std::vector<Digest> wanted{sha256("absent"), here};
  EXPECT_EQ(blobs_->missing(wanted, "upload").value(), std::vector<Digest>{sha256("absent")});
  EXPECT_EQ(blobs_->gc({}).value().removed, 0);
}

TEST_F(BlobStoreTest, PutsManySmallChunksAtOnce) {
  open(1 << 20);
  std::vector<std::string> texts;
  for (int i = 0; i < 500; ++i) texts.push_back("chunk " + std::to_string(i));
  std::vector<BlobChunk> chunks;
  for (const std::string& text : texts) chunks.push_back({sha256(text), as_bytes(text)});
  ASSERT_TRUE(blobs_->put_chunks(chunks).ok());
  EXPECT_EQ(blobs_->stats().value().chunks, 500);
  EXPECT_EQ(blobs_->get(sha256("chunk 499")).value(), bytes_of("chunk 499"));
}

TEST_F(BlobStoreTest, RemovesWhatAnInterruptedWriteLeft) {
  const Digest digest = put(std::string(200, 'f'));
  write_bytes(path_of(digest) + ".tmp-0123abcd", "half");
  open(100);
  EXPECT_FALSE(std::filesystem::exists(path_of(digest) + ".tmp-0123abcd"));
  EXPECT_TRUE(std::filesystem::exists(path_of(digest)));
}

TEST_F(BlobStoreTest, SweepsOldFilesThatNoRecordKnows) {
  const std::string text(200, 'o');
  const Digest digest = sha256(text);
  std::filesystem::create_directories(std::filesystem::path(path_of(digest)).parent_path());
  write_bytes(path_of(digest), text);
  ASSERT_TRUE(blobs_->gc({}).ok());
  EXPECT_TRUE(
      std::filesystem::exists(path_of(digest)));  // young: its record may be about to be written
  std::filesystem::last_write_time(
      path_of(digest), std::filesystem::file_time_type::clock::now() - std::chrono::hours(2));
  ASSERT_TRUE(blobs_->gc({}).ok());
  EXPECT_FALSE(std::filesystem::exists(path_of(digest)));
}

TEST(BlobStore, WithoutFilesTheBudgetIsAClearError) {
  ManualClock clock;
  auto blobs =
      BlobStore::open(std::make_unique<MemoryStore>(BlobStore::tables()), "", 10, clock).value();
  const Status status = blobs->put_chunk(sha256("more than ten"), as_bytes("more than ten"));
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_NE(status.message().find("budget is 10 B"), std::string::npos) << status.message();
}

TEST(BlobStore, AFailedCommitLeavesNothingAndTheBudgetRight) {
  ManualClock clock;
  auto store = std::make_unique<MemoryStore>(BlobStore::tables());
  MemoryStore* memory = store.get();
  auto blobs = BlobStore::open(std::move(store), "", 5, clock).value();
  memory->fail_commits(1, internal_error("disk full"));
  EXPECT_EQ(blobs->put_chunk(sha256("12345"), as_bytes("12345")).code(), StatusCode::kInternal);
  EXPECT_FALSE(blobs->has(sha256("12345")).value());
  EXPECT_TRUE(blobs->put_chunk(sha256("12345"), as_bytes("12345")).ok());
}

}  // namespace
}  // namespace tandem::storage
