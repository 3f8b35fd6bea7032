#include "worker/train/batch_source.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

namespace tandem::worker::train {
namespace {

/// `count` rows; row r has the token r everywhere, so that it can be found again.
std::shared_ptr<const data::Dataset> rows(std::int64_t count, std::int64_t length = 10) {
  auto dataset = std::make_shared<data::Dataset>();
  for (std::int64_t r = 0; r < count; ++r) {
    data::Example example;
    const std::int64_t n = length + r % 3;
    example.tokens.assign(static_cast<std::size_t>(n), static_cast<std::int32_t>(r));
    example.labels.assign(static_cast<std::size_t>(n), static_cast<std::int32_t>(r));
    example.labels.back() = data::kIgnore;
    example.line = r + 1;
    dataset->examples.push_back(std::move(example));
  }
  return dataset;
}

protocol::TrainSettings settings() {
  protocol::TrainSettings s;
  s.per_device_train_batch_size = 4;
  s.max_length = 16;
  s.num_train_epochs = 1.0;
  return s;
}

/// Rows of each step of the whole job.
std::vector<std::multiset<std::int32_t>> rows_of_steps(BatchSource& source) {
  std::vector<std::multiset<std::int32_t>> steps;
  for (std::int64_t s = 0; s < source.total_steps(); ++s) {
    steps.emplace_back();
    const auto step = source.step(s).value();
    for (const data::MicroBatch& batch : step.micro_batches)
      for (std::size_t d = 0; d + 1 < batch.cu_seqlens.size(); ++d)
        steps.back().insert(batch.tokens[static_cast<std::size_t>(batch.cu_seqlens[d])]);
  }
  return steps;
}

TEST(PackedBatches, EveryEpochTrainsEveryRowOnce) {
  protocol::TrainSettings s = settings();
  s.num_train_epochs = 2.0;
  s.gradient_accumulation_steps = 2;
  const auto source = make_packed_batches(rows(50), nullptr, s).value();
  std::map<std::int32_t, int> seen;
  for (const auto& step : rows_of_steps(*source))
    for (std::int32_t row : step) ++seen[row];
  ASSERT_EQ(seen.size(), 50u);
  for (const auto& [row, count] : seen) EXPECT_EQ(count, 2) << row;
}

TEST(PackedBatches, StepIsAPureFunctionOfItsIndex) {
  protocol::TrainSettings s = settings();
  s.num_train_epochs = 3.0;
  const auto a = make_packed_batches(rows(40), nullptr, s).value();
  const auto b = make_packed_batches(rows(40), nullptr, s).value();
  ASSERT_EQ(a->total_steps(), b->total_steps());
  std::vector<std::vector<std::int32_t>> forward;
  for (std::int64_t step = 0; step < b->total_steps(); ++step)
    forward.push_back(b->step(step).value().micro_batches[0].tokens);
  // Backwards, over the ends of epochs, by another source.
  for (std::int64_t step = b->total_steps(); step-- > 0;)
    EXPECT_EQ(a->step(step).value().micro_batches[0].tokens,
              forward[static_cast<std::size_t>(step)]);
}

TEST(PackedBatches, SeedChangesTheOrder) {
  protocol::TrainSettings s = settings();
  auto a = make_packed_batches(rows(60), nullptr, s).value();
  s.seed = 43;
  auto b = make_packed_batches(rows(60), nullptr, s).value();
  EXPECT_NE(rows_of_steps(*a), rows_of_steps(*b));
}

TEST(PackedBatches, FractionsOfAnEpochAndMaxStepsCutTheJob) {
  protocol::TrainSettings s = settings();
  const std::int64_t epoch = make_packed_batches(rows(64), nullptr, s).value()->total_steps();
  ASSERT_GE(epoch, 8);
  s.num_train_epochs = 0.5;
  EXPECT_EQ(make_packed_batches(rows(64), nullptr, s).value()->total_steps(), (epoch + 1) / 2);
  s.max_steps = 3;
  EXPECT_EQ(make_packed_batches(rows(64), nullptr, s).value()->total_steps(), 3);
  s.max_steps = epoch * 2 + 1;  // overrides the epochs
  EXPECT_EQ(make_packed_batches(rows(64), nullptr, s).value()->total_steps(), epoch * 2 + 1);
}

TEST(PackedBatches, WithoutPackingAMicroBatchHoldsTheRowsOfItsSize) {
  protocol::TrainSettings s = settings();
  s.packing = false;
  s.gradient_accumulation_steps = 2;
  const auto source = make_packed_batches(rows(19), nullptr, s).value();
  EXPECT_EQ(source->total_steps(), 3);  // 8 + 8 + 3 rows
  const auto first = source->step(0).value();
  ASSERT_EQ(first.micro_batches.size(), 2u);
  EXPECT_EQ(first.micro_batches[0].cu_seqlens.size(), 5u);
  const auto last = source->step(2).value();
  ASSERT_EQ(last.micro_batches.size(), 1u);
  EXPECT_EQ(last.micro_batches[0].cu_seqlens.size(), 4u);
}

TEST(PackedBatches, EvalSplitHoldsRowsOutAndTheSeedChoosesThem) {
  protocol::TrainSettings s = settings();
  s.eval_split = 0.2;
  const auto source = make_packed_batches(rows(50), nullptr, s).value();
  std::set<std::int32_t> held, trained;
  for (const data::MicroBatch& batch : source->eval_batches())
    held.insert(batch.tokens.begin(), batch.tokens.end());
  for (const auto& step : rows_of_steps(*source)) trained.insert(step.begin(), step.end());
  EXPECT_EQ(held.size(), 10u);
  EXPECT_EQ(trained.size(), 40u);
  for (std::int32_t row : held) EXPECT_FALSE(trained.contains(row)) << row;
  s.eval_split = 0.001;
  const auto none = make_packed_batches(rows(50), nullptr, s);
  EXPECT_EQ(none.status().code(), StatusCode::kInvalid);
}

TEST(PackedBatches, AnEvalSetOverridesTheSplit) {
  protocol::TrainSettings s = settings();
  s.eval_split = 0.2;
  const auto source = make_packed_batches(rows(20), rows(5), s).value();
  std::set<std::int32_t> trained;
  for (const auto& step : rows_of_steps(*source)) trained.insert(step.begin(), step.end());
  EXPECT_EQ(trained.size(), 20u);
  std::int64_t documents = 0;
  for (const data::MicroBatch& batch : source->eval_batches())
    documents += static_cast<std::int64_t>(batch.cu_seqlens.size()) - 1;
  EXPECT_EQ(documents, 5);
}

TEST(PackedBatches, BoundsAreTheLargestThatReallyCome) {
  protocol::TrainSettings s = settings();
  s.num_train_epochs = 2.0;
  const auto source = make_packed_batches(rows(33), rows(3, 14), s).value();
  BatchBounds seen;
  for (std::int64_t step = 0; step < source->total_steps(); ++step) {
    const data::OptimizerStep batches = source->step(step).value();
    for (const data::MicroBatch& batch : batches.micro_batches) seen.include(batch);
  }
  for (const data::MicroBatch& batch : source->eval_batches()) seen.include(batch);
  EXPECT_EQ(source->bounds().micro_batch_tokens, seen.micro_batch_tokens);
  EXPECT_EQ(source->bounds().micro_batch_sequences, seen.micro_batch_sequences);
  EXPECT_EQ(source->bounds().sequence_tokens, seen.sequence_tokens);
  EXPECT_EQ(seen.sequence_tokens, 16);
}

TEST(PackedBatches, RowsLongerThanAMicroBatchAreRefused) {
  protocol::TrainSettings s = settings();
  const auto source = make_packed_batches(rows(3, 100), nullptr, s);
  EXPECT_EQ(source.status().code(), StatusCode::kInvalid);
}

}  // namespace
}  // namespace tandem::worker::train
