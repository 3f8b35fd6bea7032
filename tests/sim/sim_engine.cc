#include "tests/sim/sim_engine.h"

#include "storage/manifest.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstring>

namespace tandem::sim {
namespace {

constexpr TimeMs kTickMs = 50, kStepMs = 200, kLoadMs = 400, kResendMs = 2000, kHelloMs = 250,
                 kLeaseMs = 5000;
constexpr std::int64_t kSaveSteps = 4;

std::uint64_t hash_of(const std::string& text) {
  const Digest digest = sha256(text);
  std::uint64_t value = 0;
  std::memcpy(&value, digest.bytes.data(), sizeof value);
  return value;
}

}  // namespace

std::int32_t token_of(const Digest& adapter, const std::string& prompt, std::int64_t index) {
  return static_cast<std::int32_t>(
      random_bits(hash_of(prompt + adapter.hex()), 7, static_cast<std::uint64_t>(index)) % 50000);
}

std::int64_t length_of(const std::string& prompt) {
  return 3 + static_cast<std::int64_t>(hash_of(prompt) % 12);
}

std::string make_manifest(storage::Registry& registry, protocol::ManifestKind kind,
                          const Digest& base, const JobId& job, std::int64_t step, Epoch epoch) {
  const std::string text = str("weights of ", job, " at step ", step);
  const auto bytes = std::as_bytes(std::span(text));
  storage::Manifest manifest;
  manifest.kind = kind;
  manifest.settings_json = nlohmann::json{
      {"base_model", base.hex()},
      {"job", job.value},
      {"step", step},
      {"epoch", epoch}}.dump();
  manifest.tensors.push_back(
      storage::describe_tensor("w", "u8", {static_cast<std::int64_t>(bytes.size())}, bytes));
  (void)registry.blobs().put_chunk(manifest.tensors[0].chunks[0], bytes);
  return storage::encode_manifest(manifest).value();
}

SimEngine::SimEngine(Network& network, SimCoordinator& coordinator, int slot)
    : SimEngine(network, coordinator, slot, protocol::StartJob{}) {}

SimEngine::SimEngine(Network& network, SimCoordinator& coordinator, int slot,
                     const protocol::StartJob& start_job)
    : network_(network),
      coordinator_(coordinator),
      slot_(slot),
      worker_(str("host/cpu", slot)),
      gang_start_(start_job) {
  start();
}

void SimEngine::start() {
  incarnation_ = gang() ? gang_start_.gang : network_.random().next() | 1;
  peer_ = str(worker_.value, "-", incarnation_);
  alive_ = true;
  greeted_ = false;
  heard_ms_ = network_.now();
  hello_ms_ = beat_ms_ = -1000;
  seq_ = 0;
  model_ = {};
  job_.reset();
  requests_.clear();
  reliable_.clear();
  if (gang()) begin_job(gang_start_);
  coordinator_.connect_worker(peer_, [this, mine = incarnation_](const auto& message) {
    if (alive_ && mine == incarnation_ && network_.now() >= frozen_until_ms_) hear(message);
  });
  const auto again = std::make_shared<std::function<void()>>();
  *again = [this, mine = incarnation_, weak = std::weak_ptr(again)] {
    if (!alive_ || mine != incarnation_) return;
    if (network_.now() >= frozen_until_ms_) tick();
    if (auto next = weak.lock()) network_.after(kTickMs, [next] { (*next)(); });
  };
  network_.after(kTickMs, [again] { (*again)(); });
}

void SimEngine::crash(TimeMs down_ms) {
  if (!alive_) return;
  alive_ = false;
  ++deaths_;
  coordinator_.disconnect_worker(peer_);
  if (!gang()) network_.after(down_ms, [this] { start(); });
}

void SimEngine::send(protocol::WorkerMessage message) {
  if (greeted_) coordinator_.from_worker(peer_, std::move(message));
}

void SimEngine::send_reliably(const std::string& of, protocol::WorkerMessage message) {
  reliable_[of] = {std::move(message), -1};
}

void SimEngine::say_hello() {
  protocol::WorkerHello hello;
  hello.role = gang() ? protocol::WorkerRole::kGang : protocol::WorkerRole::kEngine;
  hello.worker = worker_;
  hello.host = "host";
  hello.slot = slot_;
  hello.device = "cpu";
  hello.memory_bytes = 1 << 30;
  hello.incarnation = incarnation_;
  hello.model = model_;
  hello.credits = 4;
  if (job_) hello.jobs.push_back({job_->start.job, job_->start.epoch, job_->step});
  for (const auto& [id, request] : requests_) hello.requests.emplace_back(id);
  coordinator_.from_worker(peer_, std::move(hello));
}

void SimEngine::heartbeat() {
  protocol::Heartbeat beat;
  beat.worker = worker_;
  beat.role = gang() ? protocol::WorkerRole::kGang : protocol::WorkerRole::kEngine;
  beat.incarnation = incarnation_;
  beat.seq = ++seq_;
  beat.running = static_cast<std::int64_t>(requests_.size());
  if (job_) beat.jobs.push_back({job_->start.job, job_->start.epoch, job_->step});
  send(std::move(beat));
}

void SimEngine::tick() {
  const TimeMs now = network_.now();
  if (gang() && !job_) {  // its end was acknowledged, or it was taken from us
    alive_ = false;
    return coordinator_.disconnect_worker(peer_);
  }
  if (greeted_ && now - heard_ms_ > kLeaseMs) greeted_ = false;
  if (!greeted_ && now - hello_ms_ >= kHelloMs) {
    hello_ms_ = now;
    say_hello();
  }
  if (greeted_ && now - beat_ms_ >= 1000) {
    beat_ms_ = now;
    heartbeat();
  }
  for (auto& [of, reliable] : reliable_)
    if (greeted_ && (reliable.sent_ms < 0 || now - reliable.sent_ms >= kResendMs)) {
      reliable.sent_ms = now;
      send(reliable.message);
    }
  if (replica())
    load_and_drain();
  else
    train();
  answer();
}

/// A replica's first rank: holds its model after a while, and says so; ends when it was told to and
/// has nothing to answer.
void SimEngine::load_and_drain() {
  if (!job_ || job_->ending) return;
  if (model_.empty() && network_.now() - step_ms_ >= kLoadMs) {
    model_ = gang_start_.model.digest;
    greeted_ = false;
  }
  if (job_->pausing && requests_.empty()) end_job(cancelled_error("drained"));
}

void SimEngine::begin_job(const protocol::StartJob& start_job) {
  reliable_.clear();
  job_ = JobRun{start_job};
  const auto manifest = nlohmann::json::parse(start_job.checkpoint_manifest, nullptr, false);
  if (manifest.is_object()) job_->step = manifest["settings"]["step"].get<std::int64_t>();
  step_ms_ = network_.now();
}

void SimEngine::train() {
  if (!job_ || job_->publishing || job_->pausing || job_->ending) return;
  if (network_.now() - step_ms_ < kStepMs) return;
  step_ms_ = network_.now();
  JobRun& run = *job_;
  if (run.step >= run.total) return publish();  // resumed from its last step
  ++run.step;
  protocol::JobProgress progress;
  progress.job = run.start.job;
  progress.epoch = run.start.epoch;
  progress.seq = ++run.seq;
  progress.kind = "step";
  progress.step = run.step;
  progress.total_steps = run.total;
  progress.metrics_json = "{\"loss\":1.5}";
  send_reliably(str("progress:", progress.seq), progress);
  if (run.step % kSaveSteps == 0) checkpoint();
  if (run.step >= run.total) publish();
}

void SimEngine::publish() {
  JobRun& run = *job_;
  run.publishing = true;
  send_reliably("publish",
                protocol::Publish{
                    run.start.job, run.start.epoch, run.step,
                    make_manifest(coordinator_.registry(), protocol::ManifestKind::kAdapter,
                                  run.start.model.digest, run.start.job, run.step, run.start.epoch),
                    "{}"});
}

void SimEngine::checkpoint() {
  const JobRun& run = *job_;
  send_reliably(
      str("checkpoint:", run.step),
      protocol::CheckpointReady{
          run.start.job, run.start.epoch, run.step,
          make_manifest(coordinator_.registry(), protocol::ManifestKind::kCheckpoint,
                        run.start.model.digest, run.start.job, run.step, run.start.epoch)});
}

void SimEngine::end_job(const Status& status) {
  job_->ending = true;
  send_reliably("ended",
                protocol::JobEnded{job_->start.job, job_->start.epoch, status, job_->step, "{}"});
}

void SimEngine::on_ack(const protocol::JobAck& ack) {
  if (!job_ || ack.job != job_->start.job || ack.epoch != job_->start.epoch) return;
  if (ack.status.code() == StatusCode::kConflict) {
    job_.reset();  // taken from us
    reliable_.clear();
    return;
  }
  reliable_.erase(ack.of);
  if (ack.of == "ended") {
    job_.reset();
    reliable_.clear();
  } else if (ack.of == "publish" && !job_->ending) {
    end_job(ack.status);
  } else if (job_->pausing && ack.of == str("checkpoint:", job_->step) && !job_->ending) {
    end_job(cancelled_error("paused"));
  }
}

void SimEngine::answer() {
  std::vector<std::string> done;
  for (auto& [id, request] : requests_) {
    const std::string& prompt = request.infer.request.input.prompt;
    const std::int64_t length = length_of(prompt);
    protocol::InferChunk chunk;
    chunk.attempt = request.infer.attempt;
    chunk.chunk.id = RequestId(id);
    chunk.chunk.index = request.next;
    const std::int64_t count = std::min<std::int64_t>(
        length - request.next, 1 + static_cast<std::int64_t>(network_.random().below(3)));
    for (std::int64_t i = 0; i < count; ++i)
      chunk.chunk.tokens.push_back(token_of(request.infer.adapter, prompt, request.next++));
    chunk.chunk.text = std::string(static_cast<std::size_t>(count), 'x');
    if (request.next >= length) {
      chunk.chunk.finish = protocol::FinishReason::kStop;
      done.push_back(id);
    }
    send(std::move(chunk));
  }
  for (const std::string& id : done) requests_.erase(id);
}

void SimEngine::hear(const protocol::ControlMessage& message) {
  heard_ms_ = network_.now();
  if (const auto* reply = std::get_if<protocol::WorkerHelloReply>(&message)) {
    if (!reply->status.ok()) return crash(500);
    greeted_ = true;
    for (const JobId& id : reply->stop_jobs)
      if (job_ && job_->start.job == id) {
        job_.reset();
        reliable_.clear();
      }
    for (const RequestId& id : reply->stop_requests) requests_.erase(id.value);
  } else if (const auto* load = std::get_if<protocol::LoadModel>(&message)) {
    if (model_ != load->model.digest && (job_ || !requests_.empty()))
      return send(protocol::ModelLoaded{load->model.digest, busy_error("at work"), 0});
    model_ = load->model.digest;
    send(protocol::ModelLoaded{model_, {}, 0.1});
  } else if (const auto* estimate = std::get_if<protocol::EstimateRequest>(&message)) {
    send(protocol::EstimateReply{
        estimate->call_id, {}, "{\"peak_bytes\":1000,\"device_bytes\":100000,\"fits\":true}"});
  } else if (const auto* start_job = std::get_if<protocol::StartJob>(&message)) {
    if (start_job->gang != 0)
      return coordinator_.violation(str("engine ", worker_, " was given a gang's job"));
    if (job_ && job_->start.job == start_job->job && job_->start.epoch >= start_job->epoch) return;
    if (job_ && job_->start.job != start_job->job) return;
    if (model_ != start_job->model.digest) return;
    begin_job(*start_job);
  } else if (const auto* stop = std::get_if<protocol::StopJob>(&message)) {
    if (!job_ || job_->start.job != stop->job || job_->start.epoch != stop->epoch) return;
    if (job_->ending || job_->publishing || job_->pausing) return;
    if (stop->mode == protocol::StopMode::kCancel) return end_job(cancelled_error("cancelled"));
    job_->pausing = true;
    if (!replica()) checkpoint();
  } else if (const auto* ack = std::get_if<protocol::JobAck>(&message)) {
    on_ack(*ack);
  } else if (const auto* infer = std::get_if<protocol::Infer>(&message)) {
    if (infer->model.digest != model_)
      return coordinator_.violation(str(peer_, " was given a request for a base it does not hold"));
    if (replica() && (!job_ || job_->pausing || job_->ending)) return;
    const auto known = requests_.find(infer->request.id.value);
    if (known != requests_.end() && known->second.infer.attempt >= infer->attempt) return;
    requests_[infer->request.id.value] = {*infer, infer->request.next_index};
  } else if (const auto* cancel = std::get_if<protocol::InferCancel>(&message)) {
    requests_.erase(cancel->id.value);
  }
}

}  // namespace tandem::sim
