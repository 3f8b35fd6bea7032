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

/// Puts the bytes that manifest_of described.
inline void put_data(Registry& registry, const std::string& data, const std::string& pin = "") {
  const Status status = registry.blobs().put_chunk(sha256(data), as_bytes(data), pin);
  ASSERT_TRUE(status.ok()) << status.to_string();
}

/// Adds the model "base" and gives its digest.
inline Digest add_base(Registry& registry, const std::string& name = "base") {
  const std::string manifest = manifest_of(ManifestKind::kModel, "{}", "weights of " + name);
  ModelRecord model;
  model.name = name;
  model.digest = manifest_digest(manifest);
  model.path = "/models/" + name;
  auto txn = registry.begin_write().value();
  EXPECT_TRUE(txn.add_model(model, manifest).ok());
  EXPECT_TRUE(txn.commit().ok());
  return model.digest;
}

inline Result<AdapterVersionRecord> publish(Registry& registry, const std::string& name,
                                            const Digest& base, const std::string& data,
                                            const std::string& job = "", std::uint64_t epoch = 0) {
  TANDEM_RETURN_IF_ERROR(registry.blobs().put_chunk(sha256(data), as_bytes(data)));
  TANDEM_ASSIGN_OR_RETURN(auto txn, registry.begin_write());
  TANDEM_ASSIGN_OR_RETURN(auto record, txn.publish_adapter({name, adapter_manifest(base, data),
                                                            base, job, epoch, "{}"}));
  TANDEM_RETURN_IF_ERROR(txn.commit());
  return record;
}

}  // namespace tandem::storage
