#include "worker/runtime/job_host.h"

#include "protocol/base/log.h"
#include "worker/runtime/encoder.h"
#include "worker/runtime/model_files.h"
#include "worker/runtime/model_folder.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <utility>

namespace tandem::worker::runtime {
namespace {

using Json = nlohmann::json;

/// A data set by its manifest's (or, when it is one chunk, its own) digest.
Result<std::string> fetch_text(BulkClient& bulk, const Digest& digest) {
  TANDEM_ASSIGN_OR_RETURN(auto first, bulk.get(std::span(&digest, 1)));
  std::string text(reinterpret_cast<const char*>(first[0].data()), first[0].size());
  auto manifest = storage::parse_manifest(text);
  if (!manifest.ok() || manifest->kind != storage::ManifestKind::kDataset) return text;
  text.clear();
  for (const auto& tensor : manifest->tensors) {
    TANDEM_ASSIGN_OR_RETURN(auto chunks, bulk.get(tensor.chunks));
    for (const auto& chunk : chunks)
      text.append(reinterpret_cast<const char*>(chunk.data()), chunk.size());
  }
  return text;
}

}  // namespace

/// What the task thread makes of StartJob.
struct JobHost::Prepared {
  Status status;
  std::shared_ptr<const data::Dataset> train, eval;
  std::optional<train::TrainState> state;
};

JobHost::JobHost(const JobParts& parts, JobModel& model, const protocol::StartJob& start)
    : parts_(parts), model_(model), start_(start) {
  auto spec = protocol::JobSpec::parse(start.spec_json);
  if (!spec.ok()) {
    end(spec.status());
    return;
  }
  spec_ = std::move(*spec);
  adapter_dtype_ = parse_dtype(spec_.train.adapter_dtype).value_or(model.dtype());
  prepare();
}

JobHost::~JobHost() {
  *alive_ = false;
}

void JobHost::in_background(std::function<void()> task, std::function<void()> done) {
  const bool posted = parts_.tasks.post([task = std::move(task), done = std::move(done),
                                         to_device = parts_.to_device, alive = alive_]() mutable {
    task();
    to_device([done = std::move(done), alive] {
      if (*alive) done();
    });
  });
  TANDEM_CHECK(posted, "the task queue holds more than a job can post");
}

void JobHost::prepare() {
  auto prepared = std::make_shared<Prepared>();
  auto task = [prepared, &bulk = parts_.bulk, encoder = model_.encoder(), start = start_,
               settings = spec_.train, in_parts = model_.stores_in_parts()] {
    const data::DatasetOptions options = dataset_options(settings);
    auto load = [&](const Digest& digest,
                    const char* name) -> Result<std::shared_ptr<const data::Dataset>> {
      TANDEM_ASSIGN_OR_RETURN(const std::string text, fetch_text(bulk, digest));
      TANDEM_ASSIGN_OR_RETURN(auto dataset, data::parse_dataset(text, name, encoder, options));
      if (settings.train_on_all_tokens)
        for (auto& example : dataset.examples)
          for (std::size_t i = 0; i + 1 < example.tokens.size(); ++i)
            example.labels[i] = example.tokens[i + 1];
      return std::make_shared<const data::Dataset>(std::move(dataset));
    };
    auto run = [&]() -> Status {
      TANDEM_ASSIGN_OR_RETURN(prepared->train, load(start.dataset, "training data"));
      if (!start.eval_dataset.empty()) {
        TANDEM_ASSIGN_OR_RETURN(prepared->eval, load(start.eval_dataset, "evaluation data"));
      }
      if (start.checkpoint_manifest.empty() || in_parts) return {};
      TANDEM_ASSIGN_OR_RETURN(prepared->state,
                              unpack_checkpoint(start.checkpoint_manifest, start.model.digest,
                                                [&](auto digests) { return bulk.get(digests); }));
      return {};
    };
    prepared->status = run();
  };
  in_background(task, [this, prepared] { begin(std::move(*prepared)); });
}

void JobHost::begin(Prepared prepared) {
  if (phase_ != Phase::kPreparing) return;  // stopped meanwhile
  auto run = [&]() -> Status {
    TANDEM_RETURN_IF_ERROR(prepared.status);
    for (const auto& example : prepared.train->examples)
      if (probe_prompt_.empty() && !example.tokens.empty())
        probe_prompt_ = train::probe_prompt(example.tokens);
    TANDEM_ASSIGN_OR_RETURN(session_,
                            model_.open_session(spec_.train, prepared.train, prepared.eval,
                                                {prepared.state ? &*prepared.state : nullptr,
                                                 start_.model.digest, start_.checkpoint_manifest}));
    TANDEM_ASSIGN_OR_RETURN(
        metrics_, train::MetricsWriter::open(str(parts_.runs_directory, "/", start_.job)));
    return {};
  };
  if (const Status status = run(); !status.ok()) return end(status);
  resumed_step_ = checkpoint_step_ = checkpoint_acked_step_ = session_->step();
  phase_ = Phase::kTraining;
  const auto& report = prepared.train->report;
  progress("started", resumed_step_ ? str("resumed at step ", resumed_step_) : "started",
           Json{{"rows", report.rows},
                {"tokens", prepared.train->total_tokens()},
                {"trained_tokens", prepared.train->trained_tokens()},
                {"format", data::format_name(report.format)},
                {"dropped_over_length", report.dropped_over_length},
                {"truncated", report.truncated},
                {"total_steps", session_->total_steps()},
                {"device_dtype", dtype_name(model_.dtype())}}
               .dump());
}

bool JobHost::runnable() const {
  if (!session_ || finished_) return false;
  if (phase_ == Phase::kFinishing) return steady_ns() >= finish_from_ns_;  // draining, too
  return phase_ == Phase::kTraining && !draining_ && !pausing_;
}

void JobHost::run_slice() {
  auto event = session_->run_slice();
  if (!event.ok()) return end(event.status());
  if (const auto* step = std::get_if<train::StepDone>(&*event))
    on_step(*step);
  else if (const auto* eval = std::get_if<train::EvalDone>(&*event))
    on_eval(*eval);
  else if (const auto* due = std::get_if<train::CheckpointDue>(&*event)) {
    if (!due->last) checkpoint();  // the last state is the adapter that is being published
  } else if (std::holds_alternative<train::Finished>(*event)) {
    finished_ = true;
    if (phase_ == Phase::kTraining) publish();  // resumed at its last step
    if (published_) end({});
  }
}

void JobHost::on_step(const train::StepDone& done) {
  if (trained_tokens_ == 0) first_loss_ = done.loss;
  last_loss_ = done.loss;
  trained_tokens_ += done.trained_tokens;
  tokens_ += done.tokens;
  train_seconds_ += done.seconds;
  const bool last = done.step == done.total_steps;
  Json metrics{
      {"step", done.step},
      {"total_steps", done.total_steps},
      {"epoch", done.epoch},
      {"loss", done.loss},
      {"learning_rate", done.learning_rate},
      {"grad_norm", done.grad_norm},
      {"trained_tokens", done.trained_tokens},
      {"tokens", done.tokens},
      {"tokens_per_second", static_cast<double>(done.tokens) / std::max(done.seconds, 1e-9)},
      {"seconds", done.seconds}};
  const bool scaled = done.loss_scale != 1.0 || done.skipped_steps > 0;
  if (scaled)
    metrics.update({{"loss_scale", done.loss_scale}, {"skipped_steps", done.skipped_steps}});
  if (last || done.step % spec_.train.logging_steps == 0) {
    progress("step", "", metrics.dump());
    std::vector<std::pair<std::string, double>> scalars{
        {"train/loss", done.loss},
        {"train/learning_rate", done.learning_rate},
        {"train/grad_norm", done.grad_norm},
        {"train/tokens_per_second", metrics["tokens_per_second"]},
        {"train/epoch", done.epoch}};
    if (scaled) {
      scalars.emplace_back("train/loss_scale", done.loss_scale);
      scalars.emplace_back("train/skipped_steps", static_cast<double>(done.skipped_steps));
    }
    metrics_->scalars(done.step, scalars);
  }
  if (last) {
    last_step_ns_ = steady_ns();
    publish();
  }
}

void JobHost::on_eval(const train::EvalDone& done) {
  const Json metrics{{"step", done.step},       {"base", done.base},
                     {"eval_loss", done.loss},  {"eval_accuracy", done.accuracy},
                     {"seconds", done.seconds}, {"trained_tokens", done.trained_tokens}};
  Json all = Json::parse(eval_json_);
  all[done.base ? "base" : spec_.train.full() ? "model" : "adapter"] = metrics;
  eval_json_ = all.dump();
  progress("eval", "", metrics.dump());
  metrics_->scalars(done.step,
                    {{done.base ? "eval/base_loss" : "eval/loss", done.loss},
                     {done.base ? "eval/base_accuracy" : "eval/accuracy", done.accuracy}});
}

void JobHost::checkpoint() {
  if (checkpointing_ || !session_ || session_->step() == checkpoint_step_) return;
  checkpointing_ = true;
  const std::int64_t step = session_->step();
  if (model_.stores_in_parts()) {
    storing_step_ = step;
    return session_->begin_checkpoint();
  }
  auto exported = session_->export_state();
  if (!exported.ok()) return end(exported.status());
  auto state = std::make_shared<train::TrainState>(std::move(*exported));
  auto snapshot = session_->snapshot_adapter();
  auto outcome = std::make_shared<Result<PackedObject>>(internal_error("not run"));
  const auto config = peft_config(session_->lora());
  auto task = [state, outcome, config, full = spec_.train.full(), &bulk = parts_.bulk,
               start = start_] {
    *outcome = pack_checkpoint(start.model.digest, full ? nullptr : &config, state);
    if (!outcome->ok()) return;
    const Status put = bulk.put((*outcome)->blobs, str(start.job, "/", start.epoch));
    if (!put.ok()) *outcome = put;
  };
  in_background(task, [this, step, snapshot, outcome] {
    if (!outcome->ok()) return checkpoint_stored(step, outcome->status());
    if (snapshot != nullptr)
      if (auto installed = model_.install_adapter((*outcome)->digest, snapshot); !installed.ok())
        log_debug("checkpoint is not servable here now: ", installed.message());
    checkpoint_stored(step, (*outcome)->manifest);
  });
}

void JobHost::poll() {
  if (upload_again_ && steady_ns() >= upload_again_ns_) std::exchange(upload_again_, nullptr)();
  if (storing_step_ < 0 || !session_) return;
  constexpr std::int64_t kPollNs = 50'000'000;  // each look is a word to every rank
  const std::int64_t now = steady_ns();
  if (now - polled_ns_ < kPollNs) return;
  polled_ns_ = now;
  const auto config = peft_config(session_->lora());
  const auto manifest =
      session_->stored_checkpoint(start_.model.digest, spec_.train.full() ? nullptr : &config);
  if (manifest) checkpoint_stored(std::exchange(storing_step_, -1), *manifest);
}

void JobHost::checkpoint_stored(std::int64_t step, const Result<std::string>& manifest) {
  checkpointing_ = false;
  if (!manifest.ok()) {
    const std::string what =
        str("checkpoint of step ", step, " was not stored: ", manifest.status().message());
    log_warn(what);
    return progress("log", what, "{}");
  }
  checkpoint_step_ = step;
  parts_.io.send_reliably(start_.job, str("checkpoint:", step),
                          protocol::CheckpointReady{start_.job, start_.epoch, step, *manifest});
  if ((pausing_ || draining_) && session_ && session_->step() != step) checkpoint();
}

/// What is left after a publish waits so long: its first requests come within milliseconds, and
/// giving a session's memory back keeps the device's thread for some (15 ms on a GPU).
constexpr std::int64_t kFirstRequestNs = 50'000'000;

void JobHost::publish() {
  phase_ = Phase::kPublishing;
  if (spec_.train.full()) return publish_model();
  const std::int64_t copy_begin = steady_ns();
  auto flat = session_->flat_adapter(adapter_dtype_);
  if (!flat.ok()) return end(flat.status());
  publish_times_.copy_ms = static_cast<double>(steady_ns() - copy_begin) / 1e6;
  const auto adapter = std::make_shared<const model::FlatAdapter>(std::move(*flat));
  upload_adapter(adapter);
  // Meanwhile, on the device: what was trained must be what is served after loading it again.
  const std::int64_t probe_begin = steady_ns();
  served_ = session_->build_adapter(*adapter);
  publish_times_.build_ms = static_cast<double>(steady_ns() - probe_begin) / 1e6;
  const double difference = session_->probe(probe_prompt_, *adapter, served_);
  if (probed(difference, probe_begin)) publish_when_ready();
}

bool JobHost::probed(double difference, std::int64_t begin_ns) {
  probe_difference_ = difference;
  const bool exact = dtype_bytes(adapter_dtype_) >= dtype_bytes(model_.dtype());
  if (!std::isfinite(difference) || (exact && difference != 0)) {
    end(
        internal_error(str("publish refused: the logits of what was read back differ from those of "
                           "what was trained by ",
                           difference)));
    return false;
  }
  publish_times_.probe_ms = static_cast<double>(steady_ns() - begin_ns) / 1e6;
  probed_ = true;
  return true;
}

void JobHost::upload_adapter(const std::shared_ptr<const model::FlatAdapter>& adapter) {
  packed_ = std::make_shared<PackedObject>();
  auto failure = std::make_shared<Status>();
  auto times = std::make_shared<PublishTimes>();
  const auto config = peft_config(session_->lora());
  auto named = [this, alive = alive_, to_device = parts_.to_device](const Digest& digest) {
    to_device([this, alive, digest] {
      if (*alive) serve_ahead(digest);
    });
  };
  auto task = [packed = packed_, failure, times, adapter, config, named, &bulk = parts_.bulk,
               start = start_] {
    const std::int64_t begin = steady_ns();
    BulkClient::Upload upload(bulk, str(start.job, "/", start.epoch));
    auto object =
        pack_adapter(start.model.digest, config, adapter, [&](const BlobView& blob, bool last) {
          upload.add(blob);
          if (last) upload.send();  // beside it, the manifest is written
        });
    times->pack_ms = static_cast<double>(steady_ns() - begin) / 1e6;
    if (object.ok()) named(object->digest);
    *failure = object.ok() ? upload.finish() : object.status();
    if (object.ok()) *packed = std::move(*object);
    times->upload_ms = static_cast<double>(steady_ns() - begin) / 1e6 - times->pack_ms;
  };
  in_background(task, [this, failure, times, adapter] {
    if (!failure->ok())
      return upload_failed(*failure, [this, adapter] { upload_adapter(adapter); });
    uploaded_ = true;
    publish_times_.pack_ms = times->pack_ms;
    publish_times_.upload_ms = times->upload_ms;
    publish_when_ready();
  });
}

void JobHost::upload_failed(const Status& status, std::function<void()> again) {
  if (phase_ != Phase::kPublishing) return;
  constexpr std::int64_t kPatienceNs = 300'000'000'000, kFirstWaitNs = 1'000'000'000;
  constexpr int kDoublingsMax = 4;
  const std::int64_t now = steady_ns();
  if (upload_failures_ == 0) upload_failed_ns_ = now;
  if (status.code() != StatusCode::kInternal || now - upload_failed_ns_ > kPatienceNs)
    return end(status);
  const std::int64_t wait = kFirstWaitNs << std::min(upload_failures_++, kDoublingsMax);
  const std::string what = str("what was trained is not stored yet, again in ",
                               wait / 1'000'000'000, " s: ", status.message());
  log_warn(what);
  progress("log", what, "{}");
  upload_again_ = std::move(again);
  upload_again_ns_ = now + wait;
}

/// Written by all ranks into one folder, read back and compared, then uploaded.
void JobHost::publish_model() {
  const std::int64_t begin = steady_ns();
  if (const Status status = session_->write_model(parts_.model_folder, adapter_dtype_);
      !status.ok())
    return end(status);
  publish_times_.pack_ms = static_cast<double>(steady_ns() - begin) / 1e6;
  const std::int64_t probe_begin = steady_ns();
  auto difference = session_->probe_model(probe_prompt_, parts_.model_folder, adapter_dtype_);
  if (!difference.ok()) return end(difference.status());
  if (probed(*difference, probe_begin)) upload_model();
}

void JobHost::upload_model() {
  packed_ = std::make_shared<PackedObject>();
  auto failure = std::make_shared<Status>();
  auto upload_ms = std::make_shared<double>();
  auto task = [packed = packed_, failure, upload_ms, folder = parts_.model_folder,
               &bulk = parts_.bulk, start = start_] {
    const std::int64_t begin = steady_ns();
    auto object = pack_model(folder);
    *failure =
        object.ok() ? bulk.put(object->blobs, str(start.job, "/", start.epoch)) : object.status();
    if (object.ok()) *packed = std::move(*object);
    *upload_ms = static_cast<double>(steady_ns() - begin) / 1e6;
  };
  in_background(task, [this, failure, upload_ms] {
    if (!failure->ok()) return upload_failed(*failure, [this] { upload_model(); });
    uploaded_ = true;
    publish_times_.upload_ms = *upload_ms;
    publish_when_ready();
  });
}

/// This host need not fetch what it wrote: the folder becomes a fetched model's.
void JobHost::keep_model(const Digest& model) const {
  namespace fs = std::filesystem;
  const fs::path kept = fs::path(parts_.model_folder).parent_path() / model.hex();
  std::error_code error;
  if (fs::exists(kept, error))
    fs::remove_all(parts_.model_folder, error);
  else
    fs::rename(parts_.model_folder, kept, error);
  if (error) log_warn("the published model was not kept for this host: ", error.message());
  trim_model_cache(kept.parent_path().string(), model);
}

/// Probed, and its digest is known, which no name leads to before the publish: while its bytes are
/// still being made durable, it is made resident.
void JobHost::serve_ahead(const Digest& adapter) {
  if (!probed_ || phase_ != Phase::kPublishing) return;
  const std::int64_t begin = steady_ns();
  if (auto installed = model_.install_adapter(adapter, served_); !installed.ok())
    log_warn("the new adapter is not resident: ", installed.message());
  publish_times_.hand_over_ms = static_cast<double>(steady_ns() - begin) / 1e6;
}

void JobHost::publish_when_ready() {
  if (!uploaded_ || !probed_ || phase_ != Phase::kPublishing) return;
  if (spec_.train.full()) log_info("the model is uploaded, ", packed_->blobs.size(), " blobs");
  const Json metadata{
      {"probe_max_abs_difference", probe_difference_},
      {"train_loss_first", first_loss_},
      {"train_loss_last", last_loss_},
      {"steps", session_->step()},
      {"dtype", dtype_name(adapter_dtype_)},
      {"copy_ms", publish_times_.copy_ms},
      {"pack_ms", publish_times_.pack_ms},
      {"upload_ms", publish_times_.upload_ms},
      {"build_ms", publish_times_.build_ms},
      {"probe_ms", publish_times_.probe_ms},
      {"hand_over_ms", publish_times_.hand_over_ms},
      {"publish_prepare_ms", static_cast<double>(steady_ns() - last_step_ns_) / 1e6}};
  parts_.io.send_reliably(start_.job, "publish",
                          protocol::Publish{start_.job, start_.epoch, session_->step(),
                                            packed_->manifest, metadata.dump()});
}

void JobHost::stop(protocol::StopMode mode) {
  if (phase_ == Phase::kEnding || phase_ == Phase::kOver || published_) return;
  if (mode == protocol::StopMode::kCancel || !session_) return end(cancelled_error("cancelled"));
  if (phase_ != Phase::kTraining) return;  // it is publishing: too late to pause
  pausing_ = true;
  if (checkpoint_acked_step_ == session_->step()) return end(cancelled_error("paused"));
  checkpoint();
}

void JobHost::drain() {
  draining_ = true;
  if (phase_ == Phase::kTraining) checkpoint();
}

bool JobHost::drained() const {
  if (phase_ == Phase::kOver || phase_ == Phase::kPreparing) return true;
  if (phase_ == Phase::kTraining)
    return !checkpointing_ && checkpoint_acked_step_ == session_->step();
  return false;  // publishing or ending: wait for the acknowledgement
}

void JobHost::on_ack(const protocol::JobAck& ack) {
  parts_.io.acknowledge(ack.job, ack.of);
  if (ack.status.code() == StatusCode::kConflict) {
    log_warn("job ", start_.job, " epoch ", start_.epoch, " was replaced: ", ack.status.message());
    parts_.io.forget(start_.job);
    session_.reset();
    phase_ = Phase::kOver;
    return;
  }
  if (ack.of.starts_with("checkpoint:") && !ack.status.ok()) {
    log_warn("job ", start_.job, ": ", ack.of, " was refused: ", ack.status.message());
    checkpoint_step_ = checkpoint_acked_step_;  // whoever waits for it asks again
  } else if (ack.of.starts_with("checkpoint:")) {
    checkpoint_acked_step_ =
        std::max(checkpoint_acked_step_,
                 static_cast<std::int64_t>(std::strtoll(ack.of.c_str() + 11, nullptr, 10)));
    if (pausing_ && session_ && checkpoint_acked_step_ == session_->step())
      end(cancelled_error("paused"));
  } else if (ack.of == "publish" && phase_ == Phase::kPublishing) {
    if (!ack.status.ok()) return end(ack.status);
    published_ = true;
    packed_.reset();
    if (spec_.train.full()) keep_model(ack.digest);
    log_info("job ", start_.job, " published ", ack.name, " as ", ack.digest, ", ",
             static_cast<double>(steady_ns() - last_step_ns_) / 1e6, " ms after its last step");
    if (finished_) return end({});
    phase_ = Phase::kFinishing;  // a last evaluation may be left
    finish_from_ns_ = steady_ns() + kFirstRequestNs;
  } else if (ack.of == "ended") {
    phase_ = Phase::kOver;
  }
}

void JobHost::end(Status status) {
  if (phase_ == Phase::kEnding || phase_ == Phase::kOver) return;
  const std::int64_t last_step = step();
  upload_again_ = nullptr;
  session_.reset();  // its memory is free for serving and for the next job
  phase_ = Phase::kEnding;
  if (spec_.train.full() && !published_) {  // a model that was not published takes no room
    std::error_code error;
    std::filesystem::remove_all(parts_.model_folder, error);
  }
  const Json summary{{"paused", pausing_},
                     {"train_loss_first", first_loss_},
                     {"train_loss_last", last_loss_},
                     {"tokens", tokens_},
                     {"trained_tokens", trained_tokens_},
                     {"train_seconds", train_seconds_},
                     {"tokens_per_second",
                      train_seconds_ > 0 ? static_cast<double>(tokens_) / train_seconds_ : 0.0},
                     {"probe_max_abs_difference", probe_difference_},
                     {"eval", Json::parse(eval_json_)}};
  if (!status.ok())
    log_warn("job ", start_.job, " ends at step ", last_step, ": ", status.to_string());
  resumed_step_ = last_step;
  parts_.io.send_reliably(
      start_.job, "ended",
      protocol::JobEnded{start_.job, start_.epoch, status, last_step, summary.dump()});
}

void JobHost::progress(const std::string& kind, const std::string& message,
                       const std::string& metrics_json) {
  const std::uint64_t seq = ++progress_seq_;
  protocol::JobProgress event{start_.job, start_.epoch, seq,
                              kind,       step(),       session_ ? session_->total_steps() : 0,
                              message,    metrics_json};
  parts_.io.send_reliably(start_.job, str("progress:", seq), std::move(event));
}

}  // namespace tandem::worker::runtime
