// Registry records to bytes and back (Cap'n Proto, schema/record.capnp). The only file that knows
// the records' encoding. Stateless; any thread.
//
// decode never trusts its input: traversal is limited by the input's size, nesting by 32, and
// whatever is wrong comes back as corrupt. Unaligned input is copied. Encoding is deterministic:
// equal records give equal bytes.
#pragma once

#include "protocol/base/result.h"
#include "protocol/records.h"

#include <span>
#include <string>

namespace tandem::protocol {

std::string encode_record(const ModelRecord& record);
std::string encode_record(const AdapterVersionRecord& record);
std::string encode_record(const AliasRecord& record);
std::string encode_record(const ManifestRecord& record);
std::string encode_record(const CheckpointRecord& record);
std::string encode_record(const JobRecord& record);
std::string encode_record(const JobEventRecord& record);
std::string encode_record(const ResultRecord& record);
std::string encode_record(const DatasetRecord& record);
std::string encode_record(const SettingRecord& record);
std::string encode_record(const IdempotencyRecord& record);

/// decode_record<JobRecord>(bytes); one for every record above.
template <class Record>
Result<Record> decode_record(std::span<const std::byte> bytes);

template <>
Result<ModelRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<AdapterVersionRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<AliasRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<ManifestRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<CheckpointRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<JobRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<JobEventRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<ResultRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<DatasetRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<SettingRecord> decode_record(std::span<const std::byte> bytes);
template <>
Result<IdempotencyRecord> decode_record(std::span<const std::byte> bytes);

}  // namespace tandem::protocol
