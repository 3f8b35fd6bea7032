#include "worker/serve/prefix_cache.h"
#include "protocol/base/random.h"

#include <gtest/gtest.h>

#include <set>

namespace tandem::worker::serve {
namespace {

std::vector<Digest> chain(const Digest& adapter, const std::vector<std::int32_t>& tokens,
                          std::size_t block_size) {
  std::vector<Digest> keys;
  Digest parent = prefix_root(sha256("base"), adapter);
  for (std::size_t i = 0; i + block_size <= tokens.size(); i += block_size)
    keys.push_back(parent = prefix_key(parent, std::span(tokens).subspan(i, block_size)));
  return keys;
}

TEST(PrefixKey, DependsOnAdapterOnEarlierBlocksAndOnTokens) {
  const auto plain = chain({}, {1, 2, 3, 4}, 2);
  EXPECT_EQ(plain, chain({}, {1, 2, 3, 4}, 2));
  EXPECT_NE(plain[0], chain(sha256("adapter"), {1, 2, 3, 4}, 2)[0]);
  EXPECT_NE(plain[1], chain({}, {1, 9, 3, 4}, 2)[1]);
  EXPECT_EQ(plain[0], chain({}, {1, 2, 9, 4}, 2)[0]);
  EXPECT_NE(plain[1], chain({}, {1, 2, 9, 4}, 2)[1]);
}

TEST(KvBlocks, FindsTheLongestKnownPrefix) {
  KvBlocks kv(8, true);
  const auto keys = chain({}, {1, 2, 3, 4, 5, 6}, 2);
  const std::int32_t a = *kv.allocate(), b = *kv.allocate();
  kv.insert(keys[0], a);
  kv.insert(keys[1], b);
  EXPECT_EQ(kv.match(keys), (std::vector<std::int32_t>{a, b}));
  EXPECT_EQ(kv.match(chain({}, {1, 2, 9, 9}, 2)), (std::vector<std::int32_t>{a}));
  EXPECT_TRUE(kv.match(chain(sha256("adapter"), {1, 2, 3, 4}, 2)).empty());
}

TEST(KvBlocks, KeepsReleasedPrefixesUntilMemoryIsNeededOldestFirst) {
  KvBlocks kv(2, true);
  const auto first = chain({}, {1, 2}, 2), second = chain({}, {3, 4}, 2);
  const std::int32_t a = *kv.allocate(), b = *kv.allocate();
  kv.insert(first[0], a);
  kv.insert(second[0], b);
  kv.release(a);
  kv.release(b);
  EXPECT_EQ(kv.available(), 2);
  EXPECT_EQ(kv.allocate(), a);  // the one released first
  EXPECT_TRUE(kv.match(first).empty());
  EXPECT_EQ(kv.match(second), (std::vector<std::int32_t>{b}));
  EXPECT_EQ(kv.available(), 0);
  EXPECT_EQ(kv.allocate(), std::nullopt);
}

TEST(KvBlocks, NeverEvictsABlockThatASequenceHolds) {
  KvBlocks kv(1, true);
  const auto keys = chain({}, {1, 2}, 2);
  const std::int32_t a = *kv.allocate();
  kv.insert(keys[0], a);
  EXPECT_EQ(kv.allocate(), std::nullopt);
  EXPECT_EQ(kv.match(keys).size(), 1u);  // two holders now
  kv.release(a);
  EXPECT_EQ(kv.allocate(), std::nullopt);
  kv.release(a);
  EXPECT_EQ(kv.allocate(), a);
}

TEST(KvBlocks, KeepsThePrivateCopyWhenTheKeyIsKnown) {
  KvBlocks kv(2, true);
  const auto keys = chain({}, {1, 2}, 2);
  const std::int32_t a = *kv.allocate(), b = *kv.allocate();
  kv.insert(keys[0], a);
  kv.insert(keys[0], b);
  kv.release(b);
  EXPECT_EQ(kv.idle(), 0);
  EXPECT_EQ(kv.allocate(), b);
  EXPECT_EQ(kv.match(keys), (std::vector<std::int32_t>{a}));
}

TEST(KvBlocks, ForgetsPrefixesBeyondTheLimit) {
  KvBlocks kv(3, true);
  const auto keys = chain({}, {1, 2, 3, 4, 5, 6}, 2);
  for (std::size_t i = 0; i < 3; ++i) kv.insert(keys[i], *kv.allocate());
  for (std::int32_t b = 2; b >= 0; --b) kv.release(b);
  kv.set_limit(1);
  EXPECT_EQ(kv.available(), 1);
  EXPECT_EQ(kv.match(keys), (std::vector<std::int32_t>{0}));
  kv.set_limit(3);
  EXPECT_EQ(kv.available(), 2);
}

TEST(KvBlocks, WithoutReuseRemembersNothing) {
  KvBlocks kv(1, false);
  const auto keys = chain({}, {1, 2}, 2);
  const std::int32_t a = *kv.allocate();
  kv.insert(keys[0], a);
  EXPECT_TRUE(kv.match(keys).empty());
  kv.release(a);
  EXPECT_EQ(kv.idle(), 0);
}

// Random operations against the plainest model: a set of holders per block.
TEST(KvBlocks, CountsAgreeWithAModelUnderRandomUse) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Random random(seed);
    KvBlocks kv(12, true);
    std::vector<std::vector<std::int32_t>> held;
    for (int step = 0; step < 400; ++step) {
      const std::uint64_t what = random.below(4);
      if (what <= 1) {  // a sequence comes: matches, then allocates the rest
        std::vector<std::int32_t> tokens;
        const std::uint64_t blocks = 1 + random.below(5);
        for (std::uint64_t i = 0; i < 2 * blocks; ++i)
          tokens.push_back(static_cast<std::int32_t>(random.below(2)));
        const auto keys = chain({}, tokens, 2);
        auto mine = kv.match(keys);
        while (mine.size() < blocks) {
          const auto block = kv.allocate();
          if (!block) break;
          for (const auto& other : held)
            for (std::int32_t b : other) ASSERT_NE(b, *block) << "handed out twice";
          mine.push_back(*block);
          kv.insert(keys[mine.size() - 1], *block);
        }
        held.push_back(mine);
      } else if (what == 2 && !held.empty()) {
        std::swap(held[random.below(held.size())], held.back());
        for (auto b = held.back().rbegin(); b != held.back().rend(); ++b) kv.release(*b);
        held.pop_back();
      } else if (what == 3 && random.below(8) == 0) {
        kv.set_limit(static_cast<std::int64_t>(4 + random.below(9)));
      }
      std::set<std::int32_t> used, used_below;
      for (const auto& blocks : held)
        for (std::int32_t b : blocks) {
          used.insert(b);
          if (b < kv.limit()) used_below.insert(b);
        }
      ASSERT_EQ(kv.available(), kv.limit() - static_cast<std::int64_t>(used_below.size()));
    }
  }
}

}  // namespace
}  // namespace tandem::worker::serve
