// ControlMessage: what the coordinator sends to agents and engines.
#include "protocol/codec/control_shared.h"

#include <algorithm>

namespace tandem::protocol {
namespace codec {

static void put(wire::ControlMessage::Builder root, const WorkerHelloReply& m) {
  auto b = root.initHello();
  put(b.initStatus(), m.status);
  b.setCoordinator(m.coordinator);
  b.setHeartbeatMs(m.heartbeat_ms);
  b.setLeaseMs(m.lease_ms);
  put_ids(b.initStopJobs(count(m.stop_jobs)), m.stop_jobs);
  put_ids(b.initStopRequests(count(m.stop_requests)), m.stop_requests);
  b.setGangBytes(m.gang_bytes);
}
static WorkerHelloReply get(wire::WorkerHelloReply::Reader r) {
  WorkerHelloReply m;
  m.status = get(r.getStatus());
  m.coordinator = r.getCoordinator();
  m.heartbeat_ms = get_count(r.getHeartbeatMs(), "hello_reply.heartbeat_ms");
  m.lease_ms = get_count(r.getLeaseMs(), "hello_reply.lease_ms");
  m.stop_jobs = get_ids<JobId>(r.getStopJobs(), "hello_reply.stop_jobs");
  m.stop_requests = get_ids<RequestId>(r.getStopRequests(), "hello_reply.stop_requests");
  m.gang_bytes = get_count(r.getGangBytes(), "hello_reply.gang_bytes");
  return m;
}

static void put(wire::ControlMessage::Builder root, const HeartbeatReply& m) {
  auto b = root.initHeartbeat();
  b.setSeq(m.seq);
  b.setGangBytes(m.gang_bytes);
}

static void put(wire::ControlMessage::Builder root, const AgentCommand& m) {
  auto b = root.initAgent();
  b.setAction(static_cast<wire::AgentAction>(m.action));
  b.setEngine(m.engine);
}

static void put(wire::ControlMessage::Builder root, const LoadModel& m) {
  auto b = root.initLoadModel();
  put(b.initModel(), m.model);
  b.setGangBytes(m.gang_bytes);
}

static void put(wire::ControlMessage::Builder root, const EstimateRequest& m) {
  auto b = root.initEstimate();
  b.setCallId(text(m.call_id));
  put(b.initModel(), m.model);
  b.setSpecJson(text(m.spec_json));
  b.setServeJson(text(m.serve_json));
  b.setEvaluates(m.evaluates);
}
static EstimateRequest get(wire::EstimateRequest::Reader r) {
  return {get_text(r.getCallId(), "estimate.call_id", kIdBytesMax), get(r.getModel()),
          get_text(r.getSpecJson(), "estimate.spec_json"),
          get_text(r.getServeJson(), "estimate.serve_json"), r.getEvaluates()};
}

static void put(wire::ControlMessage::Builder root, const StartJob& m) {
  put(root.initStartJob(), m);
}

static void put(wire::ControlMessage::Builder root, const StopJob& m) {
  auto b = root.initStopJob();
  put_job_epoch(b, m);
  b.setMode(static_cast<wire::StopMode>(m.mode));
}
static StopJob get(wire::StopJob::Reader r) {
  StopJob m;
  get_job_epoch(r, m, "stop_job.job");
  m.mode = get_enum(r.getMode(), StopMode::kPause, "stop_job.mode");
  return m;
}

static void put(wire::ControlMessage::Builder root, const JobAck& m) {
  auto b = root.initJobAck();
  put_job_epoch(b, m);
  b.setOf(text(m.of));
  put(b.initStatus(), m.status);
  b.setDigest(data(m.digest));
  b.setName(text(m.name));
}
static JobAck get(wire::JobAck::Reader r) {
  JobAck m;
  get_job_epoch(r, m, "job_ack.job");
  m.of = get_text(r.getOf(), "job_ack.of", kIdBytesMax);
  m.status = get(r.getStatus());
  m.digest = get_digest(r.getDigest(), "job_ack.digest");
  m.name = get_text(r.getName(), "job_ack.name", kNameBytesMax);
  return m;
}

static void put(wire::ControlMessage::Builder root, const Infer& m) {
  auto b = root.initInfer();
  put(b.initRequest(), m.request);
  b.setAttempt(m.attempt);
  put(b.initModel(), m.model);
  b.setAdapter(data(m.adapter));
  b.setAdapterManifest(text(m.adapter_manifest));
  b.setJob(text(m.job.value));
}
static Infer get(wire::Infer::Reader r) {
  Infer m;
  m.request = get(r.getRequest());
  m.attempt = r.getAttempt();
  m.model = get(r.getModel());
  m.adapter = get_digest(r.getAdapter(), "infer.adapter");
  m.adapter_manifest =
      get_text(r.getAdapterManifest(), "infer.adapter_manifest", kManifestBytesMax);
  m.job = get_id<JobId>(r.getJob(), "infer.job");
  return m;
}

static void put(wire::ControlMessage::Builder root, const InferCancel& m) {
  root.initInferCancel().setId(text(m.id.value));
}

static void put(wire::ControlMessage::Builder root, const Announce& m) {
  auto b = root.initAnnounce();
  b.setName(text(m.name));
  b.setModel(data(m.model));
  b.setAdapter(data(m.adapter));
  b.setAdapterManifest(text(m.adapter_manifest));
}
static Announce get(wire::Announce::Reader r) {
  return {get_text(r.getName(), "announce.name", kNameBytesMax),
          get_digest(r.getModel(), "announce.model"),
          get_digest(r.getAdapter(), "announce.adapter"),
          get_text(r.getAdapterManifest(), "announce.adapter_manifest", kManifestBytesMax)};
}

static void put(wire::ControlMessage::Builder root, const LaunchDaemon& m) {
  put(root.initLaunch(), m);
}
static void put(wire::ControlMessage::Builder root, const DaemonLaunched& m) {
  put(root.initLaunched(), m);
}

static ControlMessage get(wire::ControlMessage::Reader r) {
  switch (r.which()) {
    case wire::ControlMessage::HELLO:
      return get(r.getHello());
    case wire::ControlMessage::HEARTBEAT:
      return HeartbeatReply{r.getHeartbeat().getSeq(), get_count(r.getHeartbeat().getGangBytes(),
                                                                 "heartbeat_reply.gang_bytes")};
    case wire::ControlMessage::AGENT:
      return AgentCommand{get_enum(r.getAgent().getAction(), AgentAction::kUpgrade, "agent.action"),
                          r.getAgent().getEngine()};
    case wire::ControlMessage::LOAD_MODEL:
      return LoadModel{get(r.getLoadModel().getModel()),
                       std::max<std::int64_t>(r.getLoadModel().getGangBytes(), -1)};
    case wire::ControlMessage::ESTIMATE:
      return get(r.getEstimate());
    case wire::ControlMessage::START_JOB:
      return get(r.getStartJob());
    case wire::ControlMessage::STOP_JOB:
      return get(r.getStopJob());
    case wire::ControlMessage::JOB_ACK:
      return get(r.getJobAck());
    case wire::ControlMessage::INFER:
      return get(r.getInfer());
    case wire::ControlMessage::INFER_CANCEL:
      return InferCancel{get_id<RequestId>(r.getInferCancel().getId(), "infer_cancel.id")};
    case wire::ControlMessage::ANNOUNCE:
      return get(r.getAnnounce());
    case wire::ControlMessage::LAUNCH:
      return get(r.getLaunch());
    case wire::ControlMessage::LAUNCHED:
      return get(r.getLaunched());
  }
  refuse_unknown("control message", static_cast<unsigned>(r.which()));
}

}  // namespace codec

Bytes encode(const ControlMessage& message) {
  return codec::encode_root<wire::ControlMessage>(
      [&](auto b) { std::visit([&](const auto& m) { codec::put(b, m); }, message); });
}

Result<ControlMessage> decode_control(std::span<const std::byte> frame, DecodeCounters* counters) {
  return codec::decode_root<wire::ControlMessage, ControlMessage>(
      "control message", frame, counters, [](auto r) { return codec::get(r); },
      kWorkerFrameBytesMax);
}

}  // namespace tandem::protocol
