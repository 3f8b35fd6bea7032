// The registry's tables: which record lies where, under which key.
//
// Composite keys: parts separated by a zero byte (names never contain one), numbers big-endian so
// that byte order is number order.
#pragma once

#include "protocol/records.h"

#include <string>
#include <string_view>
#include <vector>

namespace tandem::storage {

using protocol::AdapterVersionRecord;
using protocol::AliasChange;
using protocol::AliasRecord;
using protocol::CheckpointRecord;
using protocol::DatasetRecord;
using protocol::IdempotencyRecord;
using protocol::job_has_ended;
using protocol::job_state_name;
using protocol::JobEventRecord;
using protocol::JobRecord;
using protocol::JobState;
using protocol::ManifestKind;
using protocol::ManifestRecord;
using protocol::ModelFile;
using protocol::ModelRecord;
using protocol::ResultRecord;
using protocol::SettingRecord;

std::string big_endian(std::uint64_t value);
std::string digest_key(const Digest& digest);
std::string adapter_key(std::string_view name, std::uint32_t version);
std::string checkpoint_key(std::string_view job, std::int64_t step);
std::string event_key(std::string_view job, std::uint64_t seq);
std::string idempotency_key(std::string_view tenant, std::string_view key);
/// Every key of `name` in a table whose keys begin with a name: "NAME\0".
std::string name_prefix(std::string_view name);

/// RecordTraits<R>: the table, and a record's key.
template <class Record>
struct RecordTraits;

#define TANDEM_RECORD(Record, table_name, key_expression)              \
  template <>                                                          \
  struct RecordTraits<Record> {                                        \
    static constexpr const char* kTable = table_name;                  \
    static std::string key(const Record& r) { return key_expression; } \
  }

TANDEM_RECORD(ModelRecord, "models", r.name);
TANDEM_RECORD(AdapterVersionRecord, "adapters", adapter_key(r.name, r.version));
TANDEM_RECORD(AliasRecord, "aliases", r.name);
TANDEM_RECORD(ManifestRecord, "manifests", digest_key(r.digest));
TANDEM_RECORD(CheckpointRecord, "checkpoints", checkpoint_key(r.job, r.step));
TANDEM_RECORD(JobRecord, "jobs", r.id);
TANDEM_RECORD(JobEventRecord, "job_events", event_key(r.job, r.seq));
TANDEM_RECORD(ResultRecord, "results", digest_key(r.key));
TANDEM_RECORD(DatasetRecord, "datasets", digest_key(r.digest));
TANDEM_RECORD(SettingRecord, "settings", r.name);
TANDEM_RECORD(IdempotencyRecord, "idempotency", idempotency_key(r.tenant, r.key));

#undef TANDEM_RECORD

/// All of them: what the registry's store is opened with.
std::vector<std::string> registry_tables();

}  // namespace tandem::storage
