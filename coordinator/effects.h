// What goes into the coordinator's core and what comes out: plain values. The loop
// (coordinator_loop.h) turns bytes, clocks and finished work into inputs and carries the effects
// out, in order: the commit of a step first, then its sends.
#pragma once

#include "coordinator/records.h"
#include "protocol/base/clock.h"
#include "protocol/base/log.h"
#include "protocol/base/status.h"
#include "protocol/messages.h"

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace tandem::coordinator {

/// Time as one step sees it.
struct Now {
  TimeMs ms = 0;             ///< monotonic; leases and deadlines
  std::int64_t unix_ms = 0;  ///< wall clock; records only
  std::int64_t us = 0;       ///< monotonic microseconds, for reported durations
};

// -- background work: bytes and disk, done by the loop's worker thread ---------------------------

/// Reads a model's files under `path`: format, sizes, digests. Answered by ModelHashed.
struct HashModel {
  std::string name, path;
  bool shared = false;
};
/// Parses a canonical manifest of `kind` and checks that every chunk is durable; of an adapter also
/// that it fits `base`, the manifest of its base model, where that is given. Answered by
/// ManifestVerified.
struct VerifyManifest {
  std::string text;  ///< "": what the blob of digest `blob` holds
  ManifestKind kind = ManifestKind::kAdapter;
  std::string base = {};
  Digest blob = {};
};
/// Identity and record of a model whose files were uploaded (stored_model.h). Answered by
/// ModelHashed.
struct DescribeStoredModel {
  std::string files_manifest;
};
/// Makes a data set's manifest of chunks that were uploaded, and checks that they are durable and
/// have this root and size. Answered by ManifestVerified.
struct DescribeDataset {
  Digest root;
  std::vector<Digest> chunks;
  std::int64_t bytes = 0;
};
/// The last `count` events of a job, from the registry. Answered by EventsRead.
struct ReadEvents {
  JobId job;
  std::size_t count = 0;
};
enum class Maintenance : std::uint8_t { kCheck, kGc, kBackup };
/// registry check, gc or backup (into `argument`). Answered by JsonDone.
struct Maintain {
  Maintenance what = Maintenance::kCheck;
  std::string argument;
  bool deep = true;
};
/// Client and worker keys, which are files beside the registry. Answered by JsonDone.
struct ManageKeys {
  std::string verb;  ///< "create", "list", "revoke"
  std::string name, role;
};
using WorkRequest = std::variant<HashModel, VerifyManifest, DescribeStoredModel, DescribeDataset,
                                 ReadEvents, Maintain, ManageKeys>;

struct ModelHashed {
  ModelRecord model;  ///< name and times are the core's business
  std::string manifest;
};
struct ManifestVerified {
  std::string text;
  Digest digest, base_model;  ///< base_model: of adapters and checkpoints
  std::int64_t bytes = 0;
};
struct EventsRead {
  std::vector<JobEventRecord> events;
};
struct JsonDone {
  std::string json;
};
using WorkResult =
    std::variant<std::monostate, ModelHashed, ManifestVerified, EventsRead, JsonDone>;

// -- inputs --------------------------------------------------------------------------------------

/// `user` is the name of the peer's key; "" over ipc.
struct ClientInput {
  std::string peer, user;
  protocol::ClientMessage message;
  std::int64_t received_us = 0;  ///< on the clock of Now::us; 0: now
  bool admin = true;             ///< may change keys and end the coordinator
};
struct WorkerInput {
  std::string peer, user;
  protocol::WorkerMessage message;
};
/// A send said that this client is not connected or does not read; its work is orphaned.
struct ClientGone {
  std::string peer;
};
/// The effect StartWork `id` is done; the result is meaningless unless the status is ok.
struct WorkDone {
  std::uint64_t id = 0;
  Status status;
  WorkResult result;
};
/// The last step's Persist failed: nothing of it is on disk. The loop has sent nothing of that
/// step that claims otherwise.
struct CommitFailed {
  Status status;
};
struct Tick {
  std::uint64_t refused_frames = 0;  ///< that came in on the sockets so far
};
using Input = std::variant<Tick, ClientInput, WorkerInput, ClientGone, WorkDone, CommitFailed>;

// -- effects -------------------------------------------------------------------------------------

/// At most one per step and always the first: one transaction.
struct Persist {
  std::vector<Write> writes;
};
struct SendClient {
  std::string peer;
  protocol::ServerMessage message;
};
struct SendWorker {
  std::string peer;
  protocol::ControlMessage message;
};
struct StartWork {
  std::uint64_t id = 0;
  WorkRequest request;
};
struct LogLine {
  LogLevel level = LogLevel::kInfo;
  std::string text;
};
/// The process is to end, as after SIGTERM.
struct Shutdown {};
using Effect = std::variant<Persist, SendClient, SendWorker, StartWork, LogLine, Shutdown>;

}  // namespace tandem::coordinator
