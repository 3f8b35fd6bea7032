#include "worker/serve/adapter_residency.h"

#include <gtest/gtest.h>

#include <map>

namespace tandem::worker::serve {
namespace {

struct Table {
  std::map<std::int64_t, const model::AdapterWeights*> slots;
  AdapterResidency::SetSlot setter() {
    return [this](std::int64_t slot, const AdapterResidency::Weights& weights) {
      slots[slot] = weights.get();
    };
  }
};

AdapterResidency::Weights weights(std::int64_t rank = 4) {
  auto w = std::make_shared<model::AdapterWeights>();
  w->rank_max = rank;
  return w;
}

Digest name(int i) {
  return sha256(str("adapter ", i));
}

Status install(AdapterResidency& residency, const Digest& digest,
               AdapterResidency::Weights weights) {
  const std::int64_t bytes = weights->bytes;
  return residency.install(digest, std::move(weights), bytes);
}

TEST(AdapterResidency, BindsMoreAdaptersThanSlotsStepByStep) {
  Table table;
  AdapterResidency residency(2, 2, 8, table.setter());
  std::vector<AdapterResidency::Weights> all;
  for (int i = 0; i < 5; ++i) {
    all.push_back(weights());
    ASSERT_TRUE(install(residency, name(i), all.back()).ok());
  }
  for (int i = 0; i < 5; ++i) {
    const std::vector<Digest> step = {name(i), name((i + 1) % 5)};
    residency.begin_step(step);
    const auto first = residency.bind(step[0]), second = residency.bind(step[1]);
    EXPECT_NE(first, second);
    EXPECT_GE(std::min(first, second), 2);
    EXPECT_LE(std::max(first, second), 3);
    EXPECT_EQ(table.slots[first], all[static_cast<std::size_t>(i)].get());
    EXPECT_EQ(table.slots[second], all[static_cast<std::size_t>((i + 1) % 5)].get());
  }
  EXPECT_EQ(residency.binds(),
            6);  // one new adapter per step after the first: the shared one stays
}

TEST(AdapterResidency, ABoundAdapterOfThisStepIsNeverTakenOver) {
  Table table;
  AdapterResidency residency(0, 2, 8, table.setter());
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(install(residency, name(i), weights()).ok());
  residency.begin_step(std::vector{name(0), name(1)});
  const auto zero = residency.bind(name(0));
  residency.bind(name(1));
  residency.begin_step(std::vector{name(2), name(0)});
  residency.bind(name(2));  // must take adapter 1's slot although 0 is older
  EXPECT_EQ(residency.bind(name(0)), zero);
}

TEST(AdapterResidency, EvictsTheLeastRecentlyUsedIdleAdapterOnly) {
  Table table;
  AdapterResidency residency(0, 1, 2, table.setter());
  ASSERT_TRUE(install(residency, name(0), weights()).ok());
  ASSERT_TRUE(install(residency, name(1), weights()).ok());
  residency.acquire(name(0));
  ASSERT_TRUE(install(residency, name(2), weights()).ok());
  EXPECT_TRUE(residency.installed(name(0)));
  EXPECT_FALSE(residency.installed(name(1)));
  residency.acquire(name(2));
  const Status full = install(residency, name(3), weights());
  EXPECT_EQ(full.code(), StatusCode::kBusy);
  EXPECT_NE(full.message().find("all 2 installed adapters are in use"), std::string::npos);
  residency.release(name(0));
  EXPECT_TRUE(install(residency, name(3), weights()).ok());
}

TEST(AdapterResidency, DropWaitsForTheLastUserAndClearsTheSlot) {
  Table table;
  AdapterResidency residency(0, 1, 2, table.setter());
  auto w = weights();
  const std::weak_ptr<const model::AdapterWeights> watch = w;
  ASSERT_TRUE(install(residency, name(0), std::move(w)).ok());
  residency.acquire(name(0));
  residency.begin_step(std::vector{name(0)});
  const auto slot = residency.bind(name(0));
  residency.drop(name(0));
  EXPECT_TRUE(residency.installed(name(0)));
  residency.release(name(0));
  EXPECT_FALSE(residency.installed(name(0)));
  EXPECT_EQ(table.slots[slot], nullptr);
  EXPECT_TRUE(watch.expired());
}

TEST(AdapterResidency, ReportsMostRecentlyUsedFirst) {
  Table table;
  AdapterResidency residency(0, 1, 4, table.setter());
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(install(residency, name(i), weights()).ok());
  residency.acquire(name(1));
  EXPECT_EQ(residency.resident(), (std::vector{name(1), name(2), name(0)}));
}

}  // namespace
}  // namespace tandem::worker::serve
