// What a session writes and reads between its slices: checkpoints, and the probe of a publish.
#include "worker/model/host_copy.h"
#include "worker/train/train_session_impl.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

namespace tandem::worker::train {
namespace {

using kernels::ArenaScope;
using kernels::Tensor;
using Json = nlohmann::json;

constexpr int kStateVersion = 1;

/// The largest difference. A NaN on one side only must not look like agreement.
double largest_difference(std::span<const float> a, std::span<const float> b) {
  double worst = 0.0;
  for (std::size_t e = 0; e < a.size(); ++e) {
    const double difference = std::fabs(static_cast<double>(a[e]) - b[e]);
    worst = std::isnan(difference) ? std::numeric_limits<double>::infinity()
                                   : std::max(worst, difference);
  }
  return worst;
}

double difference_of_halves(std::span<const float> all) {
  return largest_difference(all.first(all.size() / 2), all.last(all.size() / 2));
}

/// Settings that may differ between a checkpoint and the job that continues from it: they change
/// what is reported or kept, or who computes what, not the mathematics.
const std::set<std::string>& free_settings() {
  static const std::set<std::string> names{"adapter_dtype",
                                           "eval_steps",
                                           "logging_steps",
                                           "save_steps",
                                           "save_total_limit",
                                           "recompute",
                                           "dp",
                                           "dp_min",
                                           "tp",
                                           "pp",
                                           "virtual_pipeline_size",
                                           "pipeline_balance",
                                           "sequence_parallel",
                                           "zero",
                                           "layout",
                                           "ranks_max"};
  return names;
}

}  // namespace

// -- state
// -----------------------------------------------------------------------------------------

TrainState TrainSession::Impl::export_state() const {
  TrainState state;
  Json json{{"version", kStateVersion},
            {"step", step_},
            {"total_steps", batches_->total_steps()},
            {"seed", options_.settings.seed},
            {"compute_dtype", dtype_name(parts_.context.compute_dtype)},
            {"settings", Json::parse(options_.settings.to_json())}};
  if (scaler_.active()) json["loss_scale"] = Json::parse(scaler_.to_json());
  if (phase_ == Phase::kEval) json["eval_due"] = true;  // of this step, and not done
  state.json = json.dump();
  state.tensors = params_.export_tensors(false);
  return state;
}

Status TrainSession::Impl::read_state(const std::string& text, const StateSource& tensors) {
  TANDEM_CHECK(!started_, "a state is imported before the first slice");
  const Json json = Json::parse(text, nullptr, false);
  if (!json.is_object() || !json.contains("version") || !json["version"].is_number_integer() ||
      !json.contains("settings") || !json["settings"].is_object() || !json.contains("step") ||
      !json["step"].is_number_integer() || !json.contains("total_steps") ||
      !json.contains("compute_dtype"))
    return corrupt_error("the checkpoint's state is not the JSON object that training wrote");
  if (json["version"] != kStateVersion)
    return refused_error(str("the checkpoint has version ", json["version"].dump(),
                             "; this build reads ", kStateVersion));
  const Json now = Json::parse(options_.settings.to_json());
  for (const auto& [name, value] : now.items())
    if (!free_settings().contains(name) &&
        (!json["settings"].contains(name) || json["settings"][name] != value))
      return conflict_error(
          str("the checkpoint was made with ", name, " = ",
              json["settings"].contains(name) ? json["settings"][name].dump() : "nothing",
              "; the job says ", value.dump()));
  if (json["compute_dtype"] != dtype_name(parts_.context.compute_dtype))
    return conflict_error(str("the checkpoint was computed in ", json["compute_dtype"].dump(),
                              "; this engine computes in ",
                              dtype_name(parts_.context.compute_dtype)));
  if (json["total_steps"] != batches_->total_steps())
    return conflict_error(str("the checkpoint belongs to a job of ", json["total_steps"].dump(),
                              " steps; this data gives ", batches_->total_steps()));
  const auto step = json["step"].get<std::int64_t>();
  if (step < 0 || step > batches_->total_steps())
    return corrupt_error(str("the checkpoint is at step ", step, " of ", batches_->total_steps()));
  read_step_ = step;
  read_scaler_ = scaler_;
  read_eval_due_ = has_eval() && json.value("eval_due", Json()) == true;
  if (scaler_.active() != json.contains("loss_scale"))
    return conflict_error(scaler_.active()
                              ? "the checkpoint has no loss_scale, which this job needs"
                              : "the checkpoint has a loss_scale, this job has none");
  if (scaler_.active()) TANDEM_RETURN_IF_ERROR(read_scaler_.read(json["loss_scale"].dump()));
  return params_.read_tensors(tensors);
}

void TrainSession::Impl::take_state() {
  params_.take_tensors();
  step_ = read_step_;
  scaler_ = read_scaler_;
  if (step_ == batches_->total_steps())
    phase_ = has_eval() ? Phase::kEval : Phase::kFinished;
  else if (read_eval_due_)
    phase_ = Phase::kEval;
  else if (step_ > 0)
    phase_ = Phase::kTrain;
}

// -- probe
// -----------------------------------------------------------------------------------------

std::vector<std::int32_t> probe_prompt(std::span<const std::int32_t> document) {
  TANDEM_CHECK(!document.empty());
  const std::int32_t first = document.front();
  const auto other = std::find_if(document.begin(), document.end(),
                                  [&](std::int32_t token) { return token != first; });
  return {first, other != document.end() ? *other : first == 0 ? 1 : 0};
}

double TrainSession::Impl::probe(const std::vector<std::int32_t>& prompt,
                                 std::shared_ptr<const model::AdapterWeights> other) {
  TANDEM_CHECK_EQ(std::ssize(prompt), kProbeTokens);
  kernels::Exec exec = parts_.context.exec;
  exec.background = true;  // beside it, the adapter is hashed and uploaded
  model::Context ctx{parts_.context.ops, exec, parts_.context.comm, parts_.context.activations,
                     parts_.context.compute_dtype};
  ArenaScope scope(ctx.activations);
  // One pass for both: the prompt twice in a batch, once under each adapter of a table of our own.
  const std::int64_t rank_max = std::max(params_.rank_max(), other->rank_max);
  model::AdapterTable table(ctx.ops, ctx.exec, ctx.activations, transformer_.config(), 2);
  params_.attach(table, 0);
  table.set(ctx.exec, 1, std::move(other));
  const model::Transformer both(params_.weights(), &table, {0, transformer_.config().layers});
  const model::TokenBatch batch = upload_twice(ctx, prompt, rank_max);
  const Tensor hidden =
      ctx.activations.alloc({batch.tokens(), transformer_.config().width}, ctx.compute_dtype);
  both.forward(ctx, batch, {}, hidden, nullptr, recompute_);
  const Tensor ends = ctx.activations.alloc({2, transformer_.config().width}, ctx.compute_dtype);
  for (std::int64_t half = 0; half < 2; ++half)
    ctx.ops.copy(ctx.exec, hidden.rows((half + 1) * kProbeTokens - 1, 1), ends.rows(half, 1));
  // Of equal streams the head makes equal logits, and reading it takes as long as several blocks.
  const std::vector<float> streams = model::download_floats(ctx.ops, ctx.exec, ends);
  if (difference_of_halves(streams) == 0) return 0;
  const Tensor device = ctx.activations.alloc({2, transformer_.config().vocab}, DType::kF32);
  both.logits(ctx, ends, device);
  return difference_of_halves(model::download_floats(ctx.ops, ctx.exec, device));
}

std::vector<float> TrainSession::Impl::prompt_logits(const std::vector<std::int32_t>& prompt) {
  const auto tokens = static_cast<std::int64_t>(prompt.size());
  TANDEM_CHECK(tokens >= 1 && tokens <= kProbeTokens, tokens, " tokens");
  model::Context& ctx = parts_.context;
  ArenaScope scope(ctx.activations);
  data::MicroBatch batch;
  batch.tokens = prompt;
  batch.labels.assign(prompt.size(), data::kIgnore);
  for (std::int32_t at = 0; at < tokens; ++at) batch.positions.push_back(at);
  batch.cu_seqlens = {0, static_cast<std::int32_t>(tokens)};
  const DeviceBatch device = upload_batch(ctx, batch, {tokens, 1, tokens}, parts_.slot, 0);
  const Tensor hidden = ctx.activations.alloc({device.tokens.tokens(), transformer_.config().width},
                                              ctx.compute_dtype);
  transformer_.forward(ctx, device.tokens, {}, hidden, nullptr, recompute_);
  const Tensor out = ctx.activations.alloc({tokens, transformer_.config().vocab}, DType::kF32);
  transformer_.logits(ctx, hidden.rows(0, tokens), out);
  std::vector<float> logits(static_cast<std::size_t>(out.elements()));
  ctx.ops.download(ctx.exec, out, std::as_writable_bytes(std::span(logits)));
  return logits;
}

double TrainSession::Impl::probe_published(const std::vector<std::int32_t>& prompt,
                                           const model::TensorSource& published) {
  const std::vector<float> trained = prompt_logits(prompt);
  params_.load_weights(published);
  return largest_difference(trained, prompt_logits(prompt));
}

}  // namespace tandem::worker::train
