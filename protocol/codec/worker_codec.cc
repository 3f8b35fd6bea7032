// WorkerMessage: what agents and engines send to the coordinator.
#include "protocol/codec/control_shared.h"

namespace tandem::protocol {
namespace codec {

static void put(wire::RunningJob::Builder b, const RunningJob& m) {
  put_job_epoch(b, m);
  b.setStep(m.step);
}
static RunningJob get(wire::RunningJob::Reader r) {
  RunningJob m;
  get_job_epoch(r, m, "jobs.job");
  m.step = r.getStep();
  return m;
}

static constexpr auto kPutRunning = [](auto item, const RunningJob& job) { put(item, job); };
static constexpr auto kGetRunning = [](auto item) { return get(item); };

static WorkerRole get_role(wire::WorkerRole role) {
  return get_enum(role, WorkerRole::kGang, "role");
}

static void put(wire::WorkerMessage::Builder root, const WorkerHello& m) {
  auto b = root.initHello();
  put(b.initVersion(), m.version);
  b.setRole(static_cast<wire::WorkerRole>(m.role));
  b.setWorker(text(m.worker.value));
  b.setHost(text(m.host));
  b.setSlot(m.slot);
  b.setDevice(text(m.device));
  b.setDeviceName(text(m.device_name));
  b.setMemoryBytes(m.memory_bytes);
  b.setPid(m.pid);
  b.setIncarnation(m.incarnation);
  b.setModel(data(m.model));
  put_structs(b.initJobs(count(m.jobs)), m.jobs, kPutRunning);
  put_ids(b.initRequests(count(m.requests)), m.requests);
  put_digests(b.initAdapters(count(m.adapters)), m.adapters);
  b.setCredits(m.credits);
  b.setProgram(text(m.program));
  b.setBaseBytes(m.base_bytes);
}
static WorkerHello get(wire::WorkerHello::Reader r) {
  WorkerHello m;
  m.version = get(r.getVersion());
  m.role = get_role(r.getRole());
  m.worker = get_id<WorkerId>(r.getWorker(), "hello.worker");
  m.host = get_text(r.getHost(), "hello.host", kIdBytesMax);
  m.slot = r.getSlot();
  m.device = get_text(r.getDevice(), "hello.device", kNameBytesMax);
  m.device_name = get_text(r.getDeviceName(), "hello.device_name", kNameBytesMax);
  m.memory_bytes = get_count(r.getMemoryBytes(), "hello.memory_bytes");
  m.pid = r.getPid();
  m.incarnation = r.getIncarnation();
  m.model = get_digest(r.getModel(), "hello.model");
  m.jobs = get_structs<RunningJob>(r.getJobs(), "hello.jobs", kGetRunning);
  m.requests = get_ids<RequestId>(r.getRequests(), "hello.requests");
  m.adapters = get_digests(r.getAdapters(), "hello.adapters");
  m.credits = get_count(r.getCredits(), "hello.credits");
  m.program = get_text(r.getProgram(), "hello.program", kNameBytesMax);
  m.base_bytes = get_count(r.getBaseBytes(), "hello.base_bytes");
  return m;
}

static void put(wire::WorkerMessage::Builder root, const Heartbeat& m) {
  auto b = root.initHeartbeat();
  b.setWorker(text(m.worker.value));
  b.setRole(static_cast<wire::WorkerRole>(m.role));
  b.setIncarnation(m.incarnation);
  b.setSeq(m.seq);
  b.setRunning(m.running);
  b.setWaiting(m.waiting);
  b.setKvBlocksFree(m.kv_blocks_free);
  b.setKvBlocksTotal(m.kv_blocks_total);
  b.setTokensPerSecond(m.tokens_per_second);
  put_structs(b.initJobs(count(m.jobs)), m.jobs, kPutRunning);
  put_digests(b.initAdapters(count(m.adapters)), m.adapters);
  b.setStatsJson(text(m.stats_json));
}
static Heartbeat get(wire::Heartbeat::Reader r) {
  Heartbeat m;
  m.worker = get_id<WorkerId>(r.getWorker(), "heartbeat.worker");
  m.role = get_role(r.getRole());
  m.incarnation = r.getIncarnation();
  m.seq = r.getSeq();
  m.running = get_count(r.getRunning(), "heartbeat.running");
  m.waiting = get_count(r.getWaiting(), "heartbeat.waiting");
  m.kv_blocks_free = get_count(r.getKvBlocksFree(), "heartbeat.kv_blocks_free");
  m.kv_blocks_total = get_count(r.getKvBlocksTotal(), "heartbeat.kv_blocks_total");
  m.tokens_per_second = r.getTokensPerSecond();
  m.jobs = get_structs<RunningJob>(r.getJobs(), "heartbeat.jobs", kGetRunning);
  m.adapters = get_digests(r.getAdapters(), "heartbeat.adapters");
  m.stats_json = get_text(r.getStatsJson(), "heartbeat.stats_json");
  return m;
}

static void put(wire::WorkerMessage::Builder root, const ModelLoaded& m) {
  auto b = root.initModelLoaded();
  b.setModel(data(m.model));
  put(b.initStatus(), m.status);
  b.setSeconds(m.seconds);
  b.setBaseBytes(m.base_bytes);
}
static ModelLoaded get(wire::ModelLoaded::Reader r) {
  return {get_digest(r.getModel(), "model_loaded.model"), get(r.getStatus()), r.getSeconds(),
          get_count(r.getBaseBytes(), "model_loaded.base_bytes")};
}

static void put(wire::WorkerMessage::Builder root, const EstimateReply& m) {
  auto b = root.initEstimateReply();
  b.setCallId(text(m.call_id));
  put(b.initStatus(), m.status);
  b.setResultJson(text(m.result_json));
}
static EstimateReply get(wire::EstimateReply::Reader r) {
  return {get_text(r.getCallId(), "estimate_reply.call_id", kIdBytesMax), get(r.getStatus()),
          get_text(r.getResultJson(), "estimate_reply.result_json")};
}

static void put(wire::WorkerMessage::Builder root, const JobProgress& m) {
  auto b = root.initProgress();
  put_job_epoch(b, m);
  b.setSeq(m.seq);
  b.setKind(text(m.kind));
  b.setStep(m.step);
  b.setTotalSteps(m.total_steps);
  b.setMessage(text(m.message));
  b.setMetricsJson(text(m.metrics_json));
}
static JobProgress get(wire::JobProgress::Reader r) {
  JobProgress m;
  get_job_epoch(r, m, "progress.job");
  m.seq = r.getSeq();
  m.kind = get_text(r.getKind(), "progress.kind", kIdBytesMax);
  m.step = get_count(r.getStep(), "progress.step");
  m.total_steps = get_count(r.getTotalSteps(), "progress.total_steps");
  m.message = get_text(r.getMessage(), "progress.message");
  m.metrics_json = get_text(r.getMetricsJson(), "progress.metrics_json");
  return m;
}

static void put(wire::WorkerMessage::Builder root, const CheckpointReady& m) {
  auto b = root.initCheckpoint();
  put_job_epoch(b, m);
  b.setStep(m.step);
  b.setManifest(text(m.manifest));
}
static CheckpointReady get(wire::CheckpointReady::Reader r) {
  CheckpointReady m;
  get_job_epoch(r, m, "checkpoint.job");
  m.step = get_count(r.getStep(), "checkpoint.step");
  m.manifest = get_text(r.getManifest(), "checkpoint.manifest", kManifestBytesMax);
  return m;
}

static void put(wire::WorkerMessage::Builder root, const Publish& m) {
  auto b = root.initPublish();
  put_job_epoch(b, m);
  b.setStep(m.step);
  b.setManifest(text(m.manifest));
  b.setMetadataJson(text(m.metadata_json));
}
static Publish get(wire::Publish::Reader r) {
  Publish m;
  get_job_epoch(r, m, "publish.job");
  m.step = get_count(r.getStep(), "publish.step");
  m.manifest = get_text(r.getManifest(), "publish.manifest", kManifestBytesMax);
  m.metadata_json = get_text(r.getMetadataJson(), "publish.metadata_json");
  return m;
}

static void put(wire::WorkerMessage::Builder root, const JobEnded& m) {
  auto b = root.initEnded();
  put_job_epoch(b, m);
  put(b.initStatus(), m.status);
  b.setStep(m.step);
  b.setSummaryJson(text(m.summary_json));
}
static JobEnded get(wire::JobEnded::Reader r) {
  JobEnded m;
  get_job_epoch(r, m, "ended.job");
  m.status = get(r.getStatus());
  m.step = get_count(r.getStep(), "ended.step");
  m.summary_json = get_text(r.getSummaryJson(), "ended.summary_json");
  return m;
}

static void put(wire::WorkerMessage::Builder root, const InferChunk& m) {
  auto b = root.initChunk();
  b.setAttempt(m.attempt);
  put(b.initChunk(), m.chunk);
}

static void put(wire::WorkerMessage::Builder root, const WorkerBye& m) {
  auto b = root.initBye();
  b.setWorker(text(m.worker.value));
  b.setRole(static_cast<wire::WorkerRole>(m.role));
  b.setIncarnation(m.incarnation);
}

static void put(wire::WorkerMessage::Builder root, const LaunchDaemon& m) {
  put(root.initLaunch(), m);
}
static void put(wire::WorkerMessage::Builder root, const DaemonLaunched& m) {
  put(root.initLaunched(), m);
}

static WorkerMessage get(wire::WorkerMessage::Reader r) {
  switch (r.which()) {
    case wire::WorkerMessage::HELLO:
      return get(r.getHello());
    case wire::WorkerMessage::HEARTBEAT:
      return get(r.getHeartbeat());
    case wire::WorkerMessage::MODEL_LOADED:
      return get(r.getModelLoaded());
    case wire::WorkerMessage::ESTIMATE_REPLY:
      return get(r.getEstimateReply());
    case wire::WorkerMessage::PROGRESS:
      return get(r.getProgress());
    case wire::WorkerMessage::CHECKPOINT:
      return get(r.getCheckpoint());
    case wire::WorkerMessage::PUBLISH:
      return get(r.getPublish());
    case wire::WorkerMessage::ENDED:
      return get(r.getEnded());
    case wire::WorkerMessage::CHUNK:
      return InferChunk{r.getChunk().getAttempt(), get(r.getChunk().getChunk())};
    case wire::WorkerMessage::BYE: {
      const auto bye = r.getBye();
      return WorkerBye{get_id<WorkerId>(bye.getWorker(), "bye.worker"), get_role(bye.getRole()),
                       bye.getIncarnation()};
    }
    case wire::WorkerMessage::LAUNCH:
      return get(r.getLaunch());
    case wire::WorkerMessage::LAUNCHED:
      return get(r.getLaunched());
  }
  refuse_unknown("worker message", static_cast<unsigned>(r.which()));
}

}  // namespace codec

Bytes encode(const WorkerMessage& message) {
  return codec::encode_root<wire::WorkerMessage>(
      [&](auto b) { std::visit([&](const auto& m) { codec::put(b, m); }, message); });
}

Result<WorkerMessage> decode_worker(std::span<const std::byte> frame, DecodeCounters* counters) {
  return codec::decode_root<wire::WorkerMessage, WorkerMessage>(
      "worker message", frame, counters, [](auto r) { return codec::get(r); },
      kWorkerFrameBytesMax);
}

}  // namespace tandem::protocol
