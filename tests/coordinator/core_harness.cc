#include "tests/coordinator/core_harness.h"

#include "storage/manifest.h"

namespace tandem::coordinator {

CoreHarness::CoreHarness(Limits limits) : limits_(limits) {
  auto memory = std::make_unique<storage::MemoryStore>(storage::registry_tables());
  memory_ = memory.get();
  auto blobs = storage::BlobStore::open(
      std::make_unique<storage::MemoryStore>(storage::BlobStore::tables()), "", 1 << 30, clock_);
  registry_ =
      storage::Registry::create(std::move(memory), std::move(blobs).value(), clock_).value();
  store_ = std::make_unique<RegistryStore>(*registry_);
  clock_.advance(1000);
  start();
  client("c");
}

void CoreHarness::start() {
  Options options;
  options.limits = limits_;
  options.incarnation = ++lives_;
  options.seed = lives_;
  core_ =
      std::make_unique<Coordinator>(options, store_->load().value(),
                                    Now{clock_.now_ms(), clock_.unix_ms(), clock_.now_ms() * 1000});
}

void CoreHarness::restart() {
  core_.reset();
  start();
  client("c");
}

void CoreHarness::advance(TimeMs ms) {
  for (TimeMs done = 0; done < ms; done += 50) {
    clock_.advance(50);
    step(Tick{});
  }
}

void CoreHarness::step(const Input& input) {
  last_ = core_->step({clock_.now_ms(), clock_.unix_ms(), clock_.now_ms() * 1000}, input);
  std::vector<StartWork> work;
  bool failed = false;
  const std::vector<Effect> effects = last_;
  for (const Effect& effect : effects) {
    if (const auto* persist = std::get_if<Persist>(&effect)) {
      const Status status = store_->commit(persist->writes);
      if (status.ok()) {
        persists_.push_back(*persist);
      } else {
        failed = true;
        for (const Effect& more :
             core_->step({clock_.now_ms(), clock_.unix_ms(), 0}, CommitFailed{status}))
          if (const auto* send = std::get_if<SendClient>(&more))
            clients_[send->peer].push_back(send->message);
      }
    } else if (const auto* to_client = std::get_if<SendClient>(&effect)) {
      if (!failed) clients_[to_client->peer].push_back(to_client->message);
    } else if (const auto* to_worker = std::get_if<SendWorker>(&effect)) {
      if (failed) continue;
      workers_[to_worker->peer].push_back(to_worker->message);
      if (const auto* infer = std::get_if<protocol::Infer>(&to_worker->message))
        for (const auto& [slot, incarnation] : incarnations_)
          if (engine_peer(slot) == to_worker->peer)
            attempts_[slot][infer->request.id.value] = infer->attempt;
    } else if (const auto* start_work = std::get_if<StartWork>(&effect)) {
      work.push_back(*start_work);
    }
  }
  for (const StartWork& next : work) {
    if (hold_work)
      held.push_back(next);
    else
      step(do_work(next, *registry_, {}));
  }
}

void CoreHarness::release_work() {
  hold_work = false;
  for (const StartWork& work : std::exchange(held, {})) step(do_work(work, *registry_, {}));
}

void CoreHarness::client(const std::string& peer, const std::string& user) {
  step(ClientInput{peer, user, protocol::ClientHello{{}, "test"}});
}

void CoreHarness::engine(int slot, Incarnation incarnation,
                         std::vector<protocol::RunningJob> jobs) {
  if (incarnation == 0) incarnation = 1000 + ++seq_;
  incarnations_[slot] = incarnation;
  protocol::WorkerHello hello;
  hello.role = protocol::WorkerRole::kEngine;
  hello.worker = worker(slot);
  hello.host = host(slot);
  hello.slot = slot;
  hello.device = device(slot);
  hello.device_name = device_names[slot];
  hello.memory_bytes = 1 << 30;
  hello.base_bytes = base_bytes[slot];
  hello.incarnation = incarnation;
  hello.credits = 2;
  hello.jobs = std::move(jobs);
  if (const auto& models = core_->tables().models; !models.empty())
    hello.model = models.begin()->second.digest;
  from_engine(slot, hello);
}

void CoreHarness::agent(int slot, std::vector<protocol::RunningJob> jobs) {
  protocol::WorkerHello hello;
  hello.role = protocol::WorkerRole::kAgent;
  hello.worker = worker(slot);
  hello.host = host(slot);
  hello.slot = slot;
  hello.device = device(slot);
  hello.device_name = device_names[slot];
  hello.program = programs[slot];
  hello.incarnation = 1;
  hello.jobs = std::move(jobs);
  from_agent(slot, hello);
}

void CoreHarness::gang(int slot, Incarnation incarnation, std::vector<protocol::RunningJob> jobs,
                       const Digest& model) {
  protocol::WorkerHello hello;
  hello.role = protocol::WorkerRole::kGang;
  hello.worker = worker(slot);
  hello.incarnation = incarnation;
  hello.jobs = std::move(jobs);
  hello.model = model;
  hello.credits = model.empty() ? 0 : 2;
  from_gang(slot, hello);
}

void CoreHarness::from_agent(int slot, protocol::WorkerMessage message) {
  step(WorkerInput{agent_peer(slot), "", std::move(message)});
}

void CoreHarness::from_gang(int slot, protocol::WorkerMessage message) {
  step(WorkerInput{gang_peer(slot), "", std::move(message)});
}

void CoreHarness::beat(int slot, std::vector<protocol::RunningJob> jobs, int running,
                       std::vector<Digest> adapters) {
  protocol::Heartbeat beat;
  beat.worker = worker(slot);
  beat.role = protocol::WorkerRole::kEngine;
  beat.incarnation = incarnations_[slot];
  beat.seq = ++seq_;
  beat.running = running;
  beat.jobs = std::move(jobs);
  beat.adapters = std::move(adapters);
  from_engine(slot, beat);
}

void CoreHarness::from_client(const std::string& peer, protocol::ClientMessage message) {
  step(ClientInput{peer, "", std::move(message)});
}

void CoreHarness::from_engine(int slot, protocol::WorkerMessage message) {
  step(WorkerInput{engine_peer(slot), "", std::move(message)});
}

protocol::CallReply CoreHarness::call(const std::string& method, const nlohmann::json& params,
                                      const std::string& key, const std::string& peer) {
  const std::string id = str("call", ++calls_);
  from_client(peer, protocol::Call{id, key.empty() ? id : key, method, params.dump()});
  protocol::CallReply last;
  last.status = internal_error("no reply yet");
  for (const auto& reply : to_client<protocol::CallReply>(peer))
    if (reply.call_id == id) last = reply;
  return last;
}

std::string CoreHarness::manifest(ManifestKind kind, const Digest& base, const std::string& bytes,
                                  bool upload) {
  storage::Manifest manifest;
  manifest.kind = kind;
  manifest.settings_json =
      nlohmann::json{{"base_model", base.hex()}, {"r", bytes.size()}, {"lora_alpha", 1}}.dump();
  const auto add = [&](const std::string& name, const char* dtype, std::vector<std::int64_t> shape,
                       const std::string& content) {
    manifest.tensors.push_back(
        storage::describe_tensor(name, dtype, std::move(shape), std::as_bytes(std::span(content))));
    if (upload)
      (void)registry_->blobs().put_chunk(manifest.tensors.back().chunks[0],
                                         std::as_bytes(std::span(content)));
  };
  // A base's one linear layer is [1, 1]; an adapter of it has as many ranks as `bytes` has bytes.
  const std::string layer = "model.layers.0.mlp.up_proj";
  const auto count = static_cast<std::int64_t>(bytes.size());
  if (kind == ManifestKind::kAdapter) {
    add("base_model.model." + layer + ".lora_A.weight", "f32", {count, 1},
        bytes + bytes + bytes + bytes);
    add("base_model.model." + layer + ".lora_B.weight", "f32", {1, count},
        bytes + bytes + bytes + bytes);
  } else {
    add("w", "u8", {count}, bytes);
  }
  if (kind == ManifestKind::kModel) add(layer + ".weight", "u8", {1, 1}, "1");
  return storage::encode_manifest(manifest).value();
}

Digest CoreHarness::add_model(const std::string& name) {
  const std::string text = manifest(ManifestKind::kModel, {}, "weights of " + name);
  ModelRecord model;
  model.name = name;
  model.digest = sha256(text);
  model.path = "/models/" + name;
  model.created_unix_ms = clock_.unix_ms();
  EXPECT_TRUE(
      store_->commit({ManifestRecord{model.digest, ManifestKind::kModel, text, {}, 1}, model})
          .ok());
  restart();
  return model.digest;
}

void CoreHarness::add_model_record(const ModelRecord& model) {
  EXPECT_TRUE(store_->commit({model}).ok());
  restart();
}

void CoreHarness::add_data(const std::string& name) {
  const std::string rows = "rows of " + name;
  const Digest chunk = sha256(rows);
  (void)registry_->blobs().put_chunk(chunk, std::as_bytes(std::span(rows)));
  Hasher root;
  root.update(std::as_bytes(std::span(chunk.bytes)));
  const auto reply = call("data.add", {{"digest", root.finish().hex()},
                                       {"name", name},
                                       {"bytes", rows.size()},
                                       {"chunks", {chunk.hex()}}});
  EXPECT_TRUE(reply.status.ok()) << reply.status.message();
}

JobId CoreHarness::submit(const nlohmann::json& more, const std::string& key) {
  nlohmann::json spec{{"model", "base"}, {"dataset", "rows"}, {"adapter", "tuned"}};
  if (more.is_object()) spec.update(more);
  const std::string id = str("submit", ++calls_);
  from_client("c", protocol::Call{id, key.empty() ? id : key, "job.submit",
                                  nlohmann::json{{"spec", spec}}.dump()});
  for (const auto& [slot, incarnation] : incarnations_)
    for (const auto& asked : to_engine<protocol::EstimateRequest>(slot)) {
      nlohmann::json reply = dry_run;
      reply["device"] = device(slot);
      from_engine(slot, protocol::EstimateReply{asked.call_id, {}, reply.dump()});
    }
  for (const auto& reply : to_client<protocol::CallReply>("c"))
    if (reply.call_id == id && reply.status.ok())
      return JobId(nlohmann::json::parse(reply.result_json)["job"].get<std::string>());
  return {};
}

void CoreHarness::generate(const std::string& id, const std::string& model,
                           const std::string& prompt, const std::string& peer) {
  protocol::Generate request;
  request.id = RequestId(id);
  request.model = model;
  request.input.prompt = prompt;
  request.sampling.temperature = 0.0f;
  from_client(peer, request);
}

void CoreHarness::answer(int slot, const std::string& id, std::int64_t index, std::int64_t tokens,
                         bool last) {
  protocol::InferChunk message;
  message.attempt = attempts_[slot][id];
  message.chunk.id = RequestId(id);
  message.chunk.index = index;
  for (std::int64_t i = 0; i < tokens; ++i)
    message.chunk.tokens.push_back(static_cast<std::int32_t>(100 + index + i));
  message.chunk.text = std::string(static_cast<std::size_t>(tokens), 'a');
  if (last) message.chunk.finish = protocol::FinishReason::kStop;
  from_engine(slot, message);
}

}  // namespace tandem::coordinator
