#include "worker/data/packing.h"

#include "protocol/base/random.h"

#include <algorithm>
#include <map>
#include <numeric>

namespace tandem::worker::data {
namespace {

/// Streams of the random numbers; a number of its own for each use.
constexpr std::uint64_t kShuffleStream = 0x7061636b00000001ull;
constexpr std::uint64_t kOrderStream = 0x7061636b00000002ull;

/// Best fit, longest first: each example goes where the least room is left after it (Johnson et
/// al. 1974: at most 11/9 of the fewest bins, and a bit). `window` is reordered.
EpochPlan best_fit(const std::vector<Example>& examples, std::vector<std::int64_t>& window,
                   std::int64_t capacity) {
  const auto length = [&](std::int64_t i) {
    return static_cast<std::int64_t>(examples[static_cast<std::size_t>(i)].tokens.size());
  };
  std::stable_sort(window.begin(), window.end(),
                   [&](std::int64_t a, std::int64_t b) { return length(a) > length(b); });
  EpochPlan bins;
  std::multimap<std::int64_t, std::size_t> room;  // free tokens -> bin
  for (const std::int64_t example : window) {
    const auto fit = room.lower_bound(length(example));
    std::size_t bin = bins.size();
    std::int64_t left = capacity - length(example);
    if (fit == room.end()) {
      bins.emplace_back();
    } else {
      bin = fit->second;
      left = fit->first - length(example);
      room.erase(fit);
    }
    bins[bin].push_back(example);
    if (left > 0) room.emplace(left, bin);
  }
  return bins;
}

}  // namespace

Result<Packer> Packer::create(const Dataset& dataset, PackingOptions options) {
  if (options.micro_batch_tokens < 1 || options.gradient_accumulation_steps < 1)
    return invalid_error(str("packing needs positive sizes: micro_batch_tokens ",
                             options.micro_batch_tokens, ", gradient_accumulation_steps ",
                             options.gradient_accumulation_steps));
  if (dataset.examples.empty()) return invalid_error("there are no examples to pack");
  for (const Example& example : dataset.examples) {
    const auto length = static_cast<std::int64_t>(example.tokens.size());
    if (length > options.micro_batch_tokens)
      return invalid_error(str("the row of line ", example.line, " has ", length,
                               " tokens, a micro-batch holds ", options.micro_batch_tokens,
                               "; raise the tokens of a micro-batch or lower max_length"));
  }
  return Packer(dataset, options);
}

const EpochPlan& Packer::plan(std::int64_t epoch) {
  if (epoch == planned_epoch_) return plan_;
  const std::vector<Example>& examples = dataset_->examples;
  std::vector<std::int64_t> order(examples.size());
  std::iota(order.begin(), order.end(), 0);
  const auto epoch_bits = static_cast<std::uint64_t>(epoch);
  if (options_.shuffle)
    Random(mix64(options_.seed ^ mix64(epoch_bits)), kShuffleStream).shuffle(order);
  EpochPlan bins;
  if (!options_.pack) {
    for (const std::int64_t example : order) bins.push_back({example});
  } else {
    for (std::size_t begin = 0; begin < order.size(); begin += kPackingWindow) {
      const std::size_t end = std::min(order.size(), begin + kPackingWindow);
      std::vector<std::int64_t> window(order.begin() + static_cast<std::ptrdiff_t>(begin),
                                       order.begin() + static_cast<std::ptrdiff_t>(end));
      EpochPlan packed = best_fit(examples, window, options_.micro_batch_tokens);
      std::move(packed.begin(), packed.end(), std::back_inserter(bins));
    }
    // Packing leaves the longest examples first; training should not see them in that order.
    if (options_.shuffle)
      Random(mix64(options_.seed ^ mix64(epoch_bits)), kOrderStream).shuffle(bins);
  }
  plan_ = std::move(bins);
  planned_epoch_ = epoch;
  return plan_;
}

std::int64_t Packer::steps_in_epoch(std::int64_t epoch) {
  const auto batches = static_cast<std::int64_t>(plan(epoch).size());
  const std::int64_t per_step = options_.gradient_accumulation_steps;
  return (batches + per_step - 1) / per_step;
}

Result<std::int64_t> Packer::total_steps(std::int64_t epochs) {
  if (epochs < 1 || epochs > kEpochsMax)
    return invalid_error(
        str("num_train_epochs is ", epochs, "; 1 to ", kEpochsMax, " are allowed"));
  std::int64_t total = 0;
  for (std::int64_t epoch = 0; epoch < epochs; ++epoch) total += steps_in_epoch(epoch);
  return total;
}

Result<OptimizerStep> Packer::step(DataCursor cursor) {
  if (cursor.epoch < 0 || cursor.epoch >= kEpochsMax)
    return invalid_error(
        str("the data cursor's epoch ", cursor.epoch, " is outside [0, ", kEpochsMax, ")"));
  const std::int64_t steps = steps_in_epoch(cursor.epoch);
  if (cursor.step < 0 || cursor.step >= steps)
    return invalid_error(str("the data cursor's step ", cursor.step, " is outside epoch ",
                             cursor.epoch, " of ", steps,
                             " steps; the data set or its settings are not those of the job"));
  const EpochPlan& bins = plan(cursor.epoch);
  const auto per_step = static_cast<std::size_t>(options_.gradient_accumulation_steps);
  const std::size_t begin = static_cast<std::size_t>(cursor.step) * per_step;
  OptimizerStep result;
  for (std::size_t i = begin; i < std::min(bins.size(), begin + per_step); ++i) {
    result.micro_batches.push_back(assemble(bins[i]));
    result.trained_tokens += result.micro_batches.back().trained_tokens;
  }
  return result;
}

DataCursor Packer::next(DataCursor cursor) {
  if (cursor.step + 1 < steps_in_epoch(cursor.epoch)) return {cursor.epoch, cursor.step + 1};
  return {cursor.epoch + 1, 0};
}

MicroBatch Packer::assemble(const std::vector<std::int64_t>& examples) const {
  MicroBatch batch;
  batch.examples = examples;
  batch.cu_seqlens.push_back(0);
  for (const std::int64_t index : examples) {
    TANDEM_CHECK(index >= 0 && index < static_cast<std::int64_t>(dataset_->examples.size()),
                 "example ", index);
    const Example& example = dataset_->examples[static_cast<std::size_t>(index)];
    batch.tokens.insert(batch.tokens.end(), example.tokens.begin(), example.tokens.end());
    batch.labels.insert(batch.labels.end(), example.labels.begin(), example.labels.end());
    for (std::size_t i = 0; i < example.tokens.size(); ++i)
      batch.positions.push_back(static_cast<std::int32_t>(i));
    batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    batch.trained_tokens += example.trained_tokens();
  }
  return batch;
}

}  // namespace tandem::worker::data
