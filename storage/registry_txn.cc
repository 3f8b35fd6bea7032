// Models, manifests, adapters and aliases: what a name can stand for.
#include "storage/registry.h"

#include "storage/json_strict.h"

#include <algorithm>

namespace tandem::storage {
namespace {

constexpr std::size_t kNearestCandidatesMax = 10'000;

bool is_hex(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

/// "name@3" in its parts; version 0 when there is no "@".
Result<std::pair<std::string, std::uint32_t>> split_version(std::string_view reference) {
  const auto at = reference.find('@');
  if (at == std::string_view::npos) return std::pair(std::string(reference), std::uint32_t{0});
  const std::string_view digits = reference.substr(at + 1);
  std::uint64_t version = 0;
  const bool numeric =
      !digits.empty() && digits.size() <= 9 &&
      std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (numeric) version = std::stoull(std::string(digits));
  if (version == 0)
    return invalid_error(
        str("\"", reference, "\": after @ a version from 1 is expected, as in name@2"));
  return std::pair(std::string(reference.substr(0, at)), static_cast<std::uint32_t>(version));
}

}  // namespace

Status validate_name(std::string_view name, const std::string& what) {
  auto refuse = [&](const std::string& why) {
    return invalid_error(str(what, " \"", printable_key(name), "\": ", why));
  };
  if (name.empty() || name.size() > kNameBytesMax)
    return refuse(str("a name has 1 to ", kNameBytesMax, " bytes, this one ", name.size()));
  auto is_alnum = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
  };
  for (char c : name) {
    if (c == '@') return refuse("@ is reserved for versions (name@2)");
    if (!is_alnum(c) && std::string_view("._-/:").find(c) == std::string_view::npos)
      return refuse("only letters, digits and . _ - / : are allowed");
  }
  if (!is_alnum(name.front())) return refuse("a name begins with a letter or digit");
  if (name.find("//") != std::string_view::npos || name.find("..") != std::string_view::npos ||
      name.back() == '/')
    return refuse("\"//\", \"..\" and a / at the end are not allowed");
  if (name.size() >= kDigestPrefixDigitsMin && name.size() <= 64 && is_hex(name))
    return refuse(str(kDigestPrefixDigitsMin, " or more hex digits would be taken for a digest"));
  return {};
}

RegistryTxn::RegistryTxn(std::unique_ptr<ReadTxn> read, WriteTxn* write, BlobStore* blobs,
                         const Clock* clock)
    : read_(std::move(read)), write_(write), blobs_(blobs), clock_(clock) {}

Status RegistryTxn::commit() {
  TANDEM_CHECK(write_ != nullptr, "commit of a read transaction");
  return write_->commit();
}

Status RegistryTxn::not_found(const char* noun, std::string_view key) {
  std::string message = str("no ", noun, " ", printable_key(key));
  if (const std::string close = nearest(key); !close.empty())
    message += "; did you mean " + close + "?";
  return not_found_error(message);
}

std::string RegistryTxn::nearest(std::string_view name) {
  if (name.size() > kNameBytesMax) return "";
  std::vector<std::string> names;
  for (const char* table : {RecordTraits<ModelRecord>::kTable, RecordTraits<AliasRecord>::kTable}) {
    const auto cursor = read_->cursor(table);
    for (cursor->seek(""); cursor->valid() && names.size() < kNearestCandidatesMax; cursor->next())
      names.emplace_back(cursor->key());
  }
  return nearest_name(name, names);
}

// -- manifests ----------------------------------------------------------------

Result<ManifestRecord> RegistryTxn::manifest(const Digest& digest) {
  TANDEM_ASSIGN_OR_RETURN(auto record, find<ManifestRecord>(digest_key(digest)));
  if (!record) return not_found_error("no manifest " + digest.hex());
  if (manifest_digest(record->text) != digest)
    return corrupt_error(str("manifest ", digest, " does not match its digest; restore a backup"));
  return std::move(*record);
}

Result<Manifest> RegistryTxn::check_manifest(const std::string& text, ManifestKind kind) {
  auto manifest = parse_manifest(text);
  if (!manifest.ok()) return invalid_error(manifest.status().message());
  if (manifest->kind != kind)
    return invalid_error(str("a manifest of kind ", manifest_kind_name(manifest->kind), " where ",
                             manifest_kind_name(kind), " is expected"));
  if (kind == ManifestKind::kModel) return manifest;  // its bytes are in the model's own files
  std::vector<Digest> chunks;
  for (const ManifestTensor& tensor : manifest->tensors)
    chunks.insert(chunks.end(), tensor.chunks.begin(), tensor.chunks.end());
  TANDEM_ASSIGN_OR_RETURN(const auto absent, blobs_->missing(chunks));
  if (!absent.empty())
    return invalid_error(str(absent.size(), " of ", chunks.size(),
                             " chunks are not in the blob store, the first is ", absent.front(),
                             "; upload them before publishing"));
  return manifest;
}

Status RegistryTxn::put_manifest(const std::string& text, ManifestKind kind,
                                 const Digest& base_model) {
  ManifestRecord record{manifest_digest(text), kind, text, base_model, clock_->unix_ms()};
  return put(record);
}

// -- models -------------------------------------------------------------------

Status RegistryTxn::refuse_taken_name(const std::string& name, bool for_model) {
  if (for_model) {
    TANDEM_ASSIGN_OR_RETURN(const auto alias, find<AliasRecord>(name));
    if (alias)
      return conflict_error(str("the name ", name, " belongs to an adapter; choose another"));
    return {};
  }
  TANDEM_ASSIGN_OR_RETURN(const auto model, find<ModelRecord>(name));
  if (model) return conflict_error(str("the name ", name, " belongs to a model; choose another"));
  return {};
}

Status RegistryTxn::add_model(const ModelRecord& record, const std::string& manifest) {
  TANDEM_RETURN_IF_ERROR(validate_name(record.name, "model"));
  TANDEM_RETURN_IF_ERROR(refuse_taken_name(record.name, true));
  TANDEM_RETURN_IF_ERROR(check_manifest(manifest, ManifestKind::kModel).status());
  if (manifest_digest(manifest) != record.digest)
    return invalid_error(str("model ", record.name, ": its digest is not that of its manifest"));
  TANDEM_ASSIGN_OR_RETURN(const auto existing, find<ModelRecord>(record.name));
  if (existing && existing->digest != record.digest)
    return conflict_error(str("the model ", record.name, " exists with the digest ",
                              existing->digest, ", this one has ", record.digest,
                              "; remove it first or choose another name"));
  TANDEM_RETURN_IF_ERROR(put_manifest(manifest, ManifestKind::kModel, Digest{}));
  return put(record);
}

Status RegistryTxn::remove_model(std::string_view name) {
  TANDEM_ASSIGN_OR_RETURN(const ModelRecord model, get<ModelRecord>(name));
  TANDEM_ASSIGN_OR_RETURN(const auto models, list<ModelRecord>());
  const bool last = std::count_if(models.begin(), models.end(), [&](const ModelRecord& m) {
                      return m.digest == model.digest;
                    }) == 1;
  if (last) {
    TANDEM_ASSIGN_OR_RETURN(const auto adapters, list<AdapterVersionRecord>());
    for (const auto& adapter : adapters)
      if (adapter.base_model == model.digest)
        return conflict_error(str("the model ", name, " is the base of ", adapter.name, "@",
                                  adapter.version, "; remove that first"));
    TANDEM_ASSIGN_OR_RETURN(const auto jobs, list<JobRecord>());
    for (const auto& job : jobs)
      if (job.model == model.digest && !job_has_ended(job.state))
        return conflict_error(
            str("the job ", job.id, " uses the model ", name, "; cancel it first"));
  }
  return remove<ModelRecord>(name);
}

Result<ModelRecord> RegistryTxn::model_by_digest(const Digest& digest) {
  TANDEM_ASSIGN_OR_RETURN(auto models, list<ModelRecord>());
  for (auto& model : models)
    if (model.digest == digest) return std::move(model);
  return not_found_error("no model with the digest " + digest.hex());
}

// -- adapters -----------------------------------------------------------------

Status RegistryTxn::check_epoch(const std::string& job, std::uint64_t epoch) {
  if (job.empty()) return {};
  TANDEM_ASSIGN_OR_RETURN(const JobRecord record, get<JobRecord>(job));
  if (record.epoch != epoch)
    return conflict_error(str("job ", job, " is at epoch ", record.epoch, "; what epoch ", epoch,
                              " sends is refused"));
  return {};
}

Status RegistryTxn::move_alias(AliasRecord& alias, const AdapterVersionRecord& to,
                               const std::string& reason) {
  alias.adapter = to.name;
  alias.version = to.version;
  alias.digest = to.digest;
  alias.history.push_back({to.name, to.version, to.digest, clock_->unix_ms(), reason});
  if (alias.history.size() > kAliasHistoryMax)
    alias.history.erase(alias.history.begin(),
                        alias.history.begin() +
                            static_cast<std::ptrdiff_t>(alias.history.size() - kAliasHistoryMax));
  return put(alias);
}

Result<std::vector<AdapterVersionRecord>> RegistryTxn::adapter_versions(std::string_view name) {
  TANDEM_ASSIGN_OR_RETURN(auto versions, list<AdapterVersionRecord>(name_prefix(name)));
  std::reverse(versions.begin(), versions.end());
  return versions;
}

Result<AdapterVersionRecord> RegistryTxn::publish_adapter(const PublishAdapter& publish) {
  TANDEM_CHECK(write_ != nullptr, "publish in a read transaction");
  TANDEM_RETURN_IF_ERROR(validate_name(publish.name, "adapter"));
  TANDEM_RETURN_IF_ERROR(refuse_taken_name(publish.name, false));
  TANDEM_RETURN_IF_ERROR(check_epoch(publish.job, publish.epoch));
  TANDEM_ASSIGN_OR_RETURN(const Manifest manifest,
                          check_manifest(publish.manifest, ManifestKind::kAdapter));
  const auto settings = parse_json_strict(manifest.settings_json, "settings");
  if (!settings.ok() || settings->value("base_model", Json()) != Json(publish.base_model.hex()))
    return invalid_error(str("adapter ", publish.name,
                             ": its manifest's settings.base_model is not ",
                             publish.base_model.hex()));

  TANDEM_ASSIGN_OR_RETURN(auto alias, find<AliasRecord>(publish.name));
  if (alias && alias->adapter != publish.name)
    return conflict_error(
        str(publish.name, " is an alias of ", alias->adapter, "; choose another adapter name"));
  const Digest digest = manifest_digest(publish.manifest);
  TANDEM_ASSIGN_OR_RETURN(const auto versions, adapter_versions(publish.name));
  if (!versions.empty() && versions.front().digest == digest && versions.front().job == publish.job)
    return versions.front();  // the same publish again: its acknowledgement was lost

  AdapterVersionRecord record{publish.name,         0,           digest,
                              publish.base_model,   publish.job, clock_->unix_ms(),
                              publish.metadata_json};
  record.version =
      std::max(versions.empty() ? 0u : versions.front().version, alias ? alias->last_version : 0u) +
      1;
  if (!alias) {
    alias.emplace();
    alias->name = publish.name;
  }
  alias->last_version = record.version;
  TANDEM_RETURN_IF_ERROR(
      put_manifest(publish.manifest, ManifestKind::kAdapter, publish.base_model));
  TANDEM_RETURN_IF_ERROR(put(record));
  TANDEM_RETURN_IF_ERROR(alias->pinned ? put(*alias) : move_alias(*alias, record, "publish"));
  return record;
}

Result<AdapterVersionRecord> RegistryTxn::adapter_version(std::string_view reference) {
  TANDEM_ASSIGN_OR_RETURN(const auto parts, split_version(reference));
  const auto& [name, version] = parts;
  TANDEM_ASSIGN_OR_RETURN(const auto alias, find<AliasRecord>(name));
  if (!alias) return not_found("adapter", name);
  if (version == 0) return get<AdapterVersionRecord>(adapter_key(alias->adapter, alias->version));
  // name@version of an alias means a version of the adapter that bears the name.
  TANDEM_ASSIGN_OR_RETURN(auto record, find<AdapterVersionRecord>(adapter_key(name, version)));
  if (!record)
    return not_found_error(str("no version ", version, " of the adapter ", name, "; the newest is ",
                               alias->last_version));
  return std::move(*record);
}

Result<AliasRecord> RegistryTxn::set_alias(const std::string& name, const std::string& target,
                                           bool pinned, const std::string& reason) {
  TANDEM_RETURN_IF_ERROR(validate_name(name, "alias"));
  TANDEM_RETURN_IF_ERROR(refuse_taken_name(name, false));
  TANDEM_ASSIGN_OR_RETURN(const AdapterVersionRecord to, adapter_version(target));
  TANDEM_ASSIGN_OR_RETURN(auto alias, find<AliasRecord>(name));
  if (alias && alias->last_version != 0 && to.name != name)
    return conflict_error(
        str(name,
            " is an adapter's own name and can only point at its versions; choose another alias"));
  if (!alias) {
    alias.emplace();
    alias->name = name;
  }
  alias->pinned = pinned;
  TANDEM_RETURN_IF_ERROR(move_alias(*alias, to, reason));
  return std::move(*alias);
}

Result<AliasRecord> RegistryTxn::rollback_alias(const std::string& name) {
  TANDEM_ASSIGN_OR_RETURN(AliasRecord alias, get<AliasRecord>(name));
  // The newest entry that is another version, is still there, and was not itself rolled back from.
  for (std::size_t i = alias.history.size(); i-- > 0;) {
    const AliasChange& change = alias.history[i];
    if (change.adapter == alias.adapter && change.version >= alias.version) continue;
    TANDEM_ASSIGN_OR_RETURN(
        const auto to, find<AdapterVersionRecord>(adapter_key(change.adapter, change.version)));
    if (!to) continue;
    alias.pinned = true;
    TANDEM_RETURN_IF_ERROR(move_alias(alias, *to, "rollback"));
    return alias;
  }
  return refused_error(str("the alias ", name, " has no earlier version to go back to"));
}

Status RegistryTxn::remove_alias(std::string_view name) {
  TANDEM_ASSIGN_OR_RETURN(const AliasRecord alias, get<AliasRecord>(name));
  if (alias.last_version != 0)
    return conflict_error(str(name, " is an adapter's own name; remove its versions instead"));
  return remove<AliasRecord>(name);
}

Status RegistryTxn::remove_adapter_version(std::string_view name, std::uint32_t version) {
  TANDEM_ASSIGN_OR_RETURN(const auto versions, adapter_versions(name));
  const bool there = std::any_of(versions.begin(), versions.end(),
                                 [&](const auto& v) { return v.version == version; });
  if (!there) return not_found_error(str("no version ", version, " of the adapter ", name));
  TANDEM_ASSIGN_OR_RETURN(const auto aliases, list<AliasRecord>());
  for (const AliasRecord& alias : aliases) {
    if (alias.adapter != name || alias.version != version) continue;
    if (alias.name == name && versions.size() == 1) continue;  // it goes with its last version
    return conflict_error(
        str("the alias ", alias.name, " points at ", name, "@", version, "; move it first"));
  }
  if (versions.size() == 1) TANDEM_RETURN_IF_ERROR(remove<AliasRecord>(name));
  return remove<AdapterVersionRecord>(adapter_key(name, version));
}

// -- resolving ----------------------------------------------------------------

Result<Resolved> RegistryTxn::resolve_digest(std::string_view prefix) {
  std::string key_prefix;
  for (std::size_t i = 0; i + 1 < prefix.size(); i += 2)
    key_prefix.push_back(
        static_cast<char>(std::stoi(std::string(prefix.substr(i, 2)), nullptr, 16)));
  std::optional<ManifestRecord> found;
  const auto cursor = read_->cursor(RecordTraits<ManifestRecord>::kTable);
  for (cursor->seek(key_prefix); cursor->valid() && cursor->key().starts_with(key_prefix);
       cursor->next()) {
    TANDEM_ASSIGN_OR_RETURN(const std::string_view value, cursor->value());
    TANDEM_ASSIGN_OR_RETURN(ManifestRecord record, decode_at<ManifestRecord>(cursor->key(), value));
    if (record.kind == ManifestKind::kDataset || !record.digest.hex().starts_with(prefix)) continue;
    if (found) return invalid_error(str("the digest ", prefix, " is ambiguous; give more digits"));
    found = std::move(record);
  }
  TANDEM_RETURN_IF_ERROR(cursor->status());
  if (!found) return not_found_error(str("nothing has the digest ", prefix));
  Resolved resolved;
  resolved.name = found->digest.hex();
  resolved.digest = found->digest;
  resolved.base_model = found->kind == ManifestKind::kModel ? found->digest : found->base_model;
  resolved.kind = found->kind == ManifestKind::kModel     ? Resolved::Kind::kModel
                  : found->kind == ManifestKind::kAdapter ? Resolved::Kind::kAdapter
                                                          : Resolved::Kind::kCheckpoint;
  return resolved;
}

Result<Resolved> RegistryTxn::resolve_checkpoint(std::string_view job, std::string_view which) {
  std::optional<CheckpointRecord> found;
  TANDEM_ASSIGN_OR_RETURN(const auto checkpoints, list<CheckpointRecord>(name_prefix(job)));
  for (const CheckpointRecord& checkpoint : checkpoints)
    if (which == "latest" || which == str("step-", checkpoint.step)) found = checkpoint;
  if (!found) return not_found_error(str("the job ", job, " has no checkpoint ", which));
  TANDEM_ASSIGN_OR_RETURN(const ManifestRecord record, manifest(found->manifest));
  return Resolved{Resolved::Kind::kCheckpoint, str(job, "@step-", found->step), 0, found->manifest,
                  record.base_model};
}

Result<Resolved> RegistryTxn::resolve(std::string_view reference) {
  if (reference.empty() || reference.size() > kNameBytesMax + 32)
    return invalid_error(
        "a model or adapter is named by its name, name@version or 12 or more digits of its digest");
  if (reference.find('@') == std::string_view::npos) {
    TANDEM_ASSIGN_OR_RETURN(const auto model, find<ModelRecord>(reference));
    if (model)
      return Resolved{Resolved::Kind::kModel, model->name, 0, model->digest, model->digest};
    if (reference.size() >= kDigestPrefixDigitsMin && reference.size() <= 64 && is_hex(reference))
      return resolve_digest(reference);
    TANDEM_ASSIGN_OR_RETURN(const auto alias, find<AliasRecord>(reference));
    if (!alias) return not_found("model or adapter", reference);
  } else if (const auto at = reference.find('@'); reference.substr(at + 1) == "latest" ||
                                                  reference.substr(at + 1).starts_with("step-")) {
    return resolve_checkpoint(reference.substr(0, at), reference.substr(at + 1));
  }
  TANDEM_ASSIGN_OR_RETURN(const AdapterVersionRecord version, adapter_version(reference));
  return Resolved{Resolved::Kind::kAdapter, std::string(reference.substr(0, reference.find('@'))),
                  version.version, version.digest, version.base_model};
}

}  // namespace tandem::storage
