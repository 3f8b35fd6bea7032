#include "worker/data/packing.h"

#include "protocol/base/random.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

namespace tandem::worker::data {
namespace {

/// Examples whose tokens say which example and position they come from.
Dataset make_dataset(std::size_t count, std::int64_t length_max, std::uint64_t seed = 1) {
  Random random(seed);
  Dataset dataset;
  for (std::size_t i = 0; i < count; ++i) {
    Example example;
    example.line = static_cast<std::int64_t>(i) + 1;
    const auto length = 2 + random.below(static_cast<std::uint64_t>(length_max - 1));
    for (std::uint64_t t = 0; t < length; ++t) {
      example.tokens.push_back(static_cast<std::int32_t>(i * 1000 + t));
      const bool trained = t + 1 < length && t >= length / 2;
      example.labels.push_back(trained ? static_cast<std::int32_t>(i * 1000 + t + 1) : kIgnore);
    }
    dataset.examples.push_back(std::move(example));
  }
  return dataset;
}

Packer pack(const Dataset& dataset, PackingOptions options) {
  auto packer = Packer::create(dataset, options);
  EXPECT_TRUE(packer.ok()) << packer.status().to_string();
  return std::move(*packer);
}

TEST(Packer, UsesEveryExampleOncePerEpochAndNeverOverfillsABatch) {
  const Dataset dataset = make_dataset(500, 60);
  Packer packer = pack(dataset, {.micro_batch_tokens = 128});
  for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<int> seen(500, 0);
    for (const auto& bin : packer.plan(epoch)) {
      std::int64_t tokens = 0;
      for (const std::int64_t example : bin) {
        ++seen[static_cast<std::size_t>(example)];
        tokens += static_cast<std::int64_t>(
            dataset.examples[static_cast<std::size_t>(example)].tokens.size());
      }
      EXPECT_LE(tokens, 128);
      EXPECT_GT(tokens, 0);
    }
    EXPECT_EQ(seen, std::vector<int>(500, 1));
  }
}

TEST(Packer, WastesLittle) {
  const Dataset dataset = make_dataset(2000, 200);
  Packer packer = pack(dataset, {.micro_batch_tokens = 512});
  const auto bins = static_cast<std::int64_t>(packer.plan(0).size());
  const std::int64_t fewest = (dataset.total_tokens() + 511) / 512;
  // Best fit decreasing needs at most 11/9 of the fewest bins, and 6/9 of one (Doesa 2007).
  EXPECT_LE(bins * 9, fewest * 11 + 6);
  EXPECT_LE(static_cast<double>(bins), 1.02 * static_cast<double>(fewest));
}

TEST(Packer, KeepsDocumentsWholeAndApart) {
  const Dataset dataset = make_dataset(100, 40);
  Packer packer = pack(dataset, {.micro_batch_tokens = 100, .gradient_accumulation_steps = 3});
  for (std::int64_t s = 0; s < packer.steps_in_epoch(0); ++s) {
    const auto step = packer.step({0, s});
    ASSERT_TRUE(step.ok());
    std::int64_t trained = 0;
    for (const MicroBatch& batch : step->micro_batches) {
      ASSERT_EQ(batch.cu_seqlens.size(), batch.examples.size() + 1);
      EXPECT_EQ(batch.cu_seqlens.front(), 0);
      EXPECT_EQ(batch.cu_seqlens.back(), static_cast<std::int32_t>(batch.tokens.size()));
      EXPECT_EQ(batch.labels.size(), batch.tokens.size());
      EXPECT_EQ(batch.positions.size(), batch.tokens.size());
      for (std::size_t d = 0; d < batch.examples.size(); ++d) {
        const Example& example = dataset.examples[static_cast<std::size_t>(batch.examples[d])];
        const auto begin = static_cast<std::size_t>(batch.cu_seqlens[d]);
        ASSERT_EQ(batch.cu_seqlens[d + 1] - batch.cu_seqlens[d],
                  static_cast<std::int32_t>(example.tokens.size()));
        for (std::size_t t = 0; t < example.tokens.size(); ++t) {
          EXPECT_EQ(batch.tokens[begin + t], example.tokens[t]);
          EXPECT_EQ(batch.labels[begin + t], example.labels[t]);
          EXPECT_EQ(batch.positions[begin + t], static_cast<std::int32_t>(t));
        }
        EXPECT_EQ(batch.labels[begin + example.tokens.size() - 1], kIgnore)
            << "the last token must not predict the next document";
      }
      EXPECT_EQ(batch.trained_tokens,
                std::count_if(batch.labels.begin(), batch.labels.end(),
                              [](std::int32_t label) { return label != kIgnore; }));
      trained += batch.trained_tokens;
    }
    EXPECT_EQ(step->trained_tokens, trained);
  }
}

/// The examples of a step, in order.
std::vector<std::int64_t> examples_of(Packer& packer, DataCursor cursor) {
  std::vector<std::int64_t> all;
  const auto step = packer.step(cursor);
  EXPECT_TRUE(step.ok()) << step.status().to_string();
  for (const MicroBatch& batch : step->micro_batches)
    all.insert(all.end(), batch.examples.begin(), batch.examples.end());
  return all;
}

TEST(Packer, ResumesFromTheCursorAlone) {
  const Dataset dataset = make_dataset(300, 50);
  const PackingOptions options{.micro_batch_tokens = 128, .gradient_accumulation_steps = 4};
  Packer whole = pack(dataset, options);
  std::vector<std::vector<std::int64_t>> uninterrupted;
  std::vector<DataCursor> cursors;
  for (DataCursor cursor; cursor.epoch < 3; cursor = whole.next(cursor)) {
    cursors.push_back(cursor);
    uninterrupted.push_back(examples_of(whole, cursor));
  }
  EXPECT_EQ(static_cast<std::int64_t>(cursors.size()), *whole.total_steps(3));
  for (std::size_t at = 0; at < cursors.size(); at += 5) {
    Packer resumed = pack(dataset, options);
    DataCursor cursor = cursors[at];
    for (std::size_t i = at; i < cursors.size(); ++i) {
      ASSERT_EQ(cursor, cursors[i]);
      ASSERT_EQ(examples_of(resumed, cursor), uninterrupted[i]);
      cursor = resumed.next(cursor);
    }
  }
}

TEST(Packer, OrdersByEpochAndSeed) {
  const Dataset dataset = make_dataset(300, 50);
  const auto plan = [&](std::uint64_t seed, std::int64_t epoch) {
    return pack(dataset, {.micro_batch_tokens = 128, .seed = seed}).plan(epoch);
  };
  EXPECT_EQ(plan(1, 0), plan(1, 0));
  EXPECT_NE(plan(1, 0), plan(1, 1));
  EXPECT_NE(plan(1, 0), plan(2, 0));
}

TEST(Packer, KeepsTheFilesOrderWithoutShufflingOrPacking) {
  const Dataset dataset = make_dataset(20, 50);
  Packer packer = pack(dataset, {.micro_batch_tokens = 128, .shuffle = false, .pack = false});
  ASSERT_EQ(packer.plan(3).size(), 20u);
  for (std::int64_t i = 0; i < 20; ++i)
    EXPECT_EQ(packer.plan(3)[static_cast<std::size_t>(i)], std::vector<std::int64_t>{i});
}

TEST(Packer, PacksLargeDataSetsWindowByWindow) {
  const Dataset dataset = make_dataset(static_cast<std::size_t>(kPackingWindow) + 100, 20);
  Packer packer = pack(dataset, {.micro_batch_tokens = 64, .shuffle = false});
  std::set<std::int64_t> early;
  std::size_t bins = 0;
  for (const auto& bin : packer.plan(0)) {
    if (early.size() == static_cast<std::size_t>(kPackingWindow)) break;
    early.insert(bin.begin(), bin.end());
    ++bins;
  }
  EXPECT_EQ(*early.rbegin(), kPackingWindow - 1) << "the first window is packed by itself";
  EXPECT_GT(packer.plan(0).size(), bins);
}

TEST(Packer, RefusesWhatCannotBePacked) {
  const Dataset dataset = make_dataset(10, 50);
  const auto refused = Packer::create(dataset, {.micro_batch_tokens = 8});
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("micro-batch holds 8"), std::string::npos);
  EXPECT_FALSE(Packer::create(Dataset{}, {}).ok());
  EXPECT_FALSE(Packer::create(dataset, {.micro_batch_tokens = 0}).ok());
  EXPECT_FALSE(Packer::create(dataset, {.gradient_accumulation_steps = 0}).ok());
  Packer packer = pack(dataset, {.micro_batch_tokens = 64});
  EXPECT_FALSE(packer.step({0, packer.steps_in_epoch(0)}).ok());
  EXPECT_FALSE(packer.step({-1, 0}).ok());
  EXPECT_FALSE(packer.total_steps(0).ok());
}

}  // namespace
}  // namespace tandem::worker::data
