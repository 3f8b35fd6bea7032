#include "protocol/base/random.h"
#include "worker/train/batch_source.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tandem::worker::train {

namespace {

/// Random stream of the evaluation split; packing and initialisation have others.
constexpr std::uint64_t kSplitStream = 0x73706c6974;  // "split"

struct Split {
  std::shared_ptr<const data::Dataset> train, eval;
};

/// Holds out a share of the rows, chosen by seed; both parts keep the file's order.
Result<Split> split(std::shared_ptr<const data::Dataset> all, double share, std::uint64_t seed) {
  const auto rows = static_cast<std::int64_t>(all->examples.size());
  const auto held = static_cast<std::int64_t>(std::llround(share * static_cast<double>(rows)));
  if (held < 1 || held >= rows)
    return invalid_error(str("eval_split ", share, " of ", rows, " rows leaves ", held,
                             " rows to evaluate and ", rows - held, " to train on"));
  std::vector<std::int64_t> order(static_cast<std::size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  Random(seed, kSplitStream).shuffle(order);
  std::sort(order.begin(), order.begin() + held);
  auto train = std::make_shared<data::Dataset>();
  auto eval = std::make_shared<data::Dataset>();
  train->report = eval->report = all->report;
  auto next = order.begin();
  for (std::int64_t row = 0; row < rows; ++row) {
    const bool is_held = next != order.begin() + held && *next == row;
    if (is_held) ++next;
    (is_held ? eval : train)->examples.push_back(all->examples[static_cast<std::size_t>(row)]);
  }
  return Split{std::move(train), std::move(eval)};
}

data::PackingOptions packing_options(const protocol::TrainSettings& settings, bool shuffle,
                                     bool pack) {
  data::PackingOptions options;
  options.micro_batch_tokens = settings.per_device_train_batch_size * settings.max_length;
  options.gradient_accumulation_steps = 1;  // steps are cut here, from the plan
  options.seed = static_cast<std::uint64_t>(settings.seed);
  options.shuffle = shuffle;
  options.pack = pack;
  return options;
}

class PackedBatches final : public BatchSource {
 public:
  PackedBatches(std::shared_ptr<const data::Dataset> train, data::Packer packer,
                const protocol::TrainSettings& settings)
      : train_(std::move(train)),
        packer_(std::move(packer)),
        rows_per_batch_(settings.packing ? 1 : settings.per_device_train_batch_size),
        batches_per_step_(settings.gradient_accumulation_steps) {}

  Status plan(const protocol::TrainSettings& settings) {
    const double epochs = settings.num_train_epochs;
    for (std::int64_t epoch = 0; epoch < data::kEpochsMax; ++epoch) {
      const std::int64_t whole = steps_in(epoch);
      std::int64_t take = whole;
      if (settings.max_steps > 0)
        take = std::min(take, settings.max_steps - total_steps());
      else
        take = std::min(take, static_cast<std::int64_t>(
                                  std::ceil(std::max(0.0, epochs - static_cast<double>(epoch)) *
                                            static_cast<double>(whole))));
      if (take <= 0) return {};
      if (epoch == 0) steps_per_epoch_ = whole;
      for (std::int64_t k = 0; k < take; ++k) widen_by_step(epoch, k);
      first_step_.push_back(total_steps() + take);
    }
    return invalid_error(str("num_train_epochs ", epochs, " with max_steps ", settings.max_steps,
                             " needs more than ", data::kEpochsMax, " passes over the data"));
  }
  void set_eval(std::vector<data::MicroBatch> eval) {
    eval_ = std::move(eval);
    for (const data::MicroBatch& batch : eval_) bounds_.include(batch);
  }

  [[nodiscard]] std::int64_t total_steps() const override { return first_step_.back(); }
  [[nodiscard]] std::int64_t steps_per_epoch() const override { return steps_per_epoch_; }
  Result<data::OptimizerStep> step(std::int64_t index) override {
    TANDEM_CHECK(index >= 0 && index < total_steps(), "step ", index, " of ", total_steps());
    const auto after = std::upper_bound(first_step_.begin(), first_step_.end(), index);
    const std::int64_t epoch = after - first_step_.begin() - 1;
    data::OptimizerStep step;
    for (const auto& examples : examples_of(epoch, index - *(after - 1))) {
      step.micro_batches.push_back(packer_.assemble(examples));
      step.trained_tokens += step.micro_batches.back().trained_tokens;
    }
    return step;
  }
  [[nodiscard]] const std::vector<data::MicroBatch>& eval_batches() const override { return eval_; }
  [[nodiscard]] const BatchBounds& bounds() const override { return bounds_; }

 private:
  [[nodiscard]] std::int64_t steps_in(std::int64_t epoch) {
    const auto rows = static_cast<std::int64_t>(packer_.plan(epoch).size());
    const std::int64_t per_step = rows_per_batch_ * batches_per_step_;
    return (rows + per_step - 1) / per_step;
  }
  /// The examples of each micro-batch of step k of an epoch.
  [[nodiscard]] std::vector<std::vector<std::int64_t>> examples_of(std::int64_t epoch,
                                                                   std::int64_t k) {
    const data::EpochPlan& plan = packer_.plan(epoch);
    const auto rows = static_cast<std::int64_t>(plan.size());
    std::vector<std::vector<std::int64_t>> batches;
    std::int64_t row = k * rows_per_batch_ * batches_per_step_;
    for (std::int64_t b = 0; b < batches_per_step_ && row < rows; ++b) {
      std::vector<std::int64_t> examples;
      for (std::int64_t r = 0; r < rows_per_batch_ && row < rows; ++r, ++row)
        examples.insert(examples.end(), plan[static_cast<std::size_t>(row)].begin(),
                        plan[static_cast<std::size_t>(row)].end());
      batches.push_back(std::move(examples));
    }
    return batches;
  }
  void widen_by_step(std::int64_t epoch, std::int64_t k) {
    for (const auto& examples : examples_of(epoch, k)) {
      std::int64_t tokens = 0;
      for (std::int64_t e : examples) {
        const auto length =
            static_cast<std::int64_t>(train_->examples[static_cast<std::size_t>(e)].tokens.size());
        tokens += length;
        bounds_.sequence_tokens = std::max(bounds_.sequence_tokens, length);
      }
      bounds_.micro_batch_tokens = std::max(bounds_.micro_batch_tokens, tokens);
      bounds_.micro_batch_sequences =
          std::max(bounds_.micro_batch_sequences, static_cast<std::int64_t>(examples.size()));
    }
  }

  const std::shared_ptr<const data::Dataset> train_;
  data::Packer packer_;
  const std::int64_t rows_per_batch_, batches_per_step_;
  std::int64_t steps_per_epoch_ = 0;
  std::vector<std::int64_t> first_step_{0};  ///< of each epoch, then the total
  std::vector<data::MicroBatch> eval_;
  BatchBounds bounds_;
};

}  // namespace

Result<std::unique_ptr<BatchSource>> make_packed_batches(std::shared_ptr<const data::Dataset> train,
                                                         std::shared_ptr<const data::Dataset> eval,
                                                         const protocol::TrainSettings& settings) {
  if (eval == nullptr && settings.eval_split > 0.0) {
    TANDEM_ASSIGN_OR_RETURN(
        Split parts, split(train, settings.eval_split, static_cast<std::uint64_t>(settings.seed)));
    train = std::move(parts.train);
    eval = std::move(parts.eval);
  }
  TANDEM_ASSIGN_OR_RETURN(
      data::Packer packer,
      data::Packer::create(*train, packing_options(settings, true, settings.packing)));
  auto batches = std::make_unique<PackedBatches>(train, std::move(packer), settings);
  TANDEM_RETURN_IF_ERROR(batches->plan(settings));
  if (eval != nullptr && !eval->examples.empty()) {
    TANDEM_ASSIGN_OR_RETURN(data::Packer eval_packer,
                            data::Packer::create(*eval, packing_options(settings, false, true)));
    std::vector<data::MicroBatch> cut;
    for (const auto& examples : eval_packer.plan(0)) cut.push_back(eval_packer.assemble(examples));
    batches->set_eval(std::move(cut));
  }
  return std::unique_ptr<BatchSource>(std::move(batches));
}

}  // namespace tandem::worker::train
