#include "tests/sim/sim_agent.h"

namespace tandem::sim {
namespace {

constexpr TimeMs kTickMs = 50, kHelloMs = 250, kLeaseMs = 5000, kReportMs = 1000;

}  // namespace

SimAgent::SimAgent(Network& network, SimCoordinator& coordinator, int slot)
    : network_(network), coordinator_(coordinator), slot_(slot), worker_(str("host/cpu", slot)) {
  start();
}

void SimAgent::start() {
  incarnation_ = network_.random().next() | 1;
  peer_ = str(worker_.value, "-agent-", incarnation_);
  alive_ = true;
  greeted_ = false;
  heard_ms_ = network_.now();
  hello_ms_ = beat_ms_ = -1000;
  seq_ = 0;
  ended_.reset();
  if (!watched_) claim_ = {};  // known from the folder of a gang that is there
  coordinator_.connect_worker(peer_, [this, mine = incarnation_](const auto& message) {
    if (alive_ && mine == incarnation_) hear(message);
  });
  const auto again = std::make_shared<std::function<void()>>();
  *again = [this, mine = incarnation_, weak = std::weak_ptr(again)] {
    if (!alive_ || mine != incarnation_) return;
    tick();
    if (auto next = weak.lock()) network_.after(kTickMs, [next] { (*next)(); });
  };
  network_.after(kTickMs, [again] { (*again)(); });
}

void SimAgent::crash(TimeMs down_ms) {
  if (!alive_) return;
  alive_ = false;
  coordinator_.disconnect_worker(peer_);
  network_.after(down_ms, [this] { start(); });
}

void SimAgent::kill_gang() {
  if (running()) gangs_.back()->crash(0);
}

void SimAgent::freeze_gang(TimeMs ms) {
  if (running()) gangs_.back()->freeze(ms);
}

std::vector<protocol::RunningJob> SimAgent::claims() const {
  if (!running()) return {};
  return {claim_};
}

void SimAgent::end_gang(const Status& why) {
  kill_gang();
  watched_ = false;
  ended_ = protocol::JobEnded{claim_.job, claim_.epoch, why, 0, "{}"};
  report_ms_ = -10'000;
}

void SimAgent::tick() {
  const TimeMs now = network_.now();
  if (greeted_ && now - heard_ms_ > kLeaseMs) greeted_ = false;
  if (!greeted_ && now - hello_ms_ >= kHelloMs) {
    hello_ms_ = now;
    protocol::WorkerHello hello;
    hello.role = protocol::WorkerRole::kAgent;
    hello.worker = worker_;
    hello.host = "host";
    hello.slot = slot_;
    hello.device = "cpu";
    hello.incarnation = incarnation_;
    hello.jobs = claims();
    coordinator_.from_worker(peer_, std::move(hello));
  }
  if (watched_ && !running()) end_gang(unavailable_error("the gang is over"));
  if (!greeted_) return;
  if (now - beat_ms_ >= 1000) {
    beat_ms_ = now;
    protocol::Heartbeat beat;
    beat.worker = worker_;
    beat.role = protocol::WorkerRole::kAgent;
    beat.incarnation = incarnation_;
    beat.seq = ++seq_;
    beat.jobs = claims();
    coordinator_.from_worker(peer_, std::move(beat));
  }
  if (ended_ && now - report_ms_ >= kReportMs) {
    report_ms_ = now;
    coordinator_.from_worker(peer_, *ended_);
  }
}

void SimAgent::on_start(const protocol::StartJob& start_job) {
  const protocol::RunningJob wanted{start_job.job, start_job.epoch, 0};
  if (running()) {
    if (claim_ == wanted || (claim_.job == wanted.job && claim_.epoch > wanted.epoch)) return;
    return end_gang(cancelled_error("another takes its place"));
  }
  if (claim_ == wanted) return;  // it ended, and that is known or being said
  claim_ = wanted;
  watched_ = true;
  replicas_ += start_job.serve_json.empty() ? 0 : 1;
  gangs_.push_back(std::make_unique<SimEngine>(network_, coordinator_, slot_, start_job));
}

void SimAgent::hear(const protocol::ControlMessage& message) {
  heard_ms_ = network_.now();
  if (const auto* reply = std::get_if<protocol::WorkerHelloReply>(&message)) {
    if (!reply->status.ok()) return crash(500);
    greeted_ = true;
    for (const JobId& id : reply->stop_jobs)
      if (running() && claim_.job == id) end_gang(cancelled_error("not ours any more"));
  } else if (const auto* start_job = std::get_if<protocol::StartJob>(&message)) {
    on_start(*start_job);
  } else if (const auto* stop = std::get_if<protocol::StopJob>(&message)) {
    const bool mine = claim_.job == stop->job && claim_.epoch == stop->epoch;
    if (running() && mine) return end_gang(cancelled_error("as asked"));
    if (running()) return;
    ended_ = protocol::JobEnded{stop->job, stop->epoch, cancelled_error("not here"), 0, "{}"};
    report_ms_ = -10'000;
  } else if (const auto* ack = std::get_if<protocol::JobAck>(&message)) {
    if (ended_ && ended_->job == ack->job && ended_->epoch == ack->epoch) ended_.reset();
  }
}

}  // namespace tandem::sim
