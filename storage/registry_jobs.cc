// Jobs, their events and checkpoints, data sets, settings and remembered answers.
#include "storage/registry.h"

#include <algorithm>

namespace tandem::storage {

// -- data sets ----------------------------------------------------------------

Status RegistryTxn::add_dataset(const DatasetRecord& record, const std::string& manifest) {
  TANDEM_RETURN_IF_ERROR(validate_name(record.name, "data set"));
  TANDEM_RETURN_IF_ERROR(check_manifest(manifest, ManifestKind::kDataset).status());
  if (manifest_digest(manifest) != record.digest)
    return invalid_error(str("data set ", record.name, ": its digest is not that of its manifest"));
  TANDEM_RETURN_IF_ERROR(put_manifest(manifest, ManifestKind::kDataset, Digest{}));
  return put(record);
}

Result<DatasetRecord> RegistryTxn::resolve_dataset(std::string_view reference) {
  TANDEM_ASSIGN_OR_RETURN(auto sets, list<DatasetRecord>());
  std::optional<DatasetRecord> found;
  for (DatasetRecord& set : sets) {
    const bool by_digest =
        reference.size() >= kDigestPrefixDigitsMin && set.digest.hex().starts_with(reference);
    if (set.name != reference && !by_digest) continue;
    // The newest of those that share a name.
    if (!found || set.created_unix_ms >= found->created_unix_ms) found = std::move(set);
  }
  if (!found) return not_found_error(str("no data set ", reference));
  return std::move(*found);
}

// -- jobs ---------------------------------------------------------------------

Result<std::pair<JobRecord, bool>> RegistryTxn::submit_job(const JobRecord& job,
                                                           const Digest& request) {
  if (!job.idempotency_key.empty()) {
    TANDEM_ASSIGN_OR_RETURN(const auto before, recall(job.tenant, job.idempotency_key, request));
    if (before) {
      TANDEM_ASSIGN_OR_RETURN(JobRecord first, get<JobRecord>(*before));
      return std::pair(std::move(first), false);
    }
    TANDEM_RETURN_IF_ERROR(remember(job.tenant, job.idempotency_key, request, job.id));
  }
  TANDEM_ASSIGN_OR_RETURN(const auto existing, find<JobRecord>(job.id));
  if (existing) return conflict_error("the job " + job.id + " exists already");
  TANDEM_RETURN_IF_ERROR(put(job));
  return std::pair(job, true);
}

Result<std::uint64_t> RegistryTxn::append_event(JobEventRecord event) {
  const char* table = RecordTraits<JobEventRecord>::kTable;
  const std::string prefix = name_prefix(event.job);
  auto seq_of = [&](std::string_view key) {
    std::uint64_t seq = 0;
    for (char c : key.substr(prefix.size())) seq = seq << 8 | static_cast<unsigned char>(c);
    return seq;
  };
  TANDEM_ASSIGN_OR_RETURN(const auto last, last_key(*read_, table, prefix));
  event.seq = last ? seq_of(*last) + 1 : 1;
  TANDEM_RETURN_IF_ERROR(put(event));
  // Numbers have no gaps, so what is too old is known without counting.
  if (event.seq > kJobEventsMax)
    TANDEM_RETURN_IF_ERROR(remove<JobEventRecord>(event_key(event.job, event.seq - kJobEventsMax)));
  return event.seq;
}

Status RegistryTxn::put_checkpoint(const CheckpointRecord& record, const std::string& manifest,
                                   int keep) {
  TANDEM_RETURN_IF_ERROR(check_epoch(record.job, record.epoch));
  TANDEM_RETURN_IF_ERROR(check_manifest(manifest, ManifestKind::kCheckpoint).status());
  if (manifest_digest(manifest) != record.manifest)
    return invalid_error(str("checkpoint ", record.step, " of ", record.job,
                             ": its digest is not that of its manifest"));
  TANDEM_ASSIGN_OR_RETURN(const JobRecord job, get<JobRecord>(record.job));
  TANDEM_RETURN_IF_ERROR(put_manifest(manifest, ManifestKind::kCheckpoint, job.model));
  TANDEM_RETURN_IF_ERROR(put(record));
  TANDEM_ASSIGN_OR_RETURN(const auto all, list<CheckpointRecord>(name_prefix(record.job)));
  for (std::size_t i = 0; i + static_cast<std::size_t>(std::max(keep, 1)) < all.size(); ++i)
    TANDEM_RETURN_IF_ERROR(remove<CheckpointRecord>(checkpoint_key(record.job, all[i].step)));
  return {};
}

Result<std::optional<CheckpointRecord>> RegistryTxn::latest_checkpoint(std::string_view job) {
  TANDEM_ASSIGN_OR_RETURN(auto all, list<CheckpointRecord>(name_prefix(job)));
  if (all.empty()) return std::optional<CheckpointRecord>();
  return std::optional(std::move(all.back()));
}

Status RegistryTxn::remove_job(std::string_view id) {
  TANDEM_ASSIGN_OR_RETURN(const JobRecord job, get<JobRecord>(id));
  if (!job_has_ended(job.state))
    return conflict_error(
        str("the job ", id, " is ", job_state_name(job.state), "; cancel it first"));
  TANDEM_ASSIGN_OR_RETURN(const auto events, list<JobEventRecord>(name_prefix(id)));
  for (const auto& event : events)
    TANDEM_RETURN_IF_ERROR(remove<JobEventRecord>(event_key(id, event.seq)));
  TANDEM_ASSIGN_OR_RETURN(const auto checkpoints, list<CheckpointRecord>(name_prefix(id)));
  for (const auto& checkpoint : checkpoints)
    TANDEM_RETURN_IF_ERROR(remove<CheckpointRecord>(checkpoint_key(id, checkpoint.step)));
  return remove<JobRecord>(id);
}

// -- settings and remembered answers ------------------------------------------

Result<std::optional<std::string>> RegistryTxn::setting(std::string_view name) {
  TANDEM_ASSIGN_OR_RETURN(auto record, find<SettingRecord>(name));
  if (!record) return std::optional<std::string>();
  return std::optional(std::move(record->value));
}

Status RegistryTxn::set_setting(const std::string& name, const std::string& value) {
  return put(SettingRecord{name, value});
}

Result<std::optional<std::string>> RegistryTxn::recall(const std::string& tenant,
                                                       const std::string& key,
                                                       const Digest& request) {
  TANDEM_ASSIGN_OR_RETURN(auto record, find<IdempotencyRecord>(idempotency_key(tenant, key)));
  if (!record) return std::optional<std::string>();
  if (record->request != request)
    return conflict_error(str("the idempotency key ", printable_key(key),
                              " was used for another request; use a new key"));
  return std::optional(std::move(record->result));
}

Status RegistryTxn::remember(const std::string& tenant, const std::string& key,
                             const Digest& request, const std::string& result) {
  return put(IdempotencyRecord{tenant, key, request, result, clock_->unix_ms()});
}

}  // namespace tandem::storage
