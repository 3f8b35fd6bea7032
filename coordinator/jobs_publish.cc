// Checkpoints and publishes: the bytes are durable already, here they become visible, in one
// transaction with everything that refers to them.
#include "coordinator/jobs.h"

#include "coordinator/adapters.h"
#include "coordinator/resolve.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace tandem::coordinator {

bool Jobs::is_pending(const JobId& job, const std::string& of) const {
  return std::any_of(pending_.begin(), pending_.end(),
                     [&](const auto& p) { return p.second.job == job && p.second.of == of; });
}

void Jobs::checkpoint(const Runner& runner, const protocol::CheckpointReady& message) {
  const std::string of = str("checkpoint:", message.step);
  Job job;
  if (!accept(runner, message.job, message.epoch, of, job)) return;
  const Digest digest = sha256(message.manifest);
  const auto known = context_.tables().checkpoints.find(std::pair(job.id.value, message.step));
  if (known != context_.tables().checkpoints.end() && known->second.manifest == digest) {
    protocol::JobAck ack{job.id, job.epoch, of, {}, digest, ""};
    return context_.send_worker(runner.process.peer, std::move(ack));
  }
  if (is_pending(job.id, of)) return;  // a repeat; the first one is being looked at
  const std::uint64_t work =
      context_.start_work(VerifyManifest{message.manifest, ManifestKind::kCheckpoint});
  pending_[work] = {false, job.id, job.epoch, message.step, runner.worker.id, "", of};
}

void Jobs::publish(const Runner& runner, const protocol::Publish& message) {
  Job job;
  if (!accept(runner, message.job, message.epoch, "publish", job)) return;
  const Digest digest = sha256(message.manifest);
  if (!job.published.empty()) {
    protocol::JobAck ack{job.id, job.epoch, "publish",
                         {},     digest,    str(job.adapter, "@", job.published_version)};
    if (job.full) {
      ack.digest = job.published;
      ack.name = job.adapter;
    } else if (job.published != digest)
      ack.status =
          conflict_error(str(job.id, " has published ", job.published.short_hex(), " already"));
    return context_.send_worker(runner.process.peer, std::move(ack));
  }
  if (job.state == JobState::kCancelling)
    return ack(runner.process, job.id, job.epoch, "publish",
               cancelled_error(str(job.id, " is being cancelled")));
  if (is_pending(job.id, "publish")) return;
  const std::uint64_t work =
      job.full ? context_.start_work(DescribeStoredModel{message.manifest})
               : context_.start_work(VerifyManifest{message.manifest, ManifestKind::kAdapter});
  pending_[work] = {
      true, job.id, job.epoch, message.step, runner.worker.id, message.metadata_json, "publish"};
}

bool Jobs::verified(const WorkDone& done) {
  const auto found = pending_.find(done.id);
  if (found == pending_.end()) return false;
  const Pending pending = std::move(found->second);
  pending_.erase(found);
  Worker* worker = workers_.find(pending.worker);
  const auto owner = context_.tables().jobs.find(pending.job);
  if (owner != context_.tables().jobs.end() &&
      (owner->second.worker != pending.worker || owner->second.epoch != pending.epoch))
    return true;  // the job moved on; whoever sent this is told when it repeats
  Process* process = owner == context_.tables().jobs.end() ? nullptr : runner_of(owner->second);
  if (worker == nullptr || process == nullptr || !process->alive)
    return true;  // it will repeat, or is dead
  // The job may have moved while the manifest was being read.
  Job job;
  if (!accept({*worker, *process}, pending.job, pending.epoch, pending.of, job)) return true;
  const auto* manifest = std::get_if<ManifestVerified>(&done.result);
  const auto* model = std::get_if<ModelHashed>(&done.result);
  const bool of_model = pending.publish && job.full;
  Status status = done.status;
  if (status.ok() && (of_model ? model == nullptr : manifest == nullptr))
    status = internal_error("no manifest came back");
  if (status.ok() && pending.publish && !of_model && manifest->base_model != job.model)
    status = invalid_error(str("the adapter is of base ", manifest->base_model.short_hex(),
                               ", the job of ", job.model.short_hex()));
  if (status.ok() && pending.publish) {
    status = of_model ? check_model_name(job.adapter, model->model.digest)
                      : check_free(context_.tables(), job.adapter, false);
    // A conflict would tell the engine that another attempt has the job; this ends it.
    if (!status.ok()) status = refused_error(status.message());
  }
  if (status.ok() && pending.publish && job.state == JobState::kCancelling)
    status = cancelled_error(str(job.id, " is being cancelled"));
  if (!status.ok()) {
    context_.log(LogLevel::kWarn, job.id, " ", pending.of, " refused: ", status.message());
    ack(*process, job.id, job.epoch, pending.of, status);
    return true;
  }
  if (of_model)
    record_model(std::move(job), *model, pending);
  else if (pending.publish)
    record_publish(std::move(job), *manifest, pending);
  else
    record_checkpoint(std::move(job), *manifest, pending);
  return true;
}

void Jobs::record_checkpoint(Job job, const ManifestVerified& manifest, const Pending& pending) {
  context_.put(ManifestRecord{manifest.digest, ManifestKind::kCheckpoint, manifest.text, job.model,
                              context_.now().unix_ms});
  context_.put(CheckpointRecord{job.id.value, pending.step, pending.epoch, manifest.digest,
                                context_.now().unix_ms});
  auto spec = protocol::JobSpec::parse(job.spec_json);
  const std::int64_t kept = spec.ok() ? spec->train.save_total_limit : 2;
  const std::vector<CheckpointRecord> all = context_.tables().checkpoints_of(job.id);
  for (std::size_t i = 0; i + static_cast<std::size_t>(kept) < all.size(); ++i)
    erase_checkpoint(all[i]);
  if (pending.step > job.best_step) job.best_step = pending.step;
  job.attempts = std::min(job.attempts, 1);
  job.own_failures = 0;
  const nlohmann::ordered_json details{
      {"step", pending.step}, {"digest", manifest.digest.hex()}, {"bytes", manifest.bytes}};
  event(job, "info", "checkpoint", str("checkpoint at step ", pending.step), details.dump(), false);
  context_.send_worker(runner_of(job)->peer,
                       protocol::JobAck{job.id, job.epoch, pending.of, {}, manifest.digest, ""});
  const JobId id = job.id;
  save(std::move(job));
  grow_if_possible(id);
}

Status Jobs::restore(const JobId& id, const Submission& submission, std::int64_t step,
                     const ManifestVerified& manifest) {
  Job job;
  if (const auto known = context_.tables().jobs.find(id); known != context_.tables().jobs.end()) {
    job = known->second;
    if (job.model != submission.model || job.dataset != submission.dataset ||
        job.spec_json != submission.spec.to_json())
      return conflict_error(str(id, " is another job here: it has other settings or data"));
    const auto there = context_.tables().checkpoints.find(std::pair(id.value, step));
    if (there != context_.tables().checkpoints.end())
      return there->second.manifest == manifest.digest
                 ? Status()
                 : conflict_error(str(id, " has another checkpoint of step ", step,
                                      " here: ", there->second.manifest.short_hex()));
    if (job.state != JobState::kPaused)
      return conflict_error(str(id, " is ", job_state_name(job.state),
                                " here; checkpoints are restored to a paused job"));
  } else {
    TANDEM_ASSIGN_OR_RETURN(job, make(id, submission));
    set_state(job, JobState::kPaused, "restored from a backup");
  }
  context_.put(ManifestRecord{manifest.digest, ManifestKind::kCheckpoint, manifest.text, job.model,
                              context_.now().unix_ms});
  context_.put(
      CheckpointRecord{id.value, step, job.epoch, manifest.digest, context_.now().unix_ms});
  job.step = std::max(job.step, step);
  job.best_step = std::max(job.best_step, step);
  save(std::move(job));
  return {};
}

void Jobs::record_publish(Job job, const ManifestVerified& manifest, const Pending& pending) {
  const AdapterVersionRecord version =
      add_version(context_, {job.adapter, manifest.text, manifest.digest, job.model, job.id.value,
                             pending.metadata_json, str("publish ", job.id)});
  job.published = manifest.digest;
  job.published_version = version.version;
  job.step = std::max(job.step, pending.step);
  const std::string name = str(job.adapter, "@", version.version);
  const nlohmann::ordered_json details{{"step", pending.step},
                                       {"adapter", name},
                                       {"digest", manifest.digest.hex()},
                                       {"bytes", manifest.bytes}};
  event(job, "info", "publish", str("published ", name), details.dump(), false);
  context_.send_worker(runner_of(job)->peer,
                       protocol::JobAck{job.id, job.epoch, "publish", {}, manifest.digest, name});
  save(std::move(job));
  announce(context_, workers_, version);
}

/// As for `model add`: the same model again is none the worse, another one needs another name.
Status Jobs::check_model_name(const std::string& name, const Digest& digest) const {
  const auto known = context_.tables().models.find(name);
  if (known != context_.tables().models.end() && known->second.digest == digest) return {};
  return check_free(context_.tables(), name, true);
}

void Jobs::record_model(Job job, const ModelHashed& hashed, const Pending& pending) {
  ModelRecord model = hashed.model;
  model.name = job.adapter;
  model.job = job.id.value;
  model.base_model = job.model;
  model.created_unix_ms = context_.now().unix_ms;
  auto summary = nlohmann::ordered_json::parse(model.summary_json, nullptr, false);
  summary["training"] = nlohmann::ordered_json::parse(pending.metadata_json, nullptr, false);
  model.summary_json =
      summary.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  context_.put(ManifestRecord{
      model.digest, ManifestKind::kModel, hashed.manifest, {}, model.created_unix_ms});
  context_.put(model);
  job.published = model.digest;
  job.step = std::max(job.step, pending.step);
  const nlohmann::ordered_json details{{"step", pending.step},
                                       {"model", model.name},
                                       {"digest", model.digest.hex()},
                                       {"bytes", model.bytes}};
  event(job, "info", "publish", str("published model ", model.name), details.dump(), false);
  context_.send_worker(
      runner_of(job)->peer,
      protocol::JobAck{job.id, job.epoch, pending.of, {}, model.digest, model.name});
  save(std::move(job));
}

void announce(Context& context, const WorkerTable& workers, const AdapterVersionRecord& adapter) {
  const protocol::Announce news{str(adapter.name, "@", adapter.version), adapter.base_model,
                                adapter.digest, context.tables().manifest(adapter.digest)};
  for (const auto& [id, worker] : workers.all()) {
    if (worker.holds(adapter.base_model)) context.send_worker(worker.engine.peer, news);
    if (worker.gang.model == adapter.base_model && workers.serves(worker))
      context.send_worker(worker.gang.peer, news);
  }
}

}  // namespace tandem::coordinator
