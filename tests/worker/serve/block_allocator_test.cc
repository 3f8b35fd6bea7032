#include "worker/serve/block_allocator.h"

#include <gtest/gtest.h>

namespace tandem::worker::serve {
namespace {

TEST(BlockAllocator, GivesEveryBlockOnceAndThenNothing) {
  BlockAllocator blocks(3);
  EXPECT_EQ(blocks.allocate(), 0);
  EXPECT_EQ(blocks.allocate(), 1);
  EXPECT_EQ(blocks.allocate(), 2);
  EXPECT_EQ(blocks.allocate(), std::nullopt);
  EXPECT_EQ(blocks.free_blocks(), 0);
}

TEST(BlockAllocator, FreesASharedBlockOnlyOnItsLastRelease) {
  BlockAllocator blocks(1);
  const std::int32_t block = *blocks.allocate();
  blocks.retain(block);
  EXPECT_EQ(blocks.release(block), 1);
  EXPECT_EQ(blocks.allocate(), std::nullopt);
  EXPECT_EQ(blocks.release(block), 0);
  EXPECT_EQ(blocks.allocate(), block);
}

TEST(BlockAllocator, ReusesTheLowestFreeBlockFirst) {
  BlockAllocator blocks(4);
  for (int i = 0; i < 4; ++i) (void)blocks.allocate();
  blocks.release(3);
  blocks.release(1);
  blocks.release(2);
  EXPECT_EQ(blocks.allocate(), 1);
  EXPECT_EQ(blocks.allocate(), 2);
  EXPECT_EQ(blocks.allocate(), 3);
}

TEST(BlockAllocator, KeepsBlocksBeyondTheLimitOutOfUseUntilItGrowsAgain) {
  BlockAllocator blocks(4);
  for (int i = 0; i < 4; ++i) (void)blocks.allocate();
  blocks.release(0);
  blocks.set_limit(2);
  EXPECT_EQ(blocks.free_blocks(), 1);
  blocks.release(3);  // beyond: not given out
  EXPECT_EQ(blocks.allocate(), 0);
  EXPECT_EQ(blocks.allocate(), std::nullopt);
  blocks.set_limit(4);
  EXPECT_EQ(blocks.allocate(), 3);
  EXPECT_EQ(blocks.allocate(), std::nullopt);  // block 2 is still held
}

TEST(BlockAllocatorDeathTest, ReleasingAFreeBlockIsABug) {
  BlockAllocator blocks(2);
  EXPECT_DEATH(blocks.release(1), "released a free block");
  EXPECT_DEATH(blocks.retain(5), "block 5 of 2");
}

}  // namespace
}  // namespace tandem::worker::serve
