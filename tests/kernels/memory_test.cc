// Arenas, the ledger and the CPU's address ranges; and that every check names what it saw.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/device_error.h"
#include "tests/support/op_harness.h"

#include <gtest/gtest.h>

#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

namespace tandem::kernels::testing {
namespace {

TEST(Arena, BumpsOnAlignedBoundariesAndFreesToAMark) {
  Backend backend = make_cpu_backend({.threads = 1});
  Arena arena(*backend.allocator, *backend.ledger, MemoryKind::kKv, "kv", 10 << 20);
  auto* a = static_cast<char*>(arena.alloc_bytes(1));
  const std::int64_t mark = arena.mark();
  auto* b = static_cast<char*>(arena.alloc_bytes(257));
  EXPECT_EQ(b - a, kDeviceAlignment);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a) % kDeviceAlignment, 0u);
  EXPECT_EQ(arena.used(), 3 * kDeviceAlignment);
  arena.reset(mark);
  EXPECT_EQ(arena.alloc_bytes(8), b);
  EXPECT_EQ(arena.peak_used(), 3 * kDeviceAlignment);
  {
    const ArenaScope scope(arena);
    arena.alloc({100}, DType::kF64);
  }
  EXPECT_EQ(arena.used(), 2 * kDeviceAlignment);
}

TEST(Arena, BooksMappedPagesUntilTrimmed) {
  Backend backend = make_cpu_backend({.threads = 1});
  const MemoryLedger& ledger = *backend.ledger;
  {
    Arena arena(*backend.allocator, *backend.ledger, MemoryKind::kKv, "kv", 64 << 20);
    EXPECT_EQ(ledger.live(MemoryKind::kKv), 0);
    void* p = arena.alloc_bytes(5 << 20);
    std::memset(p, 1, 5 << 20);
    EXPECT_EQ(ledger.live(MemoryKind::kKv), 6 << 20);
    arena.reset(0);
    EXPECT_EQ(ledger.live(MemoryKind::kKv), 6 << 20);
    arena.alloc_bytes(100);
    arena.trim();
    EXPECT_EQ(ledger.live(MemoryKind::kKv), kMapGranularity);
    EXPECT_EQ(ledger.peak(MemoryKind::kKv), 6 << 20);
    // What was given back comes back as zeros.
    arena.reset(0);
    auto* again = static_cast<char*>(arena.alloc_bytes(5 << 20));
    EXPECT_EQ(again, p);
    EXPECT_EQ(again[(5 << 20) - 1], 0);
  }
  EXPECT_EQ(ledger.live_total(), 0);
}

TEST(Arena, HasLessWhereAddressSpaceIsShort) {
  Backend backend = make_cpu_backend({.threads = 1});
  std::ifstream statm("/proc/self/statm");
  std::int64_t pages = 0;
  ASSERT_TRUE(statm >> pages);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_AS, &before), 0);
  rlimit tight = before;
  tight.rlim_cur = static_cast<rlim_t>(pages * ::sysconf(_SC_PAGESIZE) + (std::int64_t{8} << 30));
  ASSERT_EQ(::setrlimit(RLIMIT_AS, &tight), 0);
  {
    Arena arena(*backend.allocator, *backend.ledger, MemoryKind::kKv, "kv", std::int64_t{1} << 40);
    EXPECT_GE(arena.capacity(), std::int64_t{1} << 30);
    EXPECT_LE(arena.capacity(), std::int64_t{8} << 30);
    EXPECT_NE(arena.alloc_bytes(1 << 20), nullptr);
  }
  EXPECT_EQ(::setrlimit(RLIMIT_AS, &before), 0);
}

TEST(Arena, SaysWhatDidNotFit) {
  Backend backend = make_cpu_backend({.threads = 1, .memory_bytes_max = 8 << 20});
  Arena small(*backend.allocator, *backend.ledger, MemoryKind::kKv, "kv of slot 3", 1000);
  try {
    small.alloc_bytes(2000);
    FAIL() << "2000 B fitted into 1000";
  } catch (const DeviceError& e) {
    EXPECT_NE(std::string(e.what()).find("kv of slot 3: 2000 B asked"), std::string::npos)
        << e.what();
  }
  Arena large(*backend.allocator, *backend.ledger, MemoryKind::kKv, "large", 64 << 20);
  EXPECT_THROW(large.alloc_bytes(9 << 20), DeviceError);
  EXPECT_EQ(large.used(), 0);
  large.alloc_bytes(8 << 20);
}

TEST(MemoryLedger, PeakTotalIsOfOneMoment) {
  MemoryLedger ledger;
  ledger.add(MemoryKind::kKv, 10);
  ledger.sub(MemoryKind::kKv, 10);
  ledger.add(MemoryKind::kWeights, 7);
  EXPECT_EQ(ledger.peak_total(), 10);
  EXPECT_EQ(ledger.peak(MemoryKind::kWeights), 7);
}

TEST(MemoryLedgerDeathTest, RefusesToGiveBackWhatIsNotLive) {
  MemoryLedger ledger;
  ledger.add(MemoryKind::kKv, 10);
  EXPECT_DEATH(ledger.sub(MemoryKind::kKv, 11), "ledger of kv: giving 11 B back while 10 B live");
}

class OpChecksDeathTest : public ::testing::Test {
 protected:
  OpChecksDeathTest() { ::testing::GTEST_FLAG(death_test_style) = "threadsafe"; }
  TestDevice device_{"cpu", 1};
  Tensor f32(Shape shape) {
    return device_.input(Values(static_cast<std::size_t>(shape.elements()), 0.0), DType::kF32,
                         shape);
  }
};

TEST_F(OpChecksDeathTest, NameOpTensorExpectedAndActual) {
  AddRmsNormArgs norm{f32({2, 4}), {}, f32({5}), 1e-5f, f32({2, 4}), {}};
  EXPECT_DEATH(device_.ops().add_rms_norm_forward(device_.exec(), norm),
               "add_rms_norm_forward: weight: expected f32 .4., got f32 .5.");
  SiluMulArgs silu{f32({2, 8}), device_.output("out", DType::kBF16, {2, 4})};
  EXPECT_DEATH(device_.ops().silu_mul_forward(device_.exec(), silu),
               "silu_mul_forward: gate_up: expected bf16 .2, 8., got f32 .2, 8.");
}

TEST_F(OpChecksDeathTest, RefuseOverlappingOutputs) {
  const Tensor x = f32({4, 4});
  SiluMulArgs silu{x.rows(0, 2).reshaped({1, 8}), x.rows(1, 1)};
  EXPECT_DEATH(device_.ops().silu_mul_forward(device_.exec(), silu), "out .* overlaps gate_up");
}

TEST_F(OpChecksDeathTest, RefuseNumbersOutOfRangeOnTheDevice) {
  const PackedWeight table = device_.weight(Values(8, 0.0), DType::kF32, 2, 4);
  EmbeddingArgs embedding{device_.ints({0, 2}), &table, f32({2, 4})};
  EXPECT_DEATH(device_.ops().embedding_forward(device_.exec(), embedding),
               "ids.1. = 2: expected 0 .. 1");
  AttentionArgs attention{{1, 1, 4, 1.0f}, f32({3, 12}), device_.ints({0, 4}), 3, f32({3, 4}), {}};
  EXPECT_DEATH(device_.ops().attention_forward(device_.exec(), attention), "rows 3");
  GatherRowsArgs gather{f32({2, 4}), device_.ints({-1}), f32({1, 4})};
  EXPECT_DEATH(device_.ops().gather_rows(device_.exec(), gather), "index.0. = -1: expected 0 .. 1");
}

TEST_F(OpChecksDeathTest, RefuseAnInputMadeElsewhereOrOfAnotherShape) {
  const PackedWeight w = device_.weight(Values(16, 0.0), DType::kF32, 4, 4);
  LinearArgs linear{f32({2, 4}), &w, {}, {}, nullptr, f32({2, 4}), {}, {f32({2, 8}), f32({2, 4})}};
  EXPECT_DEATH(device_.ops().linear_forward(device_.exec(), linear),
               "linear_forward: x: expected to be what make_x writes");
  linear.make_x = {f32({2, 4}), linear.x};
  EXPECT_DEATH(device_.ops().linear_forward(device_.exec(), linear),
               "linear_forward: gate_up: expected f32 .2, 8., got f32 .2, 4.");
}

TEST_F(OpChecksDeathTest, RefuseAdaptersBeyondTheirBounds) {
  const PackedWeight w = device_.weight(Values(16, 0.0), DType::kF32, 4, 4);
  LoraEntry entry;
  entry.rank = 3;
  const std::vector<LoraSite> sites{{0, 4, device_.bytes(&entry, sizeof entry), 0}};
  const AdapterRows rows{device_.ints({0, 2}), device_.ints({0}), 1, 2, 0.0f, 0};
  LinearArgs linear{f32({2, 4}), &w, {}, sites, &rows, f32({2, 4}), {}};
  EXPECT_DEATH(device_.ops().linear_forward(device_.exec(), linear),
               "adapter slot 0: rank 3, rank_max 2");
  const AdapterRows beyond{device_.ints({0, 2}), device_.ints({1}), 1, 4, 0.0f, 0};
  linear.adapters = &beyond;
  EXPECT_DEATH(device_.ops().linear_forward(device_.exec(), linear),
               "adapter slot 1: the site has 1");
}

}  // namespace
}  // namespace tandem::kernels::testing
