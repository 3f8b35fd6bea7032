// The real coordinator against a world that loses, repeats, delays and dies, seed by seed. A
// failing seed is printed; TANDEM_SIM_SEED runs that one alone, TANDEM_SIM_SEEDS sets how many are
// run.
#include "tests/sim/sim_agent.h"
#include "tests/sim/sim_client.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace tandem::sim {
namespace {

using coordinator::Job;
using coordinator::JobState;

constexpr TimeMs kChaosMs = 40'000, kPatienceMs = 900'000;
constexpr int kEngines = 3, kClients = 3;

struct Outcome {
  std::vector<std::string> violations;
  std::uint64_t crashes = 0, deaths = 0, failed_commits = 0, done = 0, cancelled = 0, tokens = 0,
                cached = 0, gangs = 0, replicas = 0, preempted = 0, resized = 0;
};

/// A registry with one base and one data set, as model.add and data.add leave it.
void furnish(SimCoordinator& coordinator) {
  storage::Registry& registry = coordinator.registry();
  protocol::ModelRecord model;
  model.name = "base";
  model.path = "/models/base.gguf";
  const std::string text = make_manifest(registry, protocol::ManifestKind::kModel, {}, JobId(), 0);
  model.digest = sha256(text);
  coordinator::Dataset rows;
  rows.name = "rows";
  rows.root = sha256("rows");
  rows.bytes = 4;
  const std::string data =
      make_manifest(registry, protocol::ManifestKind::kDataset, {}, JobId(), 1);
  rows.manifest = sha256(data);
  coordinator::RegistryStore store(registry);
  (void)store.commit(
      {protocol::ManifestRecord{model.digest, protocol::ManifestKind::kModel, text, {}, 1}, model,
       protocol::ManifestRecord{rows.manifest, protocol::ManifestKind::kDataset, data, {}, 1},
       rows});
}

class World {
 public:
  explicit World(std::uint64_t seed, const coordinator::Limits& limits)
      : network_(seed), coordinator_(network_, seed, limits) {
    furnish(coordinator_);
    coordinator_.crash(0, 1);  // comes back with what was furnished
    network_.run_until(10);
    for (int i = 0; i < kEngines; ++i)
      agents_.push_back(std::make_unique<SimAgent>(network_, coordinator_, i));
    for (int i = 0; i < kEngines; ++i)
      engines_.push_back(std::make_unique<SimEngine>(network_, coordinator_, i));
    for (int i = 0; i < kClients; ++i)
      clients_.push_back(std::make_unique<SimClient>(network_, coordinator_, i, "base"));
  }

  Outcome run() {
    network_.faults = {0.05f, 0.05f, 120};
    for (TimeMs at = network_.now(); at < kChaosMs; at += 250) {
      network_.run_until(at);
      disturb();
    }
    network_.faults = {};
    TimeMs at = kChaosMs;
    Outcome outcome;
    while (!held_up() && at < kPatienceMs) network_.run_until(at += 1000);
    if (!held_up()) outcome.violations.push_back("no replica serves, though nothing hinders it");
    // What is left of the jobs may need the workers that replicas hold.
    for (const auto& client : clients_) client->remove_replicas();
    while (!settled() && at < kPatienceMs) network_.run_until(at += 1000);
    network_.run_until(at + 10'000);
    check(outcome);
    return outcome;
  }

 private:
  void disturb() {
    Random& random = network_.random();
    SimClient& client = *clients_[random.below(kClients)];
    if (network_.chance(0.10f))
      client.submit(str("adapter-", random.below(3)), static_cast<int>(1 + random.below(3)),
                    network_.chance(0.3f), static_cast<int>(random.below(3)));
    if (network_.chance(0.5f)) {
      const std::string name = network_.chance(0.5f) ? "base" : str("adapter-", random.below(3));
      // A request for a name that is not there yet would rightly be refused: ask for what is.
      const bool there = coordinator_.up() &&
                         (name == "base" || coordinator_.core().tables().aliases.contains(name));
      client.generate(there ? name : "base", str("prompt ", random.below(8)));
    }
    if (network_.chance(0.03f)) client.cancel_a_job();
    if (network_.chance(0.03f)) client.add_replica();
    if (network_.chance(0.02f)) client.remove_a_replica();
    if (network_.chance(0.04f))
      engines_[random.below(kEngines)]->crash(network_.between(100, 8000));
    if (network_.chance(0.03f))
      engines_[random.below(kEngines)]->freeze(network_.between(500, 9000));
    SimAgent& agent = *agents_[random.below(kEngines)];
    if (network_.chance(0.03f)) agent.crash(network_.between(100, 8000));
    if (network_.chance(0.05f)) agent.kill_gang();
    if (network_.chance(0.03f)) agent.freeze_gang(network_.between(500, 9000));
    if (network_.chance(0.03f))
      coordinator_.crash(static_cast<int>(random.below(3)), network_.between(50, 3000));
    if (network_.chance(0.02f)) coordinator_.fail_commits(static_cast<int>(random.below(3)) + 1);
  }

  /// Every replica that was asked for is known, and one serves: for two of them there are not
  /// workers enough.
  bool held_up() {
    if (!coordinator_.up()) return false;
    for (const auto& client : clients_)
      for (const auto& [key, replica] : client->replicas())
        if (replica.id.empty() || (replica.remove && !replica.gone)) return false;
    const auto& replicas = coordinator_.core().tables().replicas;
    return replicas.empty() || std::any_of(replicas.begin(), replicas.end(), [](const auto& r) {
             return r.second.state == coordinator::ReplicaState::kServing;
           });
  }

  bool settled() {
    if (!coordinator_.up() || !coordinator_.core().tables().replicas.empty()) return false;
    for (const auto& [id, job] : coordinator_.core().tables().jobs)
      if (!coordinator::is_terminal(job.state)) return false;
    for (const auto& client : clients_)
      if (!client->idle()) return false;
    return true;
  }

  void check(Outcome& outcome) {
    outcome.violations.insert(outcome.violations.end(), coordinator_.violations().begin(),
                              coordinator_.violations().end());
    const auto say = [&](const std::string& what) { outcome.violations.push_back(what); };
    if (!coordinator_.up()) return say("the coordinator does not come back");
    const coordinator::Tables& tables = coordinator_.core().tables();
    for (const auto& [id, job] : tables.jobs) check_job(job, tables, outcome);
    for (const auto& client : clients_) {
      for (const auto& [key, s] : client->submissions()) {
        int jobs = 0;
        for (const auto& [id, job] : tables.jobs) jobs += job.idempotency_key == key ? 1 : 0;
        if (jobs != 1) say(str("submission ", key, " made ", jobs, " jobs"));
        if (s.job.empty())
          say(str("submission ", key, " was never answered ", s.refused));
        else if (!tables.jobs.contains(JobId(s.job)))
          say(str("acknowledged ", s.job, " is lost"));
      }
      for (const auto& [id, r] : client->requests()) check_request(r, outcome);
    }
    for (const auto& [id, replica] : tables.replicas)
      say(str(id, " is still ", coordinator::replica_state_name(replica.state)));
    for (const auto& agent : agents_)
      if (coordinator::is_replica(agent->living()))
        say(str("a gang of ", agent->living(), " outlives it"));
    const auto findings = coordinator_.registry().check();
    if (!findings.ok())
      say("registry check: " + findings.status().message());
    else
      for (const auto& finding : *findings)
        say("registry check: " + finding.where + finding.message);
    outcome.crashes = coordinator_.crashes();
    outcome.failed_commits = coordinator_.failed_commits();
    for (const auto& engine : engines_) outcome.deaths += engine->deaths();
    for (const auto& agent : agents_) {
      outcome.gangs += agent->gangs();
      outcome.replicas += agent->replicas();
    }
  }

  static void check_job(const Job& job, const coordinator::Tables& tables, Outcome& outcome) {
    const auto say = [&](const std::string& what) { outcome.violations.push_back(what); };
    int versions = 0;
    for (const auto& [key, adapter] : tables.adapters) versions += adapter.job == job.id.value;
    outcome.preempted += job.preempted_unix_ms > 0 ? 1 : 0;
    const auto last = static_cast<std::int64_t>(job.members.size());
    outcome.resized += job.sizes.size() > 1 && last > 0 && last < job.ranks ? 1 : 0;
    if (last > 0 && std::find(job.sizes.begin(), job.sizes.end(), last) == job.sizes.end())
      say(str(job.id, " ran with ", last, " ranks, which it does not allow"));
    if (!coordinator::is_terminal(job.state))
      return say(str(job.id, " is still ", job_state_name(job.state), ": ", job.error));
    if (job.state == JobState::kSucceeded) {
      ++outcome.done;
      if (versions != 1) say(str(job.id, " is done and has ", versions, " versions"));
      if (job.step != 12) say(str(job.id, " is done at step ", job.step, " of 12"));
    } else {
      ++outcome.cancelled;
      if (versions != 0) say(str(job.id, " did not succeed and has published"));
      if (job.state == JobState::kFailed) say(str(job.id, " failed: ", job.error));
    }
  }

  static void check_request(const SimClient::Request& r, Outcome& outcome) {
    const auto say = [&](const std::string& what) {
      outcome.violations.push_back(str(r.generate.id, ": ", what));
    };
    if (!r.done) return say("was never answered");
    if (!r.failed.ok()) return say("failed: " + r.failed.to_string());
    const std::string& prompt = r.generate.input.prompt;
    if (static_cast<std::int64_t>(r.tokens.size()) != length_of(prompt))
      return say(str("has ", r.tokens.size(), " tokens of ", length_of(prompt)));
    for (std::size_t i = 0; i < r.tokens.size(); ++i)
      if (r.tokens[i] != token_of(r.adapter, prompt, static_cast<std::int64_t>(i)))
        return say(str("token ", i, " is another answer's"));
    outcome.tokens += r.tokens.size();
    outcome.cached += r.cached ? 1 : 0;
  }

  Network network_;
  SimCoordinator coordinator_;
  std::vector<std::unique_ptr<SimAgent>> agents_;
  std::vector<std::unique_ptr<SimEngine>> engines_;
  std::vector<std::unique_ptr<SimClient>> clients_;
};

std::uint64_t env_number(const char* name, std::uint64_t fallback) {
  const char* text = std::getenv(name);
  return text == nullptr ? fallback : std::strtoull(text, nullptr, 10);
}

coordinator::Limits sim_limits() {
  coordinator::Limits limits;
  limits.attempts_max = 50;  // the storm kills more often than any real one
  limits.queue_max = 64;
  return limits;
}

TEST(CoordinatorSimulation, EveryPromiseHoldsWhateverTheNetworkLosesAndWhoeverDies) {
  set_log_level(LogLevel::kError);
  const std::uint64_t only = env_number("TANDEM_SIM_SEED", 0);
  const std::uint64_t seeds = only > 0 ? 1 : env_number("TANDEM_SIM_SEEDS", 140);
  Outcome sum;
  for (std::uint64_t i = 0; i < seeds; ++i) {
    const std::uint64_t seed = only > 0 ? only : 1 + i;
    World world(seed, sim_limits());
    const Outcome outcome = world.run();
    for (std::size_t v = 0; v < outcome.violations.size() && v < 10; ++v)
      ADD_FAILURE() << "TANDEM_SIM_SEED=" << seed << ": " << outcome.violations[v];
    sum.crashes += outcome.crashes;
    sum.deaths += outcome.deaths;
    sum.failed_commits += outcome.failed_commits;
    sum.done += outcome.done;
    sum.cancelled += outcome.cancelled;
    sum.tokens += outcome.tokens;
    sum.cached += outcome.cached;
    sum.gangs += outcome.gangs;
    sum.replicas += outcome.replicas;
    sum.preempted += outcome.preempted;
    sum.resized += outcome.resized;
  }
  if (only == 0 && seeds >= 50) {
    // The storm was one: a simulation in which nothing happens proves nothing.
    EXPECT_GT(sum.crashes, seeds);
    EXPECT_GT(sum.deaths, seeds);
    EXPECT_GT(sum.failed_commits, seeds / 4);
    EXPECT_GT(sum.done, seeds);
    EXPECT_GT(sum.cancelled, 0u);
    EXPECT_GT(sum.cached, 0u);
    EXPECT_GT(sum.gangs, seeds);
    EXPECT_GT(sum.replicas, seeds);
    EXPECT_GT(sum.preempted, seeds / 4);
    EXPECT_GT(sum.resized, 0u);
  }
  std::cout << seeds << " seeds: " << sum.crashes << " coordinator crashes, " << sum.deaths
            << " engine deaths, " << sum.failed_commits << " failed commits, " << sum.done
            << " jobs done, " << sum.gangs << " gangs started (" << sum.replicas
            << " of replicas), " << sum.preempted << " preempted, " << sum.resized
            << " with fewer ranks, " << sum.cancelled << " cancelled, " << sum.tokens << " tokens, "
            << sum.cached << " cached answers\n";
}

}  // namespace
}  // namespace tandem::sim
