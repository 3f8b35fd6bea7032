#include "storage/lmdb_store.h"

#include "storage/file_io.h"
#include "storage/sealed_value.h"
#include "tests/storage/scratch.h"

#include <gtest/gtest.h>

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <map>
#include <string>

namespace tandem::storage {
namespace {

LmdbOptions options_in(const std::string& directory, std::int64_t map_bytes = 4 << 20,
                       bool preallocate = false) {
  return {directory, "test", {"t"}, map_bytes, preallocate, true};
}

void fill(Store& store, int count, std::size_t value_bytes = 100) {
  auto txn = store.begin_write().value();
  for (int i = 0; i < count; ++i)
    ASSERT_TRUE(txn->put("t", "key" + std::to_string(i),
                         std::string(value_bytes, static_cast<char>('a' + i % 26)))
                    .ok());
  ASSERT_TRUE(txn->commit().ok());
}

TEST(LmdbStore, ReopensWithWhatWasCommitted) {
  Scratch scratch;
  fill(*open_lmdb_store(options_in(scratch / "db")).value(), 100);
  auto store = open_lmdb_store(options_in(scratch / "db")).value();
  EXPECT_EQ(store->begin_read().value()->get("t", "key99").value(),
            std::string(100, 'a' + 99 % 26));
  EXPECT_EQ(store->stats().value().entries, 100);
}

TEST(LmdbStore, ASecondOwnerGetsAConflictThatNamesTheFirst) {
  Scratch scratch;
  auto store = open_lmdb_store(options_in(scratch / "db")).value();
  const auto second = open_lmdb_store(options_in(scratch / "db"));
  ASSERT_EQ(second.status().code(), StatusCode::kConflict);
  EXPECT_NE(second.status().message().find(std::to_string(::getpid())), std::string::npos);
  store.reset();
  EXPECT_TRUE(open_lmdb_store(options_in(scratch / "db")).ok());
}

TEST(LmdbStore, PreallocationGivesTheFileItsBlocks) {
  Scratch scratch;
  auto store = open_lmdb_store(options_in(scratch / "db", 4 << 20, true)).value();
  struct stat info {};
  ASSERT_EQ(::stat((scratch / "db/data.mdb").c_str(), &info), 0);
  EXPECT_GE(info.st_size, 4 << 20);
  EXPECT_GE(info.st_blocks * 512, 4 << 20);
}

std::int64_t file_bytes(const std::string& path) {
  struct stat info {};
  return ::stat(path.c_str(), &info) == 0 ? info.st_size : -1;
}

TEST(LmdbStore, WhatIsWrittenAheadHarmsNoCommitAndIsThereOnceTheStoreIsStill) {
  constexpr std::int64_t kAhead = 3 << 20, kMap = 64 << 20;
  Scratch scratch;
  if (!require_free_space(scratch.path(), std::int64_t{3} << 30).ok())
    GTEST_SKIP() << "too little free space for writing ahead";
  auto store = open_lmdb_store(options_in(scratch / "db", kMap)).value();
  store->write_ahead(kAhead);
  // Commits at every distance from the writing, which begins when the store has been still.
  std::map<std::string, std::string> values;
  for (int i = 0; i < 40; ++i) {
    const std::string key = "key" + std::to_string(i);
    values[key] = std::string(300'000 + 1000 * i, static_cast<char>('a' + i % 26));
    auto txn = store->begin_write().value();
    ASSERT_TRUE(txn->put("t", key, values[key]).ok());
    ASSERT_TRUE(txn->commit().ok());
    ::usleep(static_cast<useconds_t>(i % 4 == 3 ? 195'000 + 2000 * i : 1000 * i));
  }
  const std::int64_t used = store->stats().value().used_bytes;
  for (int i = 0; i < 1000 && file_bytes(scratch / "db/data.mdb") < used + kAhead; ++i)
    ::usleep(10'000);
  EXPECT_GE(file_bytes(scratch / "db/data.mdb"), used + kAhead);
  EXPECT_LT(file_bytes(scratch / "db/data.mdb"), used + 2 * kAhead);
  store.reset();
  const auto again = open_lmdb_store(options_in(scratch / "db", kMap)).value();
  const auto txn = again->begin_read().value();
  for (const auto& [key, value] : values) EXPECT_EQ(txn->get("t", key).value(), value) << key;
}

TEST(LmdbStore, WritingAheadStaysInsideTheMap) {
  constexpr std::int64_t kMap = 2 << 20;
  Scratch scratch;
  if (!require_free_space(scratch.path(), std::int64_t{3} << 30).ok())
    GTEST_SKIP() << "too little free space for writing ahead";
  auto store = open_lmdb_store(options_in(scratch / "db", kMap)).value();
  store->write_ahead(16 << 20);
  for (int i = 0; i < 1000 && file_bytes(scratch / "db/data.mdb") < kMap; ++i) ::usleep(10'000);
  ::usleep(300'000);  // longer than it waits for quiet: more would come now
  EXPECT_EQ(file_bytes(scratch / "db/data.mdb"), kMap);
}

TEST(LmdbStore, WhatIsInAFullMapCanBeRemovedAndThenThereIsRoom) {
  Scratch scratch;
  auto store = open_lmdb_store(options_in(scratch / "db", 4 << 20)).value();
  const auto put = [&](const std::string& key, std::size_t bytes) {
    auto txn = store->begin_write().value();
    const Status status = txn->put("t", key, std::string(bytes, 'x'));
    return status.ok() ? txn->commit() : status;
  };
  int count = 0;
  for (const std::size_t bytes : {7000, 100})  // to the last page
    while (put("key" + std::to_string(count), bytes).ok()) ++count;
  ASSERT_GT(count, 400);
  for (int i = 0; i < count; ++i) {
    auto txn = store->begin_write().value();
    ASSERT_TRUE(txn->del("t", "key" + std::to_string(i)).ok());
    ASSERT_TRUE(txn->put("t", "removed" + std::to_string(i), "what else is said of it").ok()) << i;
    const Status status = txn->commit();
    ASSERT_TRUE(status.ok()) << i << ": " << status.message();
  }
  EXPECT_TRUE(put("again", 100'000).ok());
}

TEST(LmdbStore, AFullMapIsAClearErrorAndWhatWasThereStays) {
  Scratch scratch;
  auto store = open_lmdb_store(options_in(scratch / "db", 1 << 20)).value();
  fill(*store, 10);
  auto txn = store->begin_write().value();
  Status status;
  for (int i = 0; status.ok() && i < 100; ++i)
    status = txn->put("t", "big" + std::to_string(i), std::string(100'000, 'x'));
  ASSERT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_NE(status.message().find("the map is full"), std::string::npos);
  EXPECT_EQ(txn->commit().code(), StatusCode::kInternal);
  txn.reset();
  EXPECT_EQ(store->begin_read().value()->get("t", "key1").value(), std::string(100, 'b'));
  fill(*store, 1);  // small work still goes on
  store.reset();
  auto larger =
      open_lmdb_store(options_in(scratch / "db", 8 << 20)).value();  // and the advice helps
  auto retry = larger->begin_write().value();
  EXPECT_TRUE(retry->put("t", "big", std::string(2 << 20, 'x')).ok());
  EXPECT_TRUE(retry->commit().ok());
}

TEST(LmdbStore, ADiskTooSmallIsRefusedBeforeAnythingIsMapped) {
  Scratch scratch;
  const auto store = open_lmdb_store(options_in(scratch / "db", std::int64_t{1} << 50, true));
  ASSERT_EQ(store.status().code(), StatusCode::kInternal);
  EXPECT_NE(store.status().message().find("disk full"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(scratch / "db/data.mdb"));
}

TEST(LmdbStore, RefusesForeignAndTornFiles) {
  Scratch scratch;
  std::filesystem::create_directories(scratch / "db");
  write_bytes(scratch / "db/data.mdb", std::string(100'000, 'z'));
  EXPECT_FALSE(open_lmdb_store(options_in(scratch / "db")).ok());
  write_bytes(scratch / "db/data.mdb", "");
  EXPECT_EQ(open_lmdb_store(options_in(scratch / "db")).status().code(), StatusCode::kCorrupt);

  auto other = options_in(scratch / "other");
  other.kind = "something else";
  open_lmdb_store(other).value().reset();
  const auto wrong = open_lmdb_store(options_in(scratch / "other"));
  ASSERT_EQ(wrong.status().code(), StatusCode::kRefused);
  EXPECT_NE(wrong.status().message().find("something else"), std::string::npos);
}

TEST(LmdbStore, ATruncatedFileIsReportedAtEveryLength) {
  Scratch scratch;
  fill(*open_lmdb_store(options_in(scratch / "db")).value(), 2000);
  const std::string whole = read_bytes(scratch / "db/data.mdb");
  ASSERT_GT(whole.size(), 200'000u);
  for (std::size_t size = 1; size < whole.size(); size += whole.size() / 40) {
    write_bytes(scratch / "db/data.mdb", whole.substr(0, size));
    const auto store = open_lmdb_store(options_in(scratch / "db"));
    ASSERT_FALSE(store.ok()) << size;
  }
  write_bytes(scratch / "db/data.mdb", whole);
  EXPECT_TRUE(open_lmdb_store(options_in(scratch / "db")).ok());
}

TEST(LmdbStore, EveryFlippedByteOfAValueIsReportedAndNotServed) {
  Scratch scratch;
  const std::string key = "the key",
                    value = "a value long enough to be found in the file: 0123456789";
  {
    auto store = open_lmdb_store(options_in(scratch / "db")).value();
    auto txn = store->begin_write().value();
    ASSERT_TRUE(txn->put("t", key, value).ok());
    ASSERT_TRUE(txn->commit().ok());
  }
  const std::string whole = read_bytes(scratch / "db/data.mdb"), sealed = seal("t", key, value);
  const std::size_t at = whole.find(sealed);
  ASSERT_NE(at, std::string::npos);
  for (std::size_t i = 0; i < sealed.size(); ++i) {
    std::string damaged = whole;
    damaged[at + i] = static_cast<char>(damaged[at + i] ^ (1 << i % 8));
    write_bytes(scratch / "db/data.mdb", damaged);
    auto store = open_lmdb_store(options_in(scratch / "db"));
    ASSERT_TRUE(store.ok())
        << store.status().to_string();  // one bad value does not close the registry
    auto txn = (*store)->begin_read().value();
    EXPECT_EQ(txn->get("t", key).status().code(), StatusCode::kCorrupt) << i;
    const auto cursor = txn->cursor("t");
    cursor->seek("");
    ASSERT_TRUE(cursor->valid());
    EXPECT_EQ(cursor->value().status().code(), StatusCode::kCorrupt) << i;
  }
}

TEST(LmdbStore, NoFlippedByteAnywhereGivesAWrongValue) {
  Scratch scratch;
  fill(*open_lmdb_store(options_in(scratch / "db")).value(), 200);
  const std::string whole = read_bytes(scratch / "db/data.mdb");
  int refused = 0, wrong = 0;
  for (std::size_t at = 3; at < whole.size(); at += whole.size() / 300) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x55);
    write_bytes(scratch / "db/data.mdb", damaged);
    // In a child: a page that was not walked by the probe (a free one) may still stop LMDB.
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      auto store = open_lmdb_store(options_in(scratch / "db"));
      if (!store.ok()) ::_exit(1);
      auto txn = (*store)->begin_read().value();
      for (int i = 0; i < 200; ++i) {
        const auto value = txn->get("t", "key" + std::to_string(i));
        if (value.ok() && *value && **value != std::string(100, static_cast<char>('a' + i % 26)))
          ::_exit(9);
      }
      ::_exit(0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status) << " at byte " << at;
    wrong += WIFEXITED(status) && WEXITSTATUS(status) == 9;
    refused += WIFEXITED(status) && WEXITSTATUS(status) == 1;
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(refused, 0);  // otherwise the probe was not tested
}

TEST(LmdbStore, BacksUpWhileItIsWritten) {
  Scratch scratch;
  auto store = open_lmdb_store(options_in(scratch / "db")).value();
  fill(*store, 50);
  auto writer = store->begin_write().value();
  ASSERT_TRUE(writer->put("t", "uncommitted", "x").ok());
  ASSERT_TRUE(store->backup(scratch / "copy").ok());
  ASSERT_TRUE(writer->commit().ok());
  EXPECT_EQ(store->backup(scratch / "copy").code(), StatusCode::kConflict);
  auto copy = open_lmdb_store(options_in(scratch / "copy")).value();
  EXPECT_EQ(copy->stats().value().entries, 50);
}

TEST(FileIo, KnowsNetworkFileSystems) {
  EXPECT_EQ(refuse_network_file_system(0x6969, "/data").code(), StatusCode::kRefused);      // NFS
  EXPECT_EQ(refuse_network_file_system(0xFF534D42, "/data").code(), StatusCode::kRefused);  // CIFS
  EXPECT_TRUE(refuse_network_file_system(0xEF53, "/data").ok());                            // ext4
}

}  // namespace
}  // namespace tandem::storage
