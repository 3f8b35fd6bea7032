#include "protocol/base/bounded_queue.h"
#include "protocol/base/digest.h"
#include "protocol/base/dtype.h"
#include "protocol/base/processors.h"
#include "protocol/base/random.h"
#include "protocol/base/result.h"
#include "protocol/base/units.h"

#include <gtest/gtest.h>

#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <set>

namespace tandem {
namespace {

TEST(Digest, MatchesTheStandardsExample) {
  EXPECT_EQ(sha256("abc").hex(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(Digest, ParsesOnlyWhatItPrints) {
  const Digest d = sha256("x");
  EXPECT_EQ(*Digest::parse(d.hex()), d);
  EXPECT_FALSE(Digest::parse("00").ok());
  EXPECT_FALSE(Digest::parse(std::string(63, '0') + "G").ok());
}

TEST(Digest, ContentRootDoesNotDependOnTheThreadCount) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(kDigestLeafBytes) * 2 + 5);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 31 >> 3);
  EXPECT_EQ(content_root(bytes, 1), content_root(bytes, 4));
  bytes.back() ^= std::byte{1};
  const Digest changed = content_root(bytes, 1);
  bytes.back() ^= std::byte{1};
  EXPECT_NE(content_root(bytes, 1), changed);
}

TEST(Digest, ManyPartsAreNamedInOrderWhateverTheThreadCount) {
  std::vector<std::string> texts;
  std::vector<std::span<const std::byte>> parts;
  for (std::size_t i = 0; i < 200; ++i)
    texts.emplace_back(i % 7 == 0 ? 300'000 : i, static_cast<char>(i));
  for (const std::string& text : texts) parts.push_back(std::as_bytes(std::span(text)));
  for (const int threads : {1, 4}) {
    std::size_t heard = 0;
    const auto digests = sha256_each(parts, threads, [&](std::size_t i, const Digest& digest) {
      EXPECT_EQ(i, heard++);
      EXPECT_EQ(digest, sha256(texts[i]));
    });
    EXPECT_EQ(heard, texts.size());
    ASSERT_EQ(digests.size(), texts.size());
    for (std::size_t i = 0; i < texts.size(); ++i) EXPECT_EQ(digests[i], sha256(texts[i])) << i;
  }
  EXPECT_TRUE(sha256_each({}, 4).empty());
}

TEST(DType, HalfConversionsRoundTripEveryValue) {
  for (std::uint32_t i = 0; i < 0x10000; ++i) {
    const f16 h{static_cast<std::uint16_t>(i)};
    const float f = to_f32(h);
    if (std::isnan(f)) continue;
    ASSERT_EQ(to_f16(f).bits, h.bits) << i;
    const bf16 b{static_cast<std::uint16_t>(i)};
    if (!std::isnan(to_f32(b))) {
      ASSERT_EQ(to_bf16(to_f32(b)).bits, b.bits) << i;
    }
  }
}

TEST(DType, RoundsToNearestEven) {
  EXPECT_EQ(to_bf16(1.0f + 0x1.0p-8f).bits, to_bf16(1.0f).bits);   // tie, even below
  EXPECT_EQ(to_f32(to_bf16(1.0f + 0x1.8p-7f)), 1.0f + 0x1.0p-6f);  // tie, even above
  EXPECT_TRUE(std::isinf(to_f32(to_f16(65520.0f))));
  EXPECT_EQ(to_f32(to_f16(65519.0f)), 65504.0f);
  EXPECT_TRUE(std::isnan(to_f32(to_bf16(std::numeric_limits<float>::quiet_NaN()))));
}

TEST(Random, IsAFunctionOfItsArguments) {
  EXPECT_EQ(random_bits(1, 2, 3), random_bits(1, 2, 3));
  std::set<std::uint64_t> seen;
  for (std::uint64_t i = 0; i < 1000; ++i) seen.insert(random_bits(42, i % 10, i / 10));
  EXPECT_EQ(seen.size(), 1000u);
}

TEST(Random, UniformStaysInRangeWithTheRightMean) {
  Random random(7);
  double sum = 0;
  for (int i = 0; i < 100000; ++i) {
    const float u = random.uniform();
    ASSERT_GE(u, 0.0f);
    ASSERT_LT(u, 1.0f);
    sum += u;
  }
  EXPECT_NEAR(sum / 100000, 0.5, 5 * std::sqrt(1.0 / 12 / 100000));  // five standard errors
}

TEST(Str, NamesTheNearestField) {
  const std::vector<std::string> names{"learning_rate", "lora_r", "seed"};
  EXPECT_EQ(nearest_name("learning_rat", names), "learning_rate");
  EXPECT_EQ(nearest_name("zzzzzzzz", names), "");
}

TEST(BoundedQueue, RefusesWhatDoesNotFitAndKeepsTheValue) {
  BoundedQueue<std::string> queue(1);
  EXPECT_TRUE(queue.try_push("a"));
  std::string b = "b";
  EXPECT_FALSE(queue.try_push(std::move(b)));
  EXPECT_EQ(b, "b");
  EXPECT_EQ(queue.try_pop(), "a");
  queue.close();
  EXPECT_FALSE(queue.try_push("c"));
}

TEST(Units, PrintsBytesTheWayPeopleReadThem) {
  EXPECT_EQ(format_bytes(512), "512 B");
  EXPECT_EQ(format_bytes(3 * kGiB / 2), "1.50 GiB");
}

TEST(Processors, AreThoseOfTheAffinityMask) {
  const int all = processors();
  EXPECT_GE(all, 1);
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  EXPECT_LE(all, CPU_COUNT(&before));
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++cpu)
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_EQ(processors(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof before, &before), 0);
  EXPECT_EQ(processors(), all);
}

/// The quota's file stands in a mount that only a child of this test sees.
TEST(Processors, AreNoMoreThanTheQuotaOfTheControlGroup) {
  if (processors() < 2) GTEST_SKIP() << "one processor is the least";
  constexpr int kCannot = 99;
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (::unshare(CLONE_NEWNS) != 0 ||
        ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        ::mount("none", "/sys/fs/cgroup", "tmpfs", 0, nullptr) != 0)
      ::_exit(kCannot);
    std::ofstream("/sys/fs/cgroup/cpu.max") << "50000 100000\n";
    const int half = processors();
    std::ofstream("/sys/fs/cgroup/cpu.max") << "150000 100000\n";
    const int more = processors();
    ::_exit(10 * half + more);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == kCannot) GTEST_SKIP() << "it takes the right to mount";
  EXPECT_EQ(WEXITSTATUS(status), 12) << "rounded up";
}

}  // namespace
}  // namespace tandem
