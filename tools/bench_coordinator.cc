// The coordinator's share of a request's time, on loopback: the real loop over ipc sockets, an
// engine that answers at once, one client. Prints JSON. What is measured is everything between the
// client's send and its first token but the model: four socket hops and two passes of the core.
//   bench_coordinator [REQUESTS [JOBS]]    JOBS: that ended before, to be listed and started with
#include "coordinator/coordinator_loop.h"
#include "protocol/base/processors.h"
#include "protocol/codec.h"
#include "protocol/zmq_transport.h"
#include "storage/manifest.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <thread>
#include <vector>

namespace tandem::coordinator {
namespace {

using protocol::ClientEndpoint;

constexpr TimeMs kPollMs = 20;

template <class Message>
void send(ClientEndpoint& endpoint, const Message& message) {
  while (!endpoint.send(protocol::encode(message)).ok()) (void)endpoint.receive(1);
}

/// Answers every Infer with one token.
void run_engine(ClientEndpoint& endpoint, const Digest& model, const std::atomic<bool>& stop) {
  protocol::WorkerHello hello;
  hello.role = protocol::WorkerRole::kEngine;
  hello.worker = WorkerId("bench/cpu0");
  hello.incarnation = 1;
  hello.model = model;
  hello.credits = 64;
  send(endpoint, protocol::WorkerMessage{hello});
  std::uint64_t seq = 0;
  TimeMs beat_ms = 0;
  const SystemClock clock;
  while (!stop) {
    if (clock.now_ms() - beat_ms > 1000) {
      beat_ms = clock.now_ms();
      protocol::Heartbeat beat;
      beat.worker = hello.worker;
      beat.role = hello.role;
      beat.incarnation = 1;
      beat.seq = ++seq;
      send(endpoint, protocol::WorkerMessage{beat});
    }
    auto envelope = endpoint.receive(kPollMs);
    if (!envelope) continue;
    auto message = protocol::decode_control(envelope->frame);
    const auto* infer = message.ok() ? std::get_if<protocol::Infer>(&*message) : nullptr;
    if (infer == nullptr) continue;
    protocol::InferChunk chunk;
    chunk.attempt = infer->attempt;
    chunk.chunk.id = infer->request.id;
    chunk.chunk.tokens = {1};
    chunk.chunk.text = "x";
    chunk.chunk.finish = protocol::FinishReason::kStop;
    send(endpoint, protocol::WorkerMessage{chunk});
  }
}

/// Microseconds from send to the first token, request by request.
std::vector<double> ask(ClientEndpoint& endpoint, int requests, bool cached) {
  std::vector<double> us;
  for (int i = 0; i < requests; ++i) {
    protocol::Generate request;
    request.id = RequestId(str(cached ? "c" : "r", i));
    request.model = "base";
    request.input.prompt = "one prompt of some length, as people write them";
    request.sampling.temperature = 0.0f;
    request.no_cache = !cached;
    const std::int64_t begin = steady_ns();
    send(endpoint, protocol::ClientMessage{request});
    for (bool answered = false; !answered;) {
      auto envelope = endpoint.receive(kPollMs);
      if (!envelope) continue;
      auto message = protocol::decode_server(envelope->frame);
      const auto* chunk = message.ok() ? std::get_if<protocol::GenerateChunk>(&*message) : nullptr;
      answered = chunk != nullptr && chunk->id == request.id;
      TANDEM_CHECK(chunk == nullptr || chunk->status.ok(), chunk->status.message());
    }
    us.push_back(static_cast<double>(steady_ns() - begin) / 1e3);
  }
  std::sort(us.begin(), us.end());
  return us;
}

nlohmann::ordered_json quantiles(const std::vector<double>& us) {
  const auto at = [&](double q) {
    return us[static_cast<std::size_t>(q * static_cast<double>(us.size() - 1))];
  };
  return {{"requests", us.size()}, {"p50_us", at(0.5)}, {"p90_us", at(0.9)}, {"p99_us", at(0.99)}};
}

/// Jobs that ended, each with the events of 100 steps and two checkpoints.
void furnish_history(storage::Registry& registry, int jobs) {
  RegistryStore store(registry);
  storage::Manifest state;
  state.kind = ManifestKind::kCheckpoint;
  for (int i = 0; i < 420; ++i)  // of 30 blocks: seven linears, A and B
    state.tensors.push_back(storage::describe_tensor(
        str("adapter.model.layers.", i / 14, ".linear", i % 14, ".weight"), "u8", {0}, {}));
  const std::string text = storage::encode_manifest(state).value();
  for (int i = 0; i < jobs; ++i) {
    Job job;
    job.id = JobId(str("job-", sha256(str("job", i)).hex().substr(0, 12)));
    job.order = static_cast<std::uint64_t>(i) + 1;
    job.state = JobState::kSucceeded;
    job.spec_json = R"({"model":"base","train":")" + std::string(2000, 'x') + R"("})";
    job.estimate_json = R"({"by_kind":")" + std::string(500, 'x') + R"("})";
    job.summary_json = job.metrics_json = R"({"loss":1.5,"tokens_per_second":1000})";
    job.step = job.total_steps = 100;
    job.events = 100;
    job.submitted_unix_ms = job.ended_unix_ms = 1'700'000'000'000 + i;
    std::vector<Write> writes{job};
    for (std::uint64_t seq = 1; seq <= job.events; ++seq)
      writes.emplace_back(JobEventRecord{job.id.value, seq, job.ended_unix_ms, "info", "step", "",
                                         R"({"step":1,"total_steps":100,"loss":1.234567,)"
                                         R"("learning_rate":0.0002,"grad_norm":1.2345,)"
                                         R"("tokens":4096,"seconds":1.5,"epoch":0.5})"});
    for (std::int64_t step : {50, 100}) {
      const Digest digest = sha256(str(job.id, step));
      writes.emplace_back(
          ManifestRecord{digest, ManifestKind::kCheckpoint, text, {}, job.ended_unix_ms});
      writes.emplace_back(CheckpointRecord{job.id.value, step, 1, digest, job.ended_unix_ms});
    }
    TANDEM_CHECK(store.commit(writes).ok());
  }
}

/// Milliseconds of a call, without what came before.
double call_ms(ClientEndpoint& endpoint, const std::string& method, const std::string& params) {
  const std::int64_t begin = steady_ns();
  static int calls = 0;
  const std::string id = str("call", ++calls);
  send(endpoint, protocol::ClientMessage{protocol::Call{id, "", method, params}});
  for (;;) {
    auto envelope = endpoint.receive(kPollMs);
    if (!envelope) continue;
    auto message = protocol::decode_server(envelope->frame);
    const auto* reply = message.ok() ? std::get_if<protocol::CallReply>(&*message) : nullptr;
    if (reply == nullptr || reply->call_id != id) continue;
    TANDEM_CHECK(reply->status.ok(), reply->status.message());
    return static_cast<double>(steady_ns() - begin) / 1e6;
  }
}

void furnish(storage::Registry& registry, Digest& model_digest) {
  RegistryStore store(registry);
  ModelRecord model;
  model.name = "base";
  model.digest = model_digest = sha256("base");
  TANDEM_CHECK(store.commit({model}).ok());
}

int run(int requests, int jobs) {
  std::string folder = "/tmp/tandem-bench-XXXXXX";
  TANDEM_CHECK(::mkdtemp(folder.data()) != nullptr, folder);
  const SystemClock clock;
  storage::RegistryOptions stored;
  stored.directory = folder + "/data";
  stored.registry_map_bytes = 1 << 30;
  auto registry = storage::Registry::open(stored, clock).value();
  Digest model;
  furnish(*registry, model);
  furnish_history(*registry, jobs);
  auto context = protocol::ZmqContext::create().value();
  const auto listen = [&](const std::string& name) {
    protocol::ZmqServerOptions options;
    options.endpoint = str("ipc://", folder, "/", name);
    return context->listen(options).value();
  };
  const auto connect = [&](const std::string& name) {
    protocol::ZmqClientOptions options;
    options.endpoint = str("ipc://", folder, "/", name);
    options.routing_id = protocol::make_routing_id("bench", name);
    return context->connect(options).value();
  };
  auto clients = listen("clients");
  auto workers = listen("workers");
  auto poller = context->make_poller().value();
  poller->add(*workers);
  poller->add(*clients);
  ServedFiles files;
  const std::int64_t load_begin = steady_ns();
  auto loop =
      CoordinatorLoop::create({*clients, *workers, *poller, *registry, files, clock}, {}, {}, "")
          .value();
  const double start_ms = static_cast<double>(steady_ns() - load_begin) / 1e6;
  std::atomic<bool> stop{false};
  std::thread coordinator([&] { loop->run(stop); });
  auto engine_end = connect("workers");
  std::thread engine([&] { run_engine(*engine_end, model, stop); });
  auto client = connect("clients");
  send(*client, protocol::ClientMessage{protocol::ClientHello{{}, "bench"}});
  (void)ask(*client, 100, false);  // warm
  const double list_ms = call_ms(*client, "job.list", R"({"limit":20})");
  const double page_ms = call_ms(*client, "job.list", "{}");
  const double status_ms = call_ms(*client, "status", "{}");
  const double gc_ms = call_ms(*client, "registry.gc", "{}");
  const auto uncached = ask(*client, requests, false);
  (void)ask(*client, 1, true);
  const auto cached = ask(*client, requests, true);
  stop = true;
  coordinator.join();
  engine.join();
  std::cout << nlohmann::ordered_json{{"bench", "coordinator"},
                                      {"cores", processors()},
                                      {"transport", "ipc"},
                                      {"ended_jobs", jobs},
                                      {"registry_bytes", registry->store().stats()->used_bytes},
                                      {"start_ms", start_ms},
                                      {"list_20_ms", list_ms},
                                      {"list_page_ms", page_ms},
                                      {"status_ms", status_ms},
                                      {"gc_ms", gc_ms},
                                      {"first_token", quantiles(uncached)},
                                      {"cached_answer", quantiles(cached)}}
                   .dump(2)
            << "\n";
  engine_end.reset();
  client.reset();
  poller.reset();
  clients.reset();
  workers.reset();
  std::filesystem::remove_all(folder);
  return 0;
}

}  // namespace
}  // namespace tandem::coordinator

int main(int argc, char** argv) {
  tandem::set_log_level(tandem::LogLevel::kError);
  return tandem::coordinator::run(argc > 1 ? std::max(1, std::atoi(argv[1])) : 2000,
                                  argc > 2 ? std::max(0, std::atoi(argv[2])) : 0);
}
