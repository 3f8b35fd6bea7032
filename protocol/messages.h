// Every message of the wire as a plain struct, and the two variants that travel. The schemas
// (protocol/schema/*.capnp) are the specification: who sends it, when, the receiver's duty, what
// happens on loss or repeat. Structs here have no behaviour; protocol/codec turns them into bytes
// and back and enforces the limits below.
//
// Three ROUTER sockets of the coordinator: clients, workers (agents and engines), bulk. Peers are
// DEALERs.
#pragma once

#include "protocol/base/digest.h"
#include "protocol/base/dtype.h"
#include "protocol/base/ids.h"
#include "protocol/base/status.h"

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace tandem::protocol {

// -- limits, printed at start --------------------------------------------------------------------
inline constexpr std::uint16_t kVersionMajor = 1, kVersionMinor = 9;  ///< range: version.h
inline constexpr std::int64_t kFrameBytesMax = 4 << 20;  ///< one client frame, or a bulk request
inline constexpr std::int64_t kCallJsonBytesMax = kFrameBytesMax - (64 << 10);  ///< of a call
/// One manifest: a checkpoint's names the pieces of all ranks, about 300 bytes each, and the 16 MiB
/// leaves of large ones.
inline constexpr std::int64_t kManifestBytesMax = 16 << 20;
/// One frame between coordinator and workers.
inline constexpr std::int64_t kWorkerFrameBytesMax = kManifestBytesMax + kFrameBytesMax;
inline constexpr std::int64_t kBulkFrameBytesMax = (16 << 20) + 4096;
inline constexpr std::int64_t kTextBytesMax = 1 << 20;  ///< one text field
inline constexpr std::int64_t kListItemsMax = 1 << 18;
inline constexpr std::int64_t kIdBytesMax = 256;     ///< an id, a routing id, a worker name
inline constexpr std::int64_t kNameBytesMax = 1024;  ///< a model, adapter, method or device name
inline constexpr std::int64_t kGangMembersMax = 64;  ///< workers of one gang
/// Of one daemon's command line: its words, and the bytes of each.
inline constexpr std::int64_t kDaemonArgumentsMax = 256, kDaemonArgumentBytesMax = 16 << 10;
inline constexpr std::int64_t kBlobHasMax = 4096;  ///< digests in one BlobHas
inline constexpr int kNestingMax = 32;

// -- shared pieces ------------------------------------------------------------------------------

struct Version {
  std::uint16_t major = kVersionMajor, minor = kVersionMinor;
  bool operator==(const Version&) const = default;
};

/// Sampling as a request asks for it. Ranges are enforced by the engine, which knows the model;
/// absent optionals take the model's generation config, then the defaults named here.
struct SamplingParams {
  std::optional<std::int64_t> max_tokens;   ///< default: up to the context
  std::optional<float> temperature;         ///< 0: greedy; default 1
  std::optional<std::int64_t> top_k;        ///< 0: off
  std::optional<float> top_p, min_p;        ///< 1, 0: off
  std::optional<float> repetition_penalty;  ///< default 1: off
  float presence_penalty = 0.0f, frequency_penalty = 0.0f;
  std::optional<std::int64_t> seed;  ///< absent: from the request id
  std::vector<std::string> stop;     ///< stop strings, cut from the text
  std::vector<std::int32_t> stop_token_ids;
  std::int64_t logprobs = -1;  ///< -1: none; n: of each token and its n likeliest
  std::int64_t min_tokens = 0;
  bool ignore_eos = false;
  std::int64_t prompt_logprobs_from =
      -1;  ///< k >= 1: score prompt tokens k..; max_tokens 0 then generates nothing
  bool operator==(const SamplingParams&) const = default;
};

struct ChatMessage {
  std::string role, content;
  bool operator==(const ChatMessage&) const = default;
};

/// Exactly one of messages (chat template applies), prompt (text; template unless raw) or tokens.
struct PromptInput {
  std::vector<ChatMessage> messages;
  std::string prompt;
  std::vector<std::int32_t> tokens;
  bool raw = false;  ///< prompt as it is: no chat template
  bool operator==(const PromptInput&) const = default;
};

struct TokenLogprob {
  std::int32_t token = 0;
  float logprob = 0;
  std::vector<std::pair<std::int32_t, float>> top;
  bool operator==(const TokenLogprob&) const = default;
};

enum class FinishReason : std::uint8_t {
  kNone = 0,
  kStop = 1,
  kLength = 2,
  kCancelled = 3,
  kError = 4
};

struct Usage {
  std::int64_t prompt_tokens = 0, completion_tokens = 0, cached_prompt_tokens = 0;
  bool operator==(const Usage&) const = default;
};

// -- client -> coordinator
// -------------------------------------------------------------------------

/// First message of every client connection; anything before it is refused.
struct ClientHello {
  Version version;
  std::string client;  ///< "tandem-cli/0.1.0", for logs
  bool operator==(const ClientHello&) const = default;
};
/// Start (or, with the same id, continue) a generation. `next_index` tokens have arrived already.
struct Generate {
  RequestId id;
  std::string model;  ///< base, alias, alias@version, JOB@latest, JOB@step-N, digest prefix
  PromptInput input;
  SamplingParams sampling;
  bool stream = true;  ///< false: one chunk with everything
  bool no_cache = false;
  std::int64_t next_index = 0;
  std::int64_t deadline_ms = 0;  ///< remaining time when sent; 0: none
  bool operator==(const Generate&) const = default;
};
struct Cancel {
  RequestId id;
  bool operator==(const Cancel&) const = default;
};
/// Any other verb: method and parameters as JSON (specified in schema/client.capnp). The
/// idempotency key makes a repeated mutating call answer as the first did.
struct Call {
  std::string call_id, idempotency_key;
  std::string method, params_json;
  bool operator==(const Call&) const = default;
};
/// Stop a streaming call (watch, logs).
struct CallCancel {
  std::string call_id;
  bool operator==(const CallCancel&) const = default;
};
struct Ping {
  std::uint64_t nonce = 0;
  bool operator==(const Ping&) const = default;
};

// -- coordinator -> client
// -------------------------------------------------------------------------

struct ServerHello {
  Status status;  ///< kRefused: version not supported (message names the range)
  Version version;
  std::string server;  ///< "tandem-coordinator/0.1.0"
  Incarnation incarnation = 0;
  std::int64_t heartbeat_ms = 0;
  bool operator==(const ServerHello&) const = default;
};
/// Part of an answer. Chunks of one request carry consecutive `index`es of their first token.
struct GenerateChunk {
  RequestId id;
  std::int64_t index = 0;  ///< index of tokens[0] in the completion
  std::string text;
  std::vector<std::int32_t> tokens;
  std::vector<TokenLogprob> logprobs;
  FinishReason finish = FinishReason::kNone;  ///< not kNone: the last chunk
  Status status;                              ///< not ok: the request failed (finish is kError)
  Usage usage;                                ///< on the last chunk
  Digest model, adapter;  ///< what answered, on the first and the last chunk; adapter empty: base
  bool cached = false;    ///< answered from the result cache
  std::int64_t queue_us = 0,
               first_token_us = 0;     ///< coordinator's share and engine's, on the last chunk
  std::int64_t retry_after_ms = 0;     ///< with kBusy
  std::vector<float> prompt_logprobs;  ///< complete, once, where prompt_logprobs_from asks
  bool operator==(const GenerateChunk&) const = default;
};
struct CallReply {
  std::string call_id;
  Status status;
  std::string result_json;
  bool more = false;                ///< a streaming call goes on
  std::int64_t retry_after_ms = 0;  ///< with kBusy; 1.1 (a 1.0 peer has it in the message only)
  bool operator==(const CallReply&) const = default;
};
struct Pong {
  std::uint64_t nonce = 0;
  bool operator==(const Pong&) const = default;
};

using ClientMessage = std::variant<ClientHello, Generate, Cancel, Call, CallCancel, Ping>;
using ServerMessage = std::variant<ServerHello, GenerateChunk, CallReply, Pong>;

// -- worker <-> coordinator
// ------------------------------------------------------------------------

/// kGang (since 1.2): the first rank of a job that runs over several workers, or (since 1.3) of a
/// replica that serves over several; it speaks for all.
enum class WorkerRole : std::uint8_t { kAgent = 0, kEngine = 1, kGang = 2 };

/// A base model as a worker needs it.
struct ModelRef {
  Digest digest;
  std::string name, path;  ///< path on the coordinator's host, or on every host when shared
  bool shared = false;
  std::vector<std::pair<std::string, Digest>>
      files;  ///< relative path ("" when path is one file), content root
  bool operator==(const ModelRef&) const = default;
};

/// A job an engine is running when it says hello (adoption) or reports load.
struct RunningJob {
  JobId job;
  Epoch epoch = 0;
  std::int64_t step = 0;
  bool operator==(const RunningJob&) const = default;
};

/// First message of an agent or engine, and again after every reconnect. The coordinator adopts or
/// refuses what is said to be running.
struct WorkerHello {
  Version version;
  WorkerRole role = WorkerRole::kAgent;
  WorkerId worker;
  std::string host;
  std::int32_t slot = 0;
  std::string device;  ///< "cpu" or "cuda"
  std::string device_name;
  std::int64_t memory_bytes = 0, pid = 0;
  Incarnation incarnation = 0;
  Digest model;  ///< engine: the base it holds; empty: none
  std::vector<RunningJob> jobs;
  std::vector<RequestId> requests;  ///< still being answered
  std::vector<Digest> adapters;     ///< resident
  std::int64_t credits = 0;         ///< requests it will hold at once
  std::string program;              ///< since 1.5, agent: the version of its host's programs
  /// Since 1.9, engine: what it takes of memory_bytes to serve its base, adapters apart; 0: no
  /// base.
  std::int64_t base_bytes = 0;
  bool operator==(const WorkerHello&) const = default;
};
/// Every heartbeat_ms from agents and engines. An engine sends it from its device loop, so that a
/// hung step is seen.
struct Heartbeat {
  WorkerId worker;
  WorkerRole role = WorkerRole::kAgent;
  Incarnation incarnation = 0;
  std::uint64_t seq = 0;
  std::int64_t running = 0, waiting = 0;  ///< requests
  std::int64_t kv_blocks_free = 0, kv_blocks_total = 0;
  double tokens_per_second = 0;
  std::vector<RunningJob> jobs;
  std::vector<Digest> adapters;
  std::string stats_json;  ///< counters for status and metrics
  bool operator==(const Heartbeat&) const = default;
};
/// Engine -> coordinator: outcome of LoadModel.
struct ModelLoaded {
  Digest model;
  Status status;
  double seconds = 0;
  std::int64_t base_bytes = 0;  ///< since 1.9, of a base that it holds now: as in WorkerHello
  bool operator==(const ModelLoaded&) const = default;
};
struct EstimateReply {
  std::string call_id;
  Status status;
  std::string result_json;  ///< {"peak_bytes":…, "by_kind":{…}, "limit_bytes":…, "fits":…}
  bool operator==(const EstimateReply&) const = default;
};
/// Progress of a job; `seq` counts per (job, epoch) from 1. Repeats are dropped by seq.
struct JobProgress {
  JobId job;
  Epoch epoch = 0;
  std::uint64_t seq = 0;
  std::string kind;  ///< "started", "step", "eval", "log", "data", "probe"
  std::int64_t step = 0, total_steps = 0;
  std::string message, metrics_json;
  bool operator==(const JobProgress&) const = default;
};
/// The checkpoint's blobs are durable (bulk socket); asks for its record to be written.
struct CheckpointReady {
  JobId job;
  Epoch epoch = 0;
  std::int64_t step = 0;
  std::string manifest;  ///< canonical text; its SHA-256 is the identity
  bool operator==(const CheckpointReady&) const = default;
};
/// The adapter's blobs are durable; asks for manifest, version and alias in one transaction.
struct Publish {
  JobId job;
  Epoch epoch = 0;
  std::int64_t step = 0;
  std::string manifest;
  std::string metadata_json;  ///< probe result, losses
  bool operator==(const Publish&) const = default;
};
/// The job's end on this engine, after the last Publish was acknowledged (or instead of it).
struct JobEnded {
  JobId job;
  Epoch epoch = 0;
  Status status;  ///< kCancelled: stopped as asked
  std::int64_t step = 0;
  std::string summary_json;
  bool operator==(const JobEnded&) const = default;
};
/// To an engine: run this job as this epoch.
struct StartJob {
  JobId job;
  Epoch epoch = 0;
  std::string spec_json;  ///< JobSpec
  ModelRef model;
  Digest dataset, eval_dataset;
  std::int64_t dataset_bytes = 0, eval_dataset_bytes = 0;
  std::string checkpoint_manifest;  ///< canonical text; "" = from the start
  /// Since 1.2, to an agent: not 0, the job is a gang's, and its first rank says hello (kGang)
  /// under this incarnation. One member per rank, the leader's worker first.
  Incarnation gang = 0;
  std::vector<WorkerId> members;
  /// Since 1.3, with `gang`: {"tp", "pp"} of a replica that serves the model, no job; "": a job.
  std::string serve_json;
  /// Since 1.8, of a replica: what adapters may take of each rank; less than 0: it was not said.
  std::int64_t adapter_bytes = -1;
  bool operator==(const StartJob&) const = default;
};
/// Since 1.4. A gang over several hosts: its mpirun wants its daemon (Open MPI's orted) started on
/// another host. From the leader's agent to the coordinator, and on to the agent of `worker`, the
/// first member of that host. Repeated until DaemonLaunched comes.
struct LaunchDaemon {
  WorkerId worker;
  StartJob start;                      ///< what the gang was started with
  std::vector<std::string> arguments;  ///< the daemon's, without its name
  bool operator==(const LaunchDaemon&) const = default;
};
/// Since 1.4. Its outcome, from that agent to the coordinator, and on to the leader's agent; again,
/// with the reason, where the daemon fails later.
struct DaemonLaunched {
  JobId job;
  Epoch epoch = 0;
  WorkerId worker;
  Status status;
  bool operator==(const DaemonLaunched&) const = default;
};
/// Part of an answer, engine -> coordinator; the same chunk the client gets.
struct InferChunk {
  std::uint32_t attempt = 0;  ///< as in Infer: chunks of an older attempt are dropped
  GenerateChunk chunk;
  bool operator==(const InferChunk&) const = default;
};
/// Goodbye: the process is about to end on purpose; its work may be moved at once.
struct WorkerBye {
  WorkerId worker;
  WorkerRole role = WorkerRole::kAgent;
  Incarnation incarnation = 0;
  bool operator==(const WorkerBye&) const = default;
};

struct WorkerHelloReply {
  Status status;  ///< not ok: the peer must end (old incarnation, version, slot taken)
  Incarnation coordinator = 0;
  std::int64_t heartbeat_ms = 0, lease_ms = 0;
  std::vector<JobId> stop_jobs;  ///< not adopted: end them without publishing
  std::vector<RequestId> stop_requests;
  /// Since 1.8, to an engine: as HeartbeatReply has it.
  std::int64_t gang_bytes = 0;
  bool operator==(const WorkerHelloReply&) const = default;
};
struct HeartbeatReply {
  std::uint64_t seq = 0;
  /// Since 1.8, to an engine: what a gang's rank beside it may take of the worker's memory, a
  /// replica's with its adapters; 0: there is none.
  std::int64_t gang_bytes = 0;
  bool operator==(const HeartbeatReply&) const = default;
};
enum class AgentAction : std::uint8_t {
  kRestartEngine = 0,
  kDrain = 1,
  kResume = 2,
  kShutdown = 3,
  kUpgrade = 4
};
struct AgentCommand {
  AgentAction action = AgentAction::kDrain;
  /// Since 1.9, of a restart: the engine that is to end; 0: whichever there is.
  Incarnation engine = 0;
  bool operator==(const AgentCommand&) const = default;
};
/// Engine: hold this base (replacing none or the same; another base is refused while work runs).
struct LoadModel {
  ModelRef model;
  std::int64_t gang_bytes = -1;  ///< since 1.9: as HeartbeatReply has it; less than 0: not said
  bool operator==(const LoadModel&) const = default;
};
struct EstimateRequest {
  std::string call_id;
  ModelRef model;
  std::string spec_json;  ///< a JobSpec's "train" object
  /// Since 1.3: {"tp", "pp"} of a replica that is to serve; "": a job.
  std::string serve_json;
  /// Since 1.7: the job evaluates; from an older coordinator true, for then it may.
  bool evaluates = true;
  bool operator==(const EstimateRequest&) const = default;
};
enum class StopMode : std::uint8_t { kCancel = 0, kPause = 1 };  ///< pause: checkpoint first
struct StopJob {
  JobId job;
  Epoch epoch = 0;
  StopMode mode = StopMode::kCancel;
  bool operator==(const StopJob&) const = default;
};
/// Receipt of JobProgress/CheckpointReady/Publish/JobEnded, after commit where something was
/// written. The engine repeats the message until it has this.
struct JobAck {
  JobId job;
  Epoch epoch = 0;
  std::string of;    ///< "progress:SEQ", "checkpoint:STEP", "publish", "ended"
  Status status;     ///< kConflict: old epoch, stop at once
  Digest digest;     ///< of what was published
  std::string name;  ///< "alias@version" published
  bool operator==(const JobAck&) const = default;
};
/// What a request resolved to at admission; the digest stays for the request's whole life.
struct Infer {
  Generate request;
  std::uint32_t attempt = 0;
  ModelRef model;
  Digest adapter;                ///< empty: the base itself
  std::string adapter_manifest;  ///< canonical text, for engines that do not have it yet
  JobId job;                     ///< not empty: JOB@latest of this job, served from its trainer
  bool operator==(const Infer&) const = default;
};
struct InferCancel {
  RequestId id;
  bool operator==(const InferCancel&) const = default;
};
/// A version was published: engines may load it ahead of the first request.
struct Announce {
  std::string name;
  Digest model, adapter;
  std::string adapter_manifest;
  bool operator==(const Announce&) const = default;
};

using WorkerMessage =
    std::variant<WorkerHello, Heartbeat, ModelLoaded, EstimateReply, JobProgress, CheckpointReady,
                 Publish, JobEnded, InferChunk, WorkerBye, LaunchDaemon, DaemonLaunched>;
using ControlMessage = std::variant<WorkerHelloReply, HeartbeatReply, AgentCommand, LoadModel,
                                    EstimateRequest, StartJob, StopJob, JobAck, Infer, InferCancel,
                                    Announce, LaunchDaemon, DaemonLaunched>;

// -- bulk: content-addressed chunks of at most 16 MiB; the bytes travel in a frame of their own
// ------

/// "Which of these do you have?" Answered in order.
struct BlobHas {
  std::uint64_t call = 0;
  std::vector<Digest> digests;
  bool operator==(const BlobHas&) const = default;
};
/// One of several chunks in a payload.
struct BlobPart {
  Digest digest;
  std::int64_t bytes = 0;
  bool operator==(const BlobPart&) const = default;
};
struct BlobPut {
  std::uint64_t call = 0;
  Digest digest;                ///< SHA-256 of the payload frame
  std::string pin;              ///< upload id: garbage collection spares it for an hour
  std::vector<BlobPart> parts;  ///< not empty: several small chunks, one commit; digest is empty
  bool operator==(const BlobPut&) const = default;
};
/// A blob, or `bytes` from `offset` of a model file (by content root) that the coordinator's host
/// has.
struct BlobGet {
  std::uint64_t call = 0;
  Digest digest;
  std::int64_t offset = 0, bytes = 0;  ///< 0 bytes: the whole chunk
  bool operator==(const BlobGet&) const = default;
};
struct BlobReply {
  std::uint64_t call = 0;
  Status status;
  std::vector<bool> has;         ///< BlobHas
  std::int64_t total_bytes = 0;  ///< BlobGet of a file: its size
  bool operator==(const BlobReply&) const = default;
};
using BulkRequest = std::variant<BlobHas, BlobPut, BlobGet>;

}  // namespace tandem::protocol
