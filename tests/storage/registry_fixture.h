// A registry with one model in it, and short ways to make manifests.
#pragma once

#include "storage/registry.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace tandem::storage {

/// A manifest with one u8 tensor "data" of these bytes.
inline std::string manifest_of(ManifestKind kind, const std::string& settings,
                               const std::string& data) {
  Manifest manifest;
  manifest.kind = kind;
  manifest.settings_json = settings;
  manifest.tensors = {
      describe_tensor("data", "u8", {static_cast<std::int64_t>(data.size())}, as_bytes(data))};
  return encode_manifest(manifest).value();
}

inline std::string adapter_manifest(const Digest& base, const std::string& data) {
  return manifest_of(ManifestKind::kAdapter, R"({"base_model":")" + base.hex() + R"(","r":1})",
                     data);
}

inline Status put_manifest(RegistryTxn& txn, ManifestKind kind, const std::string& manifest,
                           const Digest& base, std::int64_t created_unix_ms = 0) {
  return txn.put(ManifestRecord{manifest_digest(manifest), kind, manifest, base, created_unix_ms});
}

/// Adds the model "base" and gives its digest.
inline Digest add_base(Registry& registry) {
  const std::string manifest = manifest_of(ManifestKind::kModel, "{}", "weights");
  ModelRecord model;
  model.name = "base";
  model.digest = manifest_digest(manifest);
  model.path = "/models/base";
  auto txn = registry.begin_write().value();
  EXPECT_TRUE(put_manifest(txn, ManifestKind::kModel, manifest, {}).ok());
  EXPECT_TRUE(txn.put(model).ok());
  EXPECT_TRUE(txn.commit().ok());
  return model.digest;
}

/// What the coordinator stores of a publish: the bytes, then manifest, version and alias in one
/// transaction.
inline Result<AdapterVersionRecord> publish(Registry& registry, const std::string& name,
                                            const Digest& base, const std::string& data,
                                            std::int64_t created_unix_ms = 0) {
  TANDEM_RETURN_IF_ERROR(registry.blobs().put_chunk(sha256(data), as_bytes(data)));
  TANDEM_ASSIGN_OR_RETURN(auto txn, registry.begin_write());
  TANDEM_ASSIGN_OR_RETURN(const auto before, txn.find<AliasRecord>(name));
  AliasRecord alias = before.value_or(AliasRecord{});
  const std::string manifest = adapter_manifest(base, data);
  const AdapterVersionRecord record{
      name, ++alias.last_version, manifest_digest(manifest), base, "", created_unix_ms, "{}"};
  alias.name = alias.adapter = name;
  alias.version = record.version;
  alias.digest = record.digest;
  TANDEM_RETURN_IF_ERROR(
      put_manifest(txn, ManifestKind::kAdapter, manifest, base, created_unix_ms));
  TANDEM_RETURN_IF_ERROR(txn.put(record));
  TANDEM_RETURN_IF_ERROR(txn.put(alias));
  TANDEM_RETURN_IF_ERROR(txn.commit());
  return record;
}

}  // namespace tandem::storage
