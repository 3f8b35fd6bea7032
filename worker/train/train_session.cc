#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "protocol/base/units.h"
#include "worker/train/lora_params.h"
#include "worker/train/rank_params.h"
#include "worker/train/schedule.h"
#include "worker/train/train_session_impl.h"

#include <cmath>

namespace tandem::worker::train {

namespace {

using kernels::ArenaScope;
using kernels::Tensor;

/// Random stream of dropout masks; the counter is the micro-batch's number in the job.
constexpr std::uint64_t kDropoutStream = 0x64726f70;  // "drop"
/// gradient_accumulation_steps never exceeds it, so (step, micro-batch) is one number.
constexpr std::int64_t kMicroBatchesMax = 4096;
constexpr std::int64_t kReserveBytes = std::int64_t{1} << 40;  ///< address space of an arena

Result<model::Recompute> parse_recompute(const std::string& name) {
  if (name == "none") return model::Recompute::kNone;
  if (name == "elementwise") return model::Recompute::kElementwise;
  if (name == "mlp") return model::Recompute::kMlp;
  if (name == "block") return model::Recompute::kBlock;
  return invalid_error(
      str("recompute is \"", name, "\"; it must be none, elementwise, mlp or block"));
}

Result<model::LoraConfig> lora_config(const protocol::TrainSettings& settings,
                                      const model::ModelConfig& config) {
  model::LoraConfig lora;
  lora.r = settings.lora_r;
  lora.lora_alpha = settings.lora_alpha;
  lora.lora_dropout = settings.lora_dropout;
  lora.use_rslora = settings.use_rslora;
  TANDEM_ASSIGN_OR_RETURN(lora.target_modules,
                          model::LoraConfig::resolve_targets(config, settings.target_modules));
  return lora;
}

Result<std::unique_ptr<Trainable>> make_trainable(const SessionParts& parts,
                                                  const protocol::TrainSettings& settings,
                                                  const model::LoraConfig& lora) {
  const bool full = settings.method == "full";
  if (!full && settings.method != "lora")
    return refused_error(
        str("method \"", settings.method, "\" is not supported; lora and full are"));
  const bool many = parts.ranks != nullptr && parts.ranks->layout.ranks() > 1;
  if (!full && lora.lora_dropout > 0.0 && many && parts.ranks->layout.tp > 1)
    return refused_error("lora_dropout over tensor-parallel ranks is not supported yet");
  if (full || many) {
    TANDEM_ASSIGN_OR_RETURN(auto params,
                            RankParams::create(parts, full ? std::nullopt : std::optional(lora)));
    return std::unique_ptr<Trainable>(std::move(params));
  }
  return std::unique_ptr<Trainable>(std::make_unique<LoraParams>(parts, lora));
}

double seconds_since(std::int64_t begin_ns) {
  return static_cast<double>(steady_ns() - begin_ns) * 1e-9;
}

/// Adds the time from construction to destruction to a counter.
class PhaseTimer {
 public:
  explicit PhaseTimer(std::int64_t& total) : total_(total), begin_(steady_ns()) {}
  ~PhaseTimer() { total_ += steady_ns() - begin_; }
  PhaseTimer(const PhaseTimer&) = delete;
  PhaseTimer& operator=(const PhaseTimer&) = delete;

 private:
  std::int64_t& total_;
  const std::int64_t begin_;
};

}  // namespace

// -- training
// --------------------------------------------------------------------------------------

/// Where collectives of the residual stream go on in the background: what they read. On CPUs they
/// do not, and rows are not cut.
void TrainSession::Impl::make_room() {
  model::Context& ctx = parts_.context;
  if (row_parts() == 1 || !ctx.comm.has_background()) return;
  room_arena_ = std::make_unique<kernels::Arena>(
      parts_.allocator, parts_.ledger, kernels::MemoryKind::kActivations, "rows between ranks",
      kReserveBytes, kernels::Sharing::kPeers);
  const BatchBounds& bounds = batches_->bounds();
  room_ = model::make_stream_room(ctx, *room_arena_,
                                  device_rows(bounds.micro_batch_tokens, bounds, row_parts()),
                                  transformer_.config().width, parts_.ranks->stream_part_bytes);
  ctx.room = &*room_;
}

Status TrainSession::Impl::begin_step() {
  PhaseTimer timer(times_.data);
  TANDEM_ASSIGN_OR_RETURN(current_, batches_->step(step_));
  if (current_->trained_tokens < 1)
    return invalid_error(str("optimizer step ", step_ + 1, " has no trained tokens"));
  deal_micro_batches();
  next_micro_batch_ = 0;
  loss_sum_ = 0.0;
  step_seconds_ = 0.0;
  params_.zero_gradients();
  return {};
}

/// Micro-batches go round the data-parallel ranks in turn. All do as many rounds, because they meet
/// in collectives: one without a share repeats the step's first micro-batch with nothing trained.
void TrainSession::Impl::deal_micro_batches() {
  const auto count = static_cast<std::int64_t>(current_->micro_batches.size());
  local_.clear();
  if (count % dp_size() != 0) {
    idle_ = current_->micro_batches.front();
    std::fill(idle_.labels.begin(), idle_.labels.end(), data::kIgnore);
    idle_.trained_tokens = 0;
  }
  for (std::int64_t first = 0; first < count; first += dp_size()) {
    const std::int64_t mine = first + dp_rank();
    if (mine < count)
      local_.push_back({&current_->micro_batches[static_cast<std::size_t>(mine)], mine});
    else
      local_.push_back({&idle_, 0});
  }
}

Result<SliceEvent> TrainSession::Impl::train_slice() {
  const std::int64_t begin = steady_ns();
  if (!current_) TANDEM_RETURN_IF_ERROR(begin_step());
  if (pipelined()) {  // all micro-batches are under way together
    loss_sum_ += run_pipeline();
    next_micro_batch_ = local_.size();
  } else {
    loss_sum_ += run_micro_batch(local_[next_micro_batch_]);
    ++next_micro_batch_;
  }
  if (next_micro_batch_ < local_.size()) {
    step_seconds_ += seconds_since(begin);
    return SliceEvent(Progress{step_});
  }
  TANDEM_ASSIGN_OR_RETURN(SliceEvent event, finish_step());
  std::get<StepDone>(event).seconds = step_seconds_ + seconds_since(begin);
  return event;
}

DeviceBatch TrainSession::Impl::upload(model::Context& ctx, const LocalBatch& batch) const {
  DeviceBatch device = upload_batch(ctx, *batch.batch, batches_->bounds(), parts_.slot,
                                    params_.rank_max(), row_parts());
  device.tokens.adapters.dropout = static_cast<float>(lora_.lora_dropout);
  device.tokens.adapters.dropout_seed =
      random_bits(static_cast<std::uint64_t>(options_.settings.seed), kDropoutStream,
                  static_cast<std::uint64_t>(step_ * kMicroBatchesMax + batch.index));
  return device;
}

double TrainSession::Impl::run_pipeline() {
  PhaseTimer timer(times_.backward);
  std::vector<std::int64_t> rows;
  for (const LocalBatch& batch : local_)
    rows.push_back(device_rows(static_cast<std::int64_t>(batch.batch->tokens.size()),
                               batches_->bounds(), row_parts()));
  return pipeline_->run(
      {std::move(rows), [&](model::Context& ctx, std::size_t m) { return upload(ctx, local_[m]); },
       gradient_scale(), params_.sink(),
       static_cast<int>(options_.settings.gradient_accumulation_steps / dp_size())});
}

double TrainSession::Impl::run_micro_batch(const LocalBatch& batch) {
  model::Context& ctx = parts_.context;
  ArenaScope scope(ctx.activations);
  const DeviceBatch device = upload(ctx, batch);
  const std::int64_t tokens = device.tokens.tokens();
  const kernels::Shape rows{tokens / row_parts(), transformer_.config().width};
  const Tensor loss = ctx.activations.alloc({tokens}, sum_dtype(ctx.compute_dtype));
  const Tensor dhidden = ctx.activations.alloc(rows, ctx.compute_dtype);
  const Tensor hidden = ctx.activations.alloc(rows, ctx.compute_dtype);
  model::Saved saved;
  {
    PhaseTimer timer(times_.forward);
    transformer_.forward(ctx, device.tokens, {}, hidden, &saved, recompute_);
  }
  {
    PhaseTimer timer(times_.loss);
    transformer_.loss(ctx, hidden, device.labels, gradient_scale(), loss, {}, dhidden,
                      &params_.sink());
  }
  {
    PhaseTimer timer(times_.backward);
    transformer_.backward(ctx, device.tokens, dhidden, saved, recompute_, {}, params_.sink());
  }
  params_.weights().settle();
  return sum_rows(ctx, loss);
}

Result<SliceEvent> TrainSession::Impl::finish_step() {
  PhaseTimer timer(times_.optimizer);
  params_.measure_gradients();
  params_.weights().settle();
  const double norm = std::sqrt(sum_rows(parts_.context, params_.squared_norm())) / scaler_.scale();
  sum_over_ranks(parts_.ranks, parts_.context, {&loss_sum_, 1});
  const auto trained = static_cast<double>(current_->trained_tokens);
  const double loss = loss_sum_ / trained;
  TANDEM_RETURN_IF_ERROR(check_step(loss, norm));
  const double rate = learning_rate(options_.settings, batches_->total_steps(), step_);
  StepDone done;
  done.loss_scale = scaler_.scale();
  done.skipped = !std::isfinite(norm);
  if (done.skipped) {
    scaler_.skip();
  } else {
    // Skipped steps have left no trace in the moments.
    params_.update(options_.settings, rate, step_ + 1 - scaler_.skipped(), 1.0 / scaler_.scale());
    scaler_.took();
  }
  ++step_;
  done.skipped_steps = scaler_.skipped();
  done.step = step_;
  done.total_steps = batches_->total_steps();
  done.epoch = static_cast<double>(step_) / static_cast<double>(batches_->steps_per_epoch());
  done.loss = loss;
  done.learning_rate = rate;
  done.grad_norm = norm;
  done.trained_tokens = current_->trained_tokens;
  for (const data::MicroBatch& batch : current_->micro_batches)
    done.tokens += static_cast<std::int64_t>(batch.tokens.size());
  current_.reset();
  phase_after_step();
  return SliceEvent(done);
}

/// The loss is never scaled: what is not finite there has overflowed in the forward pass.
Status TrainSession::Impl::check_step(double loss, double norm) const {
  const std::string where =
      str("training diverged at step ", step_ + 1, " of ", batches_->total_steps(), ": loss ", loss,
          ", gradient norm ", norm, "; ");
  if (!std::isfinite(loss) && parts_.context.compute_dtype == DType::kF16)
    return refused_error(str(where, "in f16 nothing may exceed 65504, and some activation did: ",
                             "train on workers with --dtype bf16"));
  if (std::isfinite(loss) && (std::isfinite(norm) || scaler_.can_lower())) return {};
  return refused_error(str(where, "lower learning_rate (", options_.settings.learning_rate,
                           ") or look at the data"));
}

void TrainSession::Impl::phase_after_step() {
  const protocol::TrainSettings& settings = options_.settings;
  const bool last = step_ == batches_->total_steps();
  const auto due = [&](std::int64_t every) { return every > 0 && step_ % every == 0; };
  if (has_eval() && (last || due(settings.eval_steps)))
    phase_ = Phase::kEval;
  else if (last || due(settings.save_steps))
    phase_ = Phase::kCheckpoint;
  else
    phase_ = Phase::kTrain;
}

// -- evaluation
// ------------------------------------------------------------------------------------

Result<SliceEvent> TrainSession::Impl::eval_slice() {
  const std::int64_t begin = steady_ns();
  const bool base = phase_ == Phase::kBaseEval;
  model::Context& ctx = parts_.context;
  {
    ArenaScope scope(ctx.activations);
    const auto& all = batches_->eval_batches();
    const std::size_t mine = next_eval_batch_ + static_cast<std::size_t>(dp_rank());
    const data::MicroBatch& batch = all[mine < all.size() ? mine : 0];
    const DeviceBatch device = upload_batch(ctx, batch, batches_->bounds(), base ? -1 : parts_.slot,
                                            base ? 0 : params_.rank_max(), row_parts());
    const std::int64_t tokens = device.tokens.tokens();
    const kernels::Shape rows{tokens / row_parts(), transformer_.config().width};
    const Tensor hidden = ctx.activations.alloc(rows, ctx.compute_dtype);
    const Tensor loss = ctx.activations.alloc({tokens}, sum_dtype(ctx.compute_dtype));
    const Tensor correct = ctx.activations.alloc({tokens}, sum_dtype(ctx.compute_dtype));
    if (pipelined())
      pipeline_->forward_only(device, hidden);
    else
      transformer_.forward(ctx, device.tokens, {}, hidden, nullptr, recompute_);
    if (parts_.weights.base().has_head() && mine < all.size()) {
      transformer_.loss(ctx, hidden, device.labels, 0.0f, loss, correct, {});
      params_.weights().settle();
      eval_loss_ += sum_rows(ctx, loss);
      eval_correct_ += sum_rows(ctx, correct);
    }
  }
  eval_seconds_ += seconds_since(begin);
  next_eval_batch_ += static_cast<std::size_t>(dp_size());
  if (next_eval_batch_ < batches_->eval_batches().size()) return SliceEvent(Progress{step_});
  for (const data::MicroBatch& batch : batches_->eval_batches())
    eval_tokens_ += batch.trained_tokens;
  sum_over_ranks(parts_.ranks, parts_.context, {&eval_loss_, 1});
  sum_over_ranks(parts_.ranks, parts_.context, {&eval_correct_, 1});
  const auto tokens = static_cast<double>(std::max<std::int64_t>(1, eval_tokens_));
  const EvalDone done{step_,        base,         eval_loss_ / tokens, eval_correct_ / tokens,
                      eval_tokens_, eval_seconds_};
  next_eval_batch_ = 0;
  eval_loss_ = eval_correct_ = eval_seconds_ = 0.0;
  eval_tokens_ = 0;
  const bool last = step_ == batches_->total_steps();
  const bool save =
      last || (options_.settings.save_steps > 0 && step_ % options_.settings.save_steps == 0);
  phase_ = base ? Phase::kTrain : save ? Phase::kCheckpoint : Phase::kTrain;
  return SliceEvent(done);
}

// -- the public face
// -------------------------------------------------------------------------------

TrainSession::TrainSession(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TrainSession::~TrainSession() = default;

Result<std::unique_ptr<TrainSession>> TrainSession::create(const SessionParts& parts,
                                                           const SessionOptions& options,
                                                           std::unique_ptr<BatchSource> batches) {
  const model::ModelConfig& config = parts.weights.base().config();
  TANDEM_CHECK(parts.slot >= 0 && parts.slot < parts.adapters.slots(), "slot ", parts.slot);
  TANDEM_CHECK(parts.weights.base().dtype() == parts.context.compute_dtype);
  TANDEM_ASSIGN_OR_RETURN(model::LoraConfig lora, lora_config(options.settings, config));
  TANDEM_ASSIGN_OR_RETURN(const model::Recompute recompute,
                          parse_recompute(options.settings.recompute));
  const BatchBounds& bounds = batches->bounds();
  if (bounds.sequence_tokens > config.context_max)
    return invalid_error(str("the longest row has ", bounds.sequence_tokens,
                             " tokens; the model's context is ", config.context_max,
                             "; lower max_length or choose over_length drop or truncate"));
  TANDEM_ASSIGN_OR_RETURN(auto params, make_trainable(parts, options.settings, lora));
  auto impl = std::make_unique<Impl>(parts, options, std::move(lora), std::move(params), recompute,
                                     std::move(batches));
  TANDEM_RETURN_IF_ERROR(impl->initialise());
  return std::unique_ptr<TrainSession>(new TrainSession(std::move(impl)));
}

Result<SliceEvent> TrainSession::run_slice() {
  return impl_->run_slice();
}
std::int64_t TrainSession::step() const {
  return impl_->step_;
}
std::int64_t TrainSession::total_steps() const {
  return impl_->batches_->total_steps();
}
bool TrainSession::finished() const {
  return impl_->phase_ == Impl::Phase::kFinished;
}
const model::LoraConfig& TrainSession::lora() const {
  return impl_->lora_;
}
TrainState TrainSession::export_state() const {
  return impl_->export_state();
}
Status TrainSession::import_state(const TrainState& state) {
  TANDEM_RETURN_IF_ERROR(impl_->read_state(state.json, WholeState(state)));
  impl_->take_state();
  return {};
}
Status TrainSession::read_state(const std::string& json, const StateSource& tensors) {
  return impl_->read_state(json, tensors);
}
void TrainSession::take_state() {
  impl_->take_state();
}
std::shared_ptr<const model::AdapterWeights> TrainSession::snapshot_adapter() const {
  return impl_->params_.snapshot();
}
std::vector<model::HostAdapterTensor> TrainSession::host_adapter(DType dtype) const {
  return impl_->params_.host_adapter(dtype);
}
model::FlatAdapter TrainSession::flat_adapter(DType dtype) const {
  return impl_->params_.flat_adapter(dtype);
}
std::int64_t TrainSession::flat_elements() const {
  return impl_->params_.flat_elements();
}
double TrainSession::probe(const std::vector<std::int32_t>& prompt,
                           std::shared_ptr<const model::AdapterWeights> other) {
  return impl_->probe(prompt, std::move(other));
}
std::vector<StateTensor> TrainSession::export_weights() const {
  return impl_->params_.export_tensors(true);
}
double TrainSession::probe_published(const std::vector<std::int32_t>& prompt,
                                     const model::TensorSource& published) {
  return impl_->probe_published(prompt, published);
}
const TrainSession::PhaseTimes& TrainSession::phase_times() const {
  return impl_->times_;
}

}  // namespace tandem::worker::train
