// What both stores promise, asked of both.
#include "storage/store.h"

#include "storage/lmdb_store.h"
#include "storage/memory_store.h"
#include "storage/sealed_value.h"
#include "tests/storage/scratch.h"

#include <gtest/gtest.h>

namespace tandem::storage {
namespace {

class StoreTest : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (GetParam()) {
      LmdbOptions options{scratch_ / "db", "test", {"a", "b"}, 8 << 20, true, true};
      store_ = open_lmdb_store(options).value();
    } else {
      store_ = std::make_unique<MemoryStore>(std::vector<std::string>{"a", "b"});
    }
  }
  void put(const std::string& key, const std::string& value) {
    auto txn = store_->begin_write().value();
    ASSERT_TRUE(txn->put("a", key, value).ok());
    ASSERT_TRUE(txn->commit().ok());
  }
  std::optional<std::string> get(const std::string& key) {
    auto txn = store_->begin_read().value();
    const auto value = txn->get("a", key).value();
    if (!value) return {};
    return std::string(*value);
  }
  Scratch scratch_;
  std::unique_ptr<Store> store_;
};
INSTANTIATE_TEST_SUITE_P(Both, StoreTest, testing::Bool(),
                         [](const auto& instance) { return instance.param ? "Lmdb" : "Memory"; });

TEST_P(StoreTest, KeepsWhatWasCommittedAndNothingElse) {
  put("k", "v");
  {
    auto txn = store_->begin_write().value();
    ASSERT_TRUE(txn->put("a", "k", "other").ok());
    ASSERT_TRUE(txn->put("a", "new", "x").ok());
    EXPECT_EQ(txn->get("a", "k").value(), "other");  // reads its own writes
  }
  EXPECT_EQ(get("k"), "v");
  EXPECT_EQ(get("new"), std::nullopt);
}

TEST_P(StoreTest, AReaderSeesTheStateOfItsBegin) {
  put("k", "1");
  auto reader = store_->begin_read().value();
  put("k", "2");
  EXPECT_EQ(reader->get("a", "k").value(), "1");
  EXPECT_EQ(get("k"), "2");
}

TEST_P(StoreTest, TablesDoNotMix) {
  auto txn = store_->begin_write().value();
  ASSERT_TRUE(txn->put("a", "k", "in a").ok());
  EXPECT_EQ(txn->get("b", "k").value(), std::nullopt);
  ASSERT_TRUE(txn->del("b", "k").ok());
  EXPECT_EQ(txn->get("a", "k").value(), "in a");
}

TEST_P(StoreTest, WalksInByteOrderFromAnywhere) {
  for (const std::string key : {"b", "a", "c\xff", "c", "b\x01"}) put(key, "v" + key);
  auto txn = store_->begin_read().value();
  std::string order;
  ASSERT_TRUE(scan_prefix(*txn, "a", "", [&](std::string_view key, std::string_view value) {
                EXPECT_EQ(value, "v" + std::string(key));
                order += std::string(key) + "|";
                return true;
              }).ok());
  EXPECT_EQ(order, "a|b|b\x01|c|c\xff|");
  const auto cursor = txn->cursor("a");
  cursor->seek("b\x02");
  EXPECT_EQ(cursor->key(), "c");
  cursor->seek("c\xff");
  EXPECT_EQ(cursor->key(), "c\xff");
  cursor->next();
  EXPECT_FALSE(cursor->valid());
  EXPECT_TRUE(cursor->status().ok());
}

TEST_P(StoreTest, RefusesKeysOutOfRange) {
  auto txn = store_->begin_write().value();
  EXPECT_EQ(txn->put("a", "", "v").code(), StatusCode::kInvalid);
  EXPECT_EQ(txn->put("a", std::string(kStoreKeyBytesMax + 1, 'k'), "v").code(),
            StatusCode::kInvalid);
  EXPECT_TRUE(txn->put("a", std::string(kStoreKeyBytesMax, 'k'), "v").ok());
  EXPECT_TRUE(txn->commit().ok());
}

TEST_P(StoreTest, HoldsEmptyAndLargeValues) {
  const std::string large(3 << 20, 'x');
  put("empty", "");
  put("large", large);
  EXPECT_EQ(get("empty"), "");
  EXPECT_EQ(get("large"), large);
}

TEST(MemoryStore, ACrashUndoesTheOpenTransaction) {
  MemoryStore store({"a"});
  auto txn = store.begin_write().value();
  ASSERT_TRUE(txn->put("a", "k", "v").ok());
  store.crash();
  EXPECT_EQ(txn->commit().code(), StatusCode::kUnavailable);
  EXPECT_EQ(store.begin_read().value()->get("a", "k").value(), std::nullopt);
}

TEST(MemoryStore, AFailedCommitDoesNothing) {
  MemoryStore store({"a"});
  store.fail_commits(1, internal_error("disk full"));
  auto txn = store.begin_write().value();
  ASSERT_TRUE(txn->put("a", "k", "v").ok());
  EXPECT_EQ(txn->commit().code(), StatusCode::kInternal);
  EXPECT_EQ(store.begin_read().value()->get("a", "k").value(), std::nullopt);
}

TEST(MemoryStore, ReportsEveryFlippedBit) {
  const std::string sealed = seal("a", "key", "a value");
  for (std::size_t bit = 0; bit < sealed.size() * 8; ++bit) {
    MemoryStore store({"a"});
    auto txn = store.begin_write().value();
    ASSERT_TRUE(txn->put("a", "key", "a value").ok());
    ASSERT_TRUE(txn->commit().ok());
    ASSERT_TRUE(store.flip_bit("a", "key", bit));
    const auto got = store.begin_read().value()->get("a", "key");
    ASSERT_EQ(got.status().code(), StatusCode::kCorrupt) << bit;
    EXPECT_NE(got.status().message().find("table a, key key"), std::string::npos);
  }
}

TEST(SealedValue, TellsAnotherKeyAndAnotherTable) {
  const std::string sealed = seal("a", "k", "v");
  EXPECT_EQ(unseal("a", "k", sealed).value(), "v");
  EXPECT_EQ(unseal("a", "K", sealed).status().code(), StatusCode::kCorrupt);
  EXPECT_EQ(unseal("b", "k", sealed).status().code(), StatusCode::kCorrupt);
  for (std::size_t n = 0; n < sealed.size(); ++n)
    EXPECT_EQ(unseal("a", "k", sealed.substr(0, n)).status().code(), StatusCode::kCorrupt);
}

TEST(SealedValue, Xxh64MatchesTheSpecificationsVectors) {
  EXPECT_EQ(xxh64("", 0), 0xEF46DB3751D8E999ull);
  EXPECT_EQ(xxh64("a", 0), 0xD24EC4F1A98C6E5Bull);
  EXPECT_EQ(xxh64("abc", 0), 0x44BC2CF5AD770999ull);
  EXPECT_EQ(xxh64("Nobody inspects the spammish repetition", 0), 0xFBCEA83C8A378BF1ull);
}

}  // namespace
}  // namespace tandem::storage
