#include "protocol/codec/record_codec.h"

#include <capnp/message.h>
#include <capnp/serialize.h>
#include <record.capnp.h>

#include <cstring>

namespace tandem::protocol {
namespace {

constexpr int kNesting = 32;
constexpr std::size_t kRecordBytesMax = (64 << 20) + 4096;

// -- pieces -------------------------------------------------------------------

capnp::Data::Reader data(const Digest& digest) {
  return digest.empty() ? capnp::Data::Reader()
                        : capnp::Data::Reader(digest.bytes.data(), digest.bytes.size());
}
capnp::Data::Reader data(const std::string& text) {
  return {reinterpret_cast<const kj::byte*>(text.data()), text.size()};
}
capnp::Text::Reader text(const std::string& value) {
  return {value.c_str(), value.size()};
}

// Thrown inside this file only; decode_record turns it into a Status.
struct BadField {
  std::string what;
};

Digest digest(capnp::Data::Reader bytes) {
  Digest result;
  if (bytes.size() == 0) return result;
  if (bytes.size() != result.bytes.size())
    throw BadField{str("a digest of ", bytes.size(), " bytes")};
  std::memcpy(result.bytes.data(), bytes.begin(), result.bytes.size());
  return result;
}
std::string string(capnp::Text::Reader value) {
  return {value.begin(), value.size()};
}
std::string string(capnp::Data::Reader value) {
  return {reinterpret_cast<const char*>(value.begin()), value.size()};
}
template <class Enum>
Enum checked_enum(std::uint8_t value, Enum last) {
  if (value > static_cast<std::uint8_t>(last))
    throw BadField{str("an unknown enumerant ", int{value})};
  return static_cast<Enum>(value);
}

// -- one pair of functions per record; the schema says what each field means --

void write(schema::Model::Builder to, const ModelRecord& r) {
  to.setName(text(r.name));
  to.setDigest(data(r.digest));
  to.setPath(text(r.path));
  to.setShared(r.shared);
  to.setFamily(text(r.family));
  to.setBytes(r.bytes);
  auto files = to.initFiles(static_cast<unsigned>(r.files.size()));
  for (unsigned i = 0; i < files.size(); ++i) {
    files[i].setPath(text(r.files[i].path));
    files[i].setBytes(r.files[i].bytes);
    files[i].setMtimeNs(r.files[i].mtime_ns);
    files[i].setInode(r.files[i].inode);
    files[i].setRoot(data(r.files[i].root));
    auto chunks = files[i].initChunks(static_cast<unsigned>(r.files[i].chunks.size()));
    for (unsigned c = 0; c < chunks.size(); ++c) chunks.set(c, data(r.files[i].chunks[c]));
  }
  to.setCreatedUnixMs(r.created_unix_ms);
  to.setSummaryJson(text(r.summary_json));
  to.setJob(text(r.job));
  to.setBaseModel(data(r.base_model));
}
void read(schema::Model::Reader from, ModelRecord& r) {
  r.name = string(from.getName());
  r.digest = digest(from.getDigest());
  r.path = string(from.getPath());
  r.shared = from.getShared();
  r.family = string(from.getFamily());
  r.bytes = from.getBytes();
  for (auto file : from.getFiles()) {
    ModelFile next{string(file.getPath()), file.getBytes(),        file.getMtimeNs(),
                   file.getInode(),        digest(file.getRoot()), {}};
    for (auto chunk : file.getChunks()) next.chunks.push_back(digest(chunk));
    r.files.push_back(std::move(next));
  }
  r.created_unix_ms = from.getCreatedUnixMs();
  r.summary_json = string(from.getSummaryJson());
  r.job = string(from.getJob());
  r.base_model = digest(from.getBaseModel());
}

void write(schema::AdapterVersion::Builder to, const AdapterVersionRecord& r) {
  to.setName(text(r.name));
  to.setVersion(r.version);
  to.setDigest(data(r.digest));
  to.setBaseModel(data(r.base_model));
  to.setJob(text(r.job));
  to.setCreatedUnixMs(r.created_unix_ms);
  to.setMetadataJson(text(r.metadata_json));
}
void read(schema::AdapterVersion::Reader from, AdapterVersionRecord& r) {
  r.name = string(from.getName());
  r.version = from.getVersion();
  r.digest = digest(from.getDigest());
  r.base_model = digest(from.getBaseModel());
  r.job = string(from.getJob());
  r.created_unix_ms = from.getCreatedUnixMs();
  r.metadata_json = string(from.getMetadataJson());
}

void write(schema::Alias::Builder to, const AliasRecord& r) {
  to.setName(text(r.name));
  to.setAdapter(text(r.adapter));
  to.setVersion(r.version);
  to.setDigest(data(r.digest));
  to.setPinned(r.pinned);
  to.setLastVersion(r.last_version);
  auto history = to.initHistory(static_cast<unsigned>(r.history.size()));
  for (unsigned i = 0; i < history.size(); ++i) {
    history[i].setAdapter(text(r.history[i].adapter));
    history[i].setVersion(r.history[i].version);
    history[i].setDigest(data(r.history[i].digest));
    history[i].setUnixMs(r.history[i].unix_ms);
    history[i].setReason(text(r.history[i].reason));
  }
}
void read(schema::Alias::Reader from, AliasRecord& r) {
  r.name = string(from.getName());
  r.adapter = string(from.getAdapter());
  r.version = from.getVersion();
  r.digest = digest(from.getDigest());
  r.pinned = from.getPinned();
  r.last_version = from.getLastVersion();
  for (auto change : from.getHistory())
    r.history.push_back({string(change.getAdapter()), change.getVersion(),
                         digest(change.getDigest()), change.getUnixMs(),
                         string(change.getReason())});
}

void write(schema::Manifest::Builder to, const ManifestRecord& r) {
  to.setDigest(data(r.digest));
  to.setKind(static_cast<std::uint8_t>(r.kind));
  to.setText(data(r.text));
  to.setBaseModel(data(r.base_model));
  to.setCreatedUnixMs(r.created_unix_ms);
}
void read(schema::Manifest::Reader from, ManifestRecord& r) {
  r.digest = digest(from.getDigest());
  r.kind = checked_enum(from.getKind(), ManifestKind::kDataset);
  r.text = string(from.getText());
  r.base_model = digest(from.getBaseModel());
  r.created_unix_ms = from.getCreatedUnixMs();
}

void write(schema::Checkpoint::Builder to, const CheckpointRecord& r) {
  to.setJob(text(r.job));
  to.setStep(r.step);
  to.setEpoch(r.epoch);
  to.setManifest(data(r.manifest));
  to.setCreatedUnixMs(r.created_unix_ms);
}
void read(schema::Checkpoint::Reader from, CheckpointRecord& r) {
  r.job = string(from.getJob());
  r.step = from.getStep();
  r.epoch = from.getEpoch();
  r.manifest = digest(from.getManifest());
  r.created_unix_ms = from.getCreatedUnixMs();
}

void write(schema::Job::Builder to, const JobRecord& r) {
  to.setId(text(r.id));
  to.setName(text(r.name));
  to.setState(static_cast<std::uint8_t>(r.state));
  to.setPriority(r.priority);
  to.setKind(text(r.kind));
  to.setSpecJson(text(r.spec_json));
  to.setModel(data(r.model));
  to.setDataset(data(r.dataset));
  to.setAdapter(text(r.adapter));
  to.setEpoch(r.epoch);
  to.setAttempts(r.attempts);
  to.setStep(r.step);
  to.setTotalSteps(r.total_steps);
  to.setError(text(r.error));
  to.setSubmittedUnixMs(r.submitted_unix_ms);
  to.setStartedUnixMs(r.started_unix_ms);
  to.setEndedUnixMs(r.ended_unix_ms);
  to.setUpdatedUnixMs(r.updated_unix_ms);
  to.setTenant(text(r.tenant));
  to.setIdempotencyKey(text(r.idempotency_key));
  to.setWorker(text(r.worker));
  to.setProgressSeq(r.progress_seq);
  to.setPublishedVersion(r.published_version);
  to.setDetailsJson(text(r.details_json));
}
void read(schema::Job::Reader from, JobRecord& r) {
  r.id = string(from.getId());
  r.name = string(from.getName());
  r.state = checked_enum(from.getState(), JobState::kCancelled);
  r.priority = from.getPriority();
  r.kind = string(from.getKind());
  r.spec_json = string(from.getSpecJson());
  r.model = digest(from.getModel());
  r.dataset = digest(from.getDataset());
  r.adapter = string(from.getAdapter());
  r.epoch = from.getEpoch();
  r.attempts = from.getAttempts();
  r.step = from.getStep();
  r.total_steps = from.getTotalSteps();
  r.error = string(from.getError());
  r.submitted_unix_ms = from.getSubmittedUnixMs();
  r.started_unix_ms = from.getStartedUnixMs();
  r.ended_unix_ms = from.getEndedUnixMs();
  r.updated_unix_ms = from.getUpdatedUnixMs();
  r.tenant = string(from.getTenant());
  r.idempotency_key = string(from.getIdempotencyKey());
  r.worker = string(from.getWorker());
  r.progress_seq = from.getProgressSeq();
  r.published_version = from.getPublishedVersion();
  r.details_json = string(from.getDetailsJson());
}

void write(schema::JobEvent::Builder to, const JobEventRecord& r) {
  to.setJob(text(r.job));
  to.setSeq(r.seq);
  to.setUnixMs(r.unix_ms);
  to.setLevel(text(r.level));
  to.setKind(text(r.kind));
  to.setMessage(text(r.message));
  to.setMetricsJson(text(r.metrics_json));
}
void read(schema::JobEvent::Reader from, JobEventRecord& r) {
  r.job = string(from.getJob());
  r.seq = from.getSeq();
  r.unix_ms = from.getUnixMs();
  r.level = string(from.getLevel());
  r.kind = string(from.getKind());
  r.message = string(from.getMessage());
  r.metrics_json = string(from.getMetricsJson());
}

void write(schema::Result::Builder to, const ResultRecord& r) {
  to.setKey(data(r.key));
  to.setTarget(data(r.target));
  to.setCreatedUnixMs(r.created_unix_ms);
  to.setExpiresUnixMs(r.expires_unix_ms);
  to.setBytes(r.bytes);
  to.setPayload(data(r.payload));
  to.setTenant(text(r.tenant));
}
void read(schema::Result::Reader from, ResultRecord& r) {
  r.key = digest(from.getKey());
  r.target = digest(from.getTarget());
  r.created_unix_ms = from.getCreatedUnixMs();
  r.expires_unix_ms = from.getExpiresUnixMs();
  r.bytes = from.getBytes();
  r.payload = string(from.getPayload());
  r.tenant = string(from.getTenant());
}

void write(schema::Dataset::Builder to, const DatasetRecord& r) {
  to.setDigest(data(r.digest));
  to.setName(text(r.name));
  to.setRows(r.rows);
  to.setBytes(r.bytes);
  to.setCreatedUnixMs(r.created_unix_ms);
  to.setFormat(text(r.format));
}
void read(schema::Dataset::Reader from, DatasetRecord& r) {
  r.digest = digest(from.getDigest());
  r.name = string(from.getName());
  r.rows = from.getRows();
  r.bytes = from.getBytes();
  r.created_unix_ms = from.getCreatedUnixMs();
  r.format = string(from.getFormat());
}

void write(schema::Setting::Builder to, const SettingRecord& r) {
  to.setName(text(r.name));
  to.setValue(text(r.value));
}
void read(schema::Setting::Reader from, SettingRecord& r) {
  r.name = string(from.getName());
  r.value = string(from.getValue());
}

void write(schema::Idempotency::Builder to, const IdempotencyRecord& r) {
  to.setTenant(text(r.tenant));
  to.setKey(text(r.key));
  to.setRequest(data(r.request));
  to.setResult(data(r.result));
  to.setCreatedUnixMs(r.created_unix_ms);
}
void read(schema::Idempotency::Reader from, IdempotencyRecord& r) {
  r.tenant = string(from.getTenant());
  r.key = string(from.getKey());
  r.request = digest(from.getRequest());
  r.result = string(from.getResult());
  r.created_unix_ms = from.getCreatedUnixMs();
}

// -- the frame ----------------------------------------------------------------

template <class Schema, class Record>
std::string encode(const Record& record) {
  capnp::MallocMessageBuilder message;
  write(message.initRoot<Schema>(), record);
  const auto words = capnp::messageToFlatArray(message);
  const auto bytes = words.asBytes();
  return {reinterpret_cast<const char*>(bytes.begin()), bytes.size()};
}

template <class Schema, class Record>
Result<Record> decode(std::span<const std::byte> bytes) {
  if (bytes.size() % sizeof(capnp::word) != 0 || bytes.empty() || bytes.size() > kRecordBytesMax)
    return corrupt_error(str("a record of ", bytes.size(), " bytes"));
  try {
    // The envelope before the record leaves it unaligned more often than not.
    auto words = kj::heapArray<capnp::word>(bytes.size() / sizeof(capnp::word));
    std::memcpy(words.begin(), bytes.data(), bytes.size());
    capnp::ReaderOptions options;
    options.traversalLimitInWords = 2 * words.size() + 64;
    options.nestingLimit = kNesting;
    capnp::FlatArrayMessageReader reader(words, options);
    if (reader.getEnd() != words.end()) return corrupt_error("bytes after a record's end");
    Record record;
    read(reader.getRoot<Schema>(), record);
    return record;
  } catch (const BadField& bad) {
    return corrupt_error("a record holds " + bad.what);
  } catch (const kj::Exception& exception) {
    return corrupt_error(str("a record cannot be decoded: ", exception.getDescription().cStr()));
  } catch (const std::exception& exception) {
    return corrupt_error(str("a record cannot be decoded: ", exception.what()));
  }
}

}  // namespace

#define TANDEM_RECORD_CODEC(Record, Schema)                                \
  std::string encode_record(const Record& record) {                        \
    return encode<schema::Schema>(record);                                 \
  }                                                                        \
  template <>                                                              \
  Result<Record> decode_record<Record>(std::span<const std::byte> bytes) { \
    return decode<schema::Schema, Record>(bytes);                          \
  }

TANDEM_RECORD_CODEC(ModelRecord, Model)
TANDEM_RECORD_CODEC(AdapterVersionRecord, AdapterVersion)
TANDEM_RECORD_CODEC(AliasRecord, Alias)
TANDEM_RECORD_CODEC(ManifestRecord, Manifest)
TANDEM_RECORD_CODEC(CheckpointRecord, Checkpoint)
TANDEM_RECORD_CODEC(JobRecord, Job)
TANDEM_RECORD_CODEC(JobEventRecord, JobEvent)
TANDEM_RECORD_CODEC(ResultRecord, Result)
TANDEM_RECORD_CODEC(DatasetRecord, Dataset)
TANDEM_RECORD_CODEC(SettingRecord, Setting)
TANDEM_RECORD_CODEC(IdempotencyRecord, Idempotency)

#undef TANDEM_RECORD_CODEC

const char* job_state_name(JobState state) {
  switch (state) {
    case JobState::kQueued:
      return "queued";
    case JobState::kStarting:
      return "starting";
    case JobState::kRunning:
      return "running";
    case JobState::kPausing:
      return "pausing";
    case JobState::kPaused:
      return "paused";
    case JobState::kCancelling:
      return "cancelling";
    case JobState::kDone:
      return "done";
    case JobState::kFailed:
      return "failed";
    case JobState::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

}  // namespace tandem::protocol
