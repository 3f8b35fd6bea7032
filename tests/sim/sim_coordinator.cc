#include "tests/sim/sim_coordinator.h"

#include "storage/manifest.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace tandem::sim {

using namespace coordinator;

SimCoordinator::SimCoordinator(Network& network, std::uint64_t seed, Limits limits)
    : network_(network), limits_(limits), seed_(seed) {
  auto memory = std::make_unique<storage::MemoryStore>(storage::registry_tables());
  memory_ = memory.get();
  auto blobs =
      storage::BlobStore::open(std::make_unique<storage::MemoryStore>(storage::BlobStore::tables()),
                               "", 1 << 30, network.clock());
  auto registry =
      storage::Registry::create(std::move(memory), std::move(blobs).value(), network.clock());
  registry_ = std::move(registry).value();
  store_ = std::make_unique<RegistryStore>(*registry_);
  start();
}

Now SimCoordinator::now() const {
  return {network_.now(), network_.clock().unix_ms(), network_.now() * 1000};
}

void SimCoordinator::violation(const std::string& what) {
  violations_.push_back(str("at ", network_.now(), " ms: ", what));
}

void SimCoordinator::start() {
  auto snapshot = store_->load();
  if (!snapshot.ok())
    return violation("the registry does not load: " + snapshot.status().message());
  Options options;
  options.limits = limits_;
  options.incarnation = ++life_;
  options.seed = mix64(seed_ + life_);
  core_ = std::make_unique<Coordinator>(options, std::move(*snapshot), now());
  next_index_.clear();
  const std::uint64_t life = life_;
  const auto tick = std::make_shared<std::function<void()>>();
  *tick = [this, life, weak = std::weak_ptr(tick)] {
    if (life != life_ || !core_) return;
    step(Tick{});
    if (auto again = weak.lock()) network_.after(100, [again] { (*again)(); });
  };
  network_.after(100, [tick] { (*tick)(); });
}

void SimCoordinator::crash(int at, TimeMs down_ms) {
  if (!core_) return;
  if (at == 0) return stop(down_ms);
  crash_at_ = at;
  crash_down_ms_ = down_ms;
}

void SimCoordinator::stop(TimeMs down_ms) {
  core_.reset();
  ++life_;
  ++crashes_;
  crash_at_ = 0;
  network_.after(down_ms, [this] { start(); });
}

void SimCoordinator::fail_commits(int count) {
  memory_->fail_commits(count, internal_error("disk full"));
}

void SimCoordinator::from_client(const std::string& peer, protocol::ClientMessage message) {
  network_.send([this, peer, message = std::move(message)] {
    if (!core_) return;
    if (const auto* request = std::get_if<protocol::Generate>(&message))
      next_index_[request->id.value] = request->next_index;
    step(ClientInput{peer, "", message});
  });
}

void SimCoordinator::from_worker(const std::string& peer, protocol::WorkerMessage message) {
  network_.send([this, peer, message = std::move(message)] {
    if (core_) step(WorkerInput{peer, "", message});
  });
}

void SimCoordinator::step(const Input& input) {
  carry_out(core_->step(now(), input));
}

void SimCoordinator::carry_out(std::vector<Effect> effects) {
  const auto* persist = effects.empty() ? nullptr : std::get_if<Persist>(&effects.front());
  bool failed = false;
  if (persist != nullptr) {
    if (crash_at_ == 1) return stop(crash_down_ms_);
    const Status status = store_->commit(persist->writes);
    if (crash_at_ == 2) return stop(crash_down_ms_);
    failed = !status.ok();
    if (failed) {
      ++failed_commits_;
      carry_out(core_->step(now(), CommitFailed{status}));
      if (!core_) return;
    } else {
      check_tables();
    }
  }
  for (Effect& effect : effects) {
    if (const auto* send = std::get_if<SendClient>(&effect)) {
      const auto* reply = std::get_if<protocol::CallReply>(&send->message);
      if (failed && reply != nullptr && reply->status.ok()) continue;
      if (const auto* chunk = std::get_if<protocol::GenerateChunk>(&send->message))
        check_chunk(*chunk);
      if (const auto hear = clients_.find(send->peer); hear != clients_.end())
        network_.send([hear = hear->second, message = send->message] { hear(message); });
    } else if (const auto* control = std::get_if<SendWorker>(&effect)) {
      const bool rests = std::holds_alternative<protocol::JobAck>(control->message) ||
                         std::holds_alternative<protocol::StartJob>(control->message) ||
                         std::holds_alternative<protocol::Announce>(control->message) ||
                         std::holds_alternative<protocol::WorkerHelloReply>(control->message);
      if (failed && rests) continue;
      if (const auto hear = workers_.find(control->peer); hear != workers_.end())
        network_.send([hear = hear->second, message = control->message] { hear(message); });
    } else if (auto* work = std::get_if<StartWork>(&effect)) {
      network_.after(network_.between(1, 30), [this, life = life_, work = std::move(*work)] {
        if (life == life_ && core_) step(do_work(work, *registry_, {}));
      });
    }
  }
}

/// An answer's tokens leave the coordinator once each and in order, counted from where its client
/// last said it stands.
void SimCoordinator::check_chunk(const protocol::GenerateChunk& chunk) {
  if (!chunk.status.ok() || chunk.finish == protocol::FinishReason::kCancelled) return;
  std::int64_t& next = next_index_[chunk.id.value];
  if (chunk.index != next && !chunk.tokens.empty())
    violation(str("request ", chunk.id, ": token ", chunk.index, " sent, ", next, " is next"));
  next = chunk.index + static_cast<std::int64_t>(chunk.tokens.size());
}

/// After every commit: nothing visible points at something that is not whole.
void SimCoordinator::check_tables() {
  const Tables& tables = core_->tables();
  for (const auto& [name, alias] : tables.aliases) {
    const auto* adapter = tables.current_adapter(name);
    if (adapter == nullptr || adapter->digest != alias.digest)
      violation(str("alias ", name, " points at a version that is not there"));
    else if (tables.manifest(adapter->digest).empty())
      violation(str("adapter ", name, " is visible without its manifest"));
  }
  for (const auto& [key, adapter] : tables.adapters) {
    const auto manifest = nlohmann::json::parse(tables.manifest(adapter.digest), nullptr, false);
    const auto job = tables.jobs.find(JobId(adapter.job));
    if (job != tables.jobs.end() && manifest.is_object() &&
        manifest["settings"]["epoch"] != job->second.epoch)
      violation(str(adapter.job, " at epoch ", job->second.epoch, " has a version of epoch ",
                    manifest["settings"]["epoch"].dump()));
  }
  for (const auto& [key, checkpoint] : tables.checkpoints)
    if (tables.manifest(checkpoint.manifest).empty())
      violation(str("checkpoint ", key.first, "@", key.second, " has no manifest"));
  std::map<WorkerId, int> holders;
  for (const auto& [id, job] : tables.jobs)
    if (holds_engine(job.state)) {
      for (const WorkerId& worker : job.gang() ? job.members : std::vector{job.worker})
        if (++holders[worker] > 1) violation(str("two jobs hold worker ", worker));
      const auto held = static_cast<std::int64_t>(job.members.size());
      if (job.needs_gang() ? std::ranges::count(job.sizes, held) == 0 : held != 0)
        violation(str(job.id, " of ", job.ranks, " ranks holds ", held, " members"));
    }
  for (const auto& [id, replica] : tables.replicas) {
    if (!replica.placed()) continue;
    for (const WorkerId& worker : replica.members)
      if (++holders[worker] > 1) violation(str("two of jobs and replicas hold worker ", worker));
    if (replica.members.size() != static_cast<std::size_t>(replica.ranks()))
      violation(str(id, " of ", replica.ranks(), " ranks holds ", replica.members.size()));
  }
  if (core_->requests().stats().waiting > limits_.queue_max)
    violation("the request queue is longer than its limit");
}

}  // namespace tandem::sim
