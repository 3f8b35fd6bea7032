// Bodies of RegistryTxn's templates; included by registry.h only.
#pragma once

#include "storage/registry.h"

namespace tandem::storage {

/// Decodes a record and holds it against the key it was found under.
template <class Record>
Result<Record> decode_at(std::string_view key, std::string_view value) {
  auto record = protocol::decode_record<Record>(as_bytes(value));
  if (!record.ok()) return record;
  if (RecordTraits<Record>::key(*record) != key)
    return corrupt_error(
        str("table ", RecordTraits<Record>::kTable, ": a record lies under another's key"));
  return record;
}

template <class Record>
Result<std::optional<Record>> RegistryTxn::find(std::string_view key) {
  if (key.empty() || key.size() > kStoreKeyBytesMax) return std::optional<Record>();
  TANDEM_ASSIGN_OR_RETURN(const auto value, read_->get(RecordTraits<Record>::kTable, key));
  if (!value) return std::optional<Record>();
  TANDEM_ASSIGN_OR_RETURN(Record record, decode_at<Record>(key, *value));
  return std::optional<Record>(std::move(record));
}

template <class Record>
Result<Record> RegistryTxn::get(std::string_view key) {
  TANDEM_ASSIGN_OR_RETURN(auto record, find<Record>(key));
  if (!record) return not_found(RecordTraits<Record>::kNoun, key);
  return std::move(*record);
}

template <class Record>
Result<std::vector<Record>> RegistryTxn::list(std::string_view prefix, std::size_t limit,
                                              std::string_view after) {
  std::vector<Record> records;
  const auto cursor = read_->cursor(RecordTraits<Record>::kTable);
  for (cursor->seek(after > prefix ? after : prefix); cursor->valid() && records.size() < limit;
       cursor->next()) {
    if (!cursor->key().starts_with(prefix)) break;
    if (!after.empty() && cursor->key() == after) continue;
    TANDEM_ASSIGN_OR_RETURN(const std::string_view value, cursor->value());
    TANDEM_ASSIGN_OR_RETURN(Record record, decode_at<Record>(cursor->key(), value));
    records.push_back(std::move(record));
  }
  TANDEM_RETURN_IF_ERROR(cursor->status());
  return records;
}

template <class Record>
Status RegistryTxn::put(const Record& record) {
  TANDEM_CHECK(write_ != nullptr, "put in a read transaction");
  return write_->put(RecordTraits<Record>::kTable, RecordTraits<Record>::key(record),
                     protocol::encode_record(record));
}

template <class Record>
Status RegistryTxn::remove(std::string_view key) {
  TANDEM_CHECK(write_ != nullptr, "remove in a read transaction");
  return write_->del(RecordTraits<Record>::kTable, key);
}

}  // namespace tandem::storage
