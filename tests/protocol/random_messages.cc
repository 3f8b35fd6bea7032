#include "tests/protocol/random_messages.h"

#include "protocol/base/check.h"

#include <string>
#include <utility>
#include <vector>

namespace tandem::protocol {
namespace {

/// Draws values that are never a field's default.
class Draw {
 public:
  explicit Draw(Random& random) : random_(random) {}

  std::string text() {
    static constexpr const char* kPieces[] = {"a", "Z", " ", "\n", "\"", "é", "漢", "😀", "\\", "0"};
    std::string out;
    const auto pieces = 1 + random_.below(12);
    for (std::uint64_t i = 0; i < pieces; ++i) out += kPieces[random_.below(std::size(kPieces))];
    return out;
  }
  template <class IdType>
  IdType id() {
    return IdType(text());
  }
  std::int64_t count() { return 1 + static_cast<std::int64_t>(random_.next() >> 2); }
  std::uint64_t number() { return random_.next() | 1; }
  std::int32_t token() { return 2 + static_cast<std::int32_t>(random_.below(1u << 30)); }
  float real() { return 2.0f + random_.uniform(); }
  Digest digest() {
    Digest d;
    for (auto& byte : d.bytes) byte = static_cast<std::uint8_t>(1 + random_.below(255));
    return d;
  }
  /// Never the first value, which is the default.
  template <class E>
  E value(E last) {
    return static_cast<E>(1 + random_.below(static_cast<std::uint64_t>(last)));
  }
  Status status() { return {value(StatusCode::kConflict), text()}; }
  Version version() {
    return {static_cast<std::uint16_t>(2 + random_.below(99)),
            static_cast<std::uint16_t>(2 + random_.below(99))};
  }
  template <class Make>
  auto list(Make make) {
    std::vector<decltype(make())> values;
    const auto size = 1 + random_.below(4);
    for (std::uint64_t i = 0; i < size; ++i) values.push_back(make());
    return values;
  }
  std::vector<Digest> digests() {
    return list([&] { return digest(); });
  }
  std::vector<std::int32_t> tokens() {
    return list([&] { return token(); });
  }

  PromptInput input() {
    return {list([&] { return ChatMessage{text(), text()}; }), text(), tokens(), true};
  }
  SamplingParams sampling() {
    SamplingParams m;
    m.max_tokens = count();
    m.temperature = real();
    m.top_k = count();
    m.top_p = real();
    m.min_p = real();
    m.repetition_penalty = real();
    m.presence_penalty = real();
    m.frequency_penalty = real();
    m.seed = -count();
    m.stop = list([&] { return text(); });
    m.stop_token_ids = tokens();
    m.logprobs = count();
    m.min_tokens = count();
    m.ignore_eos = true;
    m.prompt_logprobs_from = 1 + count();
    return m;
  }
  Generate generate() {
    return {id<RequestId>(), text(), input(), sampling(), false, true, count(), count()};
  }
  GenerateChunk chunk() {
    GenerateChunk m;
    m.id = id<RequestId>();
    m.index = count();
    m.text = text();
    m.tokens = tokens();
    m.logprobs = list([&] {
      return TokenLogprob{token(), -real(), list([&] { return std::pair(token(), -real()); })};
    });
    m.finish = value(FinishReason::kError);
    m.status = status();
    m.usage = {count(), count(), count()};
    m.model = digest();
    m.adapter = digest();
    m.cached = true;
    m.queue_us = count();
    m.first_token_us = count();
    m.retry_after_ms = count();
    m.prompt_logprobs = {-0.5f, -1.25f};
    return m;
  }
  ModelRef model() {
    return {digest(), text(), text(), true, list([&] { return std::pair(text(), digest()); })};
  }
  std::vector<RunningJob> jobs() {
    return list([&] { return RunningJob{id<JobId>(), number(), count()}; });
  }
  template <class IdType>
  std::vector<IdType> ids() {
    return list([&] { return id<IdType>(); });
  }

 private:
  Random& random_;
};

WorkerHello worker_hello(Draw& d) {
  WorkerHello m;
  m.version = d.version();
  m.role = WorkerRole::kGang;
  m.worker = d.id<WorkerId>();
  m.host = d.text();
  m.slot = d.token();
  m.device = d.text();
  m.device_name = d.text();
  m.memory_bytes = d.count();
  m.pid = d.count();
  m.incarnation = d.number();
  m.model = d.digest();
  m.jobs = d.jobs();
  m.requests = d.ids<RequestId>();
  m.adapters = d.digests();
  m.credits = d.count();
  m.program = d.text();
  m.base_bytes = d.count();
  return m;
}

Heartbeat heartbeat(Draw& d) {
  Heartbeat m;
  m.worker = d.id<WorkerId>();
  m.role = WorkerRole::kEngine;
  m.incarnation = d.number();
  m.seq = d.number();
  m.running = d.count();
  m.waiting = d.count();
  m.kv_blocks_free = d.count();
  m.kv_blocks_total = d.count();
  m.tokens_per_second = d.real();
  m.jobs = d.jobs();
  m.adapters = d.digests();
  m.stats_json = d.text();
  return m;
}

StartJob start_job(Draw& d) {
  return {d.id<JobId>(),
          d.number(),
          d.text(),
          d.model(),
          d.digest(),
          d.digest(),
          d.count(),
          d.count(),
          d.text(),
          d.number(),
          {d.id<WorkerId>(), d.id<WorkerId>()},
          d.text(),
          d.count()};
}

LaunchDaemon launch_daemon(Draw& d) {
  return {d.id<WorkerId>(), start_job(d), {d.text(), d.text(), d.text()}};
}
DaemonLaunched daemon_launched(Draw& d) {
  return {d.id<JobId>(), d.number(), d.id<WorkerId>(), d.status()};
}

}  // namespace

ClientMessage random_client_message(std::size_t kind, Random& random) {
  Draw d(random);
  switch (kind) {
    case 0:
      return ClientHello{d.version(), d.text()};
    case 1:
      return d.generate();
    case 2:
      return Cancel{d.id<RequestId>()};
    case 3:
      return Call{d.text(), d.text(), d.text(), d.text()};
    case 4:
      return CallCancel{d.text()};
    default:
      TANDEM_CHECK_EQ(kind, 5u);
      return Ping{d.number()};
  }
}

ServerMessage random_server_message(std::size_t kind, Random& random) {
  Draw d(random);
  switch (kind) {
    case 0:
      return ServerHello{d.status(), d.version(), d.text(), d.number(), d.count()};
    case 1:
      return d.chunk();
    case 2:
      return CallReply{d.text(), d.status(), d.text(), true, d.count()};
    default:
      TANDEM_CHECK_EQ(kind, 3u);
      return Pong{d.number()};
  }
}

WorkerMessage random_worker_message(std::size_t kind, Random& random) {
  Draw d(random);
  switch (kind) {
    case 0:
      return worker_hello(d);
    case 1:
      return heartbeat(d);
    case 2:
      return ModelLoaded{d.digest(), d.status(), d.real(), d.count()};
    case 3:
      return EstimateReply{d.text(), d.status(), d.text()};
    case 4:
      return JobProgress{d.id<JobId>(), d.number(), d.number(), d.text(),
                         d.count(),     d.count(),  d.text(),   d.text()};
    case 5:
      return CheckpointReady{d.id<JobId>(), d.number(), d.count(), d.text()};
    case 6:
      return Publish{d.id<JobId>(), d.number(), d.count(), d.text(), d.text()};
    case 7:
      return JobEnded{d.id<JobId>(), d.number(), d.status(), d.count(), d.text()};
    case 8:
      return InferChunk{static_cast<std::uint32_t>(d.token()), d.chunk()};
    case 9:
      return WorkerBye{d.id<WorkerId>(), WorkerRole::kEngine, d.number()};
    case 10:
      return launch_daemon(d);
    default:
      TANDEM_CHECK_EQ(kind, 11u);
      return daemon_launched(d);
  }
}

ControlMessage random_control_message(std::size_t kind, Random& random) {
  Draw d(random);
  switch (kind) {
    case 0:
      return WorkerHelloReply{d.status(),     d.number(),         d.count(), d.count(),
                              d.ids<JobId>(), d.ids<RequestId>(), d.count()};
    case 1:
      return HeartbeatReply{d.number(), d.count()};
    case 2:
      return AgentCommand{d.value(AgentAction::kUpgrade), d.number()};
    case 3:
      return LoadModel{d.model(), d.count()};
    case 4:
      return EstimateRequest{d.text(), d.model(), d.text(), d.text(), false};
    case 5:
      return start_job(d);
    case 6:
      return StopJob{d.id<JobId>(), d.number(), StopMode::kPause};
    case 7:
      return JobAck{d.id<JobId>(), d.number(), d.text(), d.status(), d.digest(), d.text()};
    case 8:
      return Infer{d.generate(), static_cast<std::uint32_t>(d.token()),
                   d.model(),    d.digest(),
                   d.text(),     d.id<JobId>()};
    case 9:
      return InferCancel{d.id<RequestId>()};
    case 10:
      return Announce{d.text(), d.digest(), d.digest(), d.text()};
    case 11:
      return launch_daemon(d);
    default:
      TANDEM_CHECK_EQ(kind, 12u);
      return daemon_launched(d);
  }
}

BulkRequest random_bulk_request(std::size_t kind, Random& random) {
  Draw d(random);
  switch (kind) {
    case 0:
      return BlobHas{d.number(), d.digests()};
    case 1:
      return BlobPut{d.number(), d.digest(), d.text(), d.list([&] {
                       return BlobPart{d.digest(), d.count()};
                     })};
    default:
      TANDEM_CHECK_EQ(kind, 2u);
      return BlobGet{d.number(), d.digest(), d.count(), d.count()};
  }
}

BlobReply random_blob_reply(Random& random) {
  Draw d(random);
  return {d.number(), d.status(), {true, false, true}, d.count()};
}

}  // namespace tandem::protocol
