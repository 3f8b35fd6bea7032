// What the registry remembers, as plain structs. schema/record.capnp specifies each field; disk and
// wire share that encoding. Digests may be empty where a comment says so; times are Unix
// milliseconds.
#pragma once

#include "protocol/base/digest.h"

#include <cstdint>
#include <string>
#include <vector>

namespace tandem::protocol {

/// One file of a model, as it was when its digest was computed.
struct ModelFile {
  std::string path;  ///< relative to the model's folder; "" where the model is one file
  std::int64_t bytes = 0, mtime_ns = 0;
  std::uint64_t inode = 0;
  Digest root;  ///< content_root of the file
  /// Of a file that lies in the blob store (a model that a job published): its 16 MiB leaves.
  std::vector<Digest> chunks{};
};

/// A base model. Its name shares one name space with adapters and aliases.
struct ModelRecord {
  std::string name;
  Digest digest;        ///< of its manifest, which the manifests table holds
  std::string path;     ///< folder or GGUF file on the coordinator's host; "": the blob store
  bool shared = false;  ///< every worker sees the same path
  std::string family;   ///< "llama", "qwen2", ...
  std::int64_t bytes = 0;
  std::vector<ModelFile> files;
  std::int64_t created_unix_ms = 0;
  std::string summary_json;  ///< for people: layers, heads, context, parameters, ...
  std::string job{};         ///< that published it; empty: it was added
  Digest base_model{};       ///< of a published one: what it was trained from
};

/// One published version of an adapter; never changed, only removed.
struct AdapterVersionRecord {
  std::string name;
  std::uint32_t version = 0;  ///< from 1, rising; not reused while the name exists
  Digest digest;              ///< of its manifest
  Digest base_model;          ///< digest of the model it was trained on
  std::string job;            ///< empty when imported
  std::int64_t created_unix_ms = 0;
  std::string metadata_json;  ///< losses, probe, settings: for people
};

struct AliasChange {
  std::string adapter;
  std::uint32_t version = 0;
  Digest digest;
  std::int64_t unix_ms = 0;
  std::string reason;  ///< "publish", "set", "rollback", ...
};

/// A name that resolves to an adapter version. Publishing moves the alias of the adapter's own name
/// unless it is pinned.
struct AliasRecord {
  std::string name;
  std::string adapter;        ///< whose version it is
  std::uint32_t version = 0;  ///< current
  Digest digest;              ///< current
  bool pinned = false;
  std::uint32_t last_version = 0;    ///< newest version ever published under this name
  std::vector<AliasChange> history;  ///< oldest first, the current state last; bounded
};

enum class ManifestKind : std::uint8_t { kModel = 0, kAdapter = 1, kCheckpoint = 2, kDataset = 3 };

struct ManifestRecord {
  Digest digest;  ///< SHA-256 of text
  ManifestKind kind = ManifestKind::kModel;
  std::string text;   ///< canonical, see storage/manifest.h
  Digest base_model;  ///< of an adapter or checkpoint; empty otherwise
  std::int64_t created_unix_ms = 0;
};

struct CheckpointRecord {
  std::string job;
  std::int64_t step = 0;
  std::uint64_t epoch = 0;
  Digest manifest;
  std::int64_t created_unix_ms = 0;
};

enum class JobState : std::uint8_t {
  kQueued = 0,
  kStarting = 1,  ///< ranks are chosen, the gang is forming
  kRunning = 2,
  kPausing = 3,
  kPaused = 4,
  kCancelling = 5,
  kDone = 6,
  kFailed = 7,
  kCancelled = 8
};
/// "queued" and so on; stable names for JSON.
const char* job_state_name(JobState state);
/// True for kDone, kFailed, kCancelled.
constexpr bool job_has_ended(JobState state) {
  return state == JobState::kDone || state == JobState::kFailed || state == JobState::kCancelled;
}

struct JobRecord {
  std::string id;
  std::string name;
  JobState state = JobState::kQueued;
  std::int32_t priority = 0;  ///< higher first
  std::string kind;           ///< "train"
  std::string spec_json;
  Digest model, dataset;
  std::string adapter;  ///< the name it publishes under
  std::uint64_t epoch = 0;
  std::uint32_t attempts = 0;
  std::int64_t step = 0, total_steps = 0;
  std::string error;
  std::int64_t submitted_unix_ms = 0, started_unix_ms = 0, ended_unix_ms = 0, updated_unix_ms = 0;
  std::string tenant;
  std::string idempotency_key;
  std::string worker;              ///< the leader of its gang; empty while it has none
  std::uint64_t progress_seq = 0;  ///< last JobProgress.seq of this epoch that was kept
  std::uint32_t published_version = 0;
  std::string details_json;  ///< an object: what only the coordinator reads
};

struct JobEventRecord {
  std::string job;
  std::uint64_t seq = 0;  ///< from 1 within the job, never reused
  std::int64_t unix_ms = 0;
  std::string level;  ///< "info", "warn", "error"
  std::string kind;   ///< "state", "step", "eval", "log", ...
  std::string message;
  std::string metrics_json;
};

/// One answer of the result cache.
struct ResultRecord {
  Digest key;     ///< over tenant, target digest and canonical request
  Digest target;  ///< adapter's or model's digest that answered
  std::int64_t created_unix_ms = 0, expires_unix_ms = 0;  ///< expires 0: never
  std::int64_t bytes = 0;                                 ///< of payload
  std::string payload;
  std::string tenant;
};

struct DatasetRecord {
  Digest digest;  ///< of its manifest; one tensor "data", u8 [bytes]
  std::string name;
  std::int64_t rows = 0, bytes = 0;
  std::int64_t created_unix_ms = 0;
  std::string format;  ///< as detected: "messages", "prompt_completion", ...
};

struct SettingRecord {
  std::string name;
  std::string value;
};

/// What a mutating call answered the first time; found again by the client's key.
struct IdempotencyRecord {
  std::string tenant, key;
  Digest request;  ///< of method and parameters: the same key with another request is a conflict
  std::string result;  ///< the answer, or the id of what was made
  std::int64_t created_unix_ms = 0;
};

}  // namespace tandem::protocol
