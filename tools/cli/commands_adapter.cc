#include "storage/file_io.h"
#include "storage/peft.h"
#include "tools/cli/commands.h"
#include "tools/cli/model_files.h"
#include "tools/cli/output.h"
#include "worker/model/peft.h"
#include "worker/runtime/adapter_codec.h"

#include <iostream>

namespace tandem::tools {
namespace {

/// A manifest's tensors as PEFT's sites; bytes stay with `blobs`.
Result<std::vector<storage::AdapterTensors>> to_peft_sites(
    const storage::Manifest& manifest, const std::vector<std::vector<std::byte>>& blobs,
    std::vector<std::vector<std::byte>>& joined) {
  std::map<std::string, storage::AdapterTensors> sites;
  constexpr std::string_view kPrefix = "base_model.model.", kEnding = ".lora_A.weight";
  std::size_t next = 0;
  for (const auto& tensor : manifest.tensors) {
    std::vector<std::byte> bytes;
    for (std::size_t i = 0; i < tensor.chunks.size(); ++i, ++next)
      bytes.insert(bytes.end(), blobs[next].begin(), blobs[next].end());
    joined.push_back(std::move(bytes));
    if (!tensor.name.starts_with(kPrefix) || tensor.name.size() < kPrefix.size() + kEnding.size())
      return corrupt_error(str("adapter tensor ", tensor.name, " has no PEFT name"));
    const std::string site =
        tensor.name.substr(kPrefix.size(), tensor.name.size() - kPrefix.size() - kEnding.size());
    const bool a = tensor.name.ends_with(".lora_A.weight");
    storage::TensorInfo info;
    info.name = tensor.name;
    info.dtype = parse_dtype(tensor.dtype).value_or(DType::kF32);
    info.shape = tensor.shape;
    info.bytes = joined.back();
    sites[site].site = site;
    (a ? sites[site].a : sites[site].b) = info;
  }
  std::vector<storage::AdapterTensors> list;
  for (auto& [name, site] : sites) list.push_back(std::move(site));
  return list;
}

}  // namespace

Status run_model_export(Session& session, const std::string& name, const std::string& directory) {
  TANDEM_RETURN_IF_ERROR(require_empty(directory));
  TANDEM_ASSIGN_OR_RETURN(const Json model, session.call("model.show", {{"model", name}}));
  TANDEM_RETURN_IF_ERROR(fetch_model(session, model, directory));
  const Json result{{"model", name},
                    {"digest", field(model, "digest")},
                    {"directory", directory},
                    {"bytes", model.value("bytes", std::int64_t{0})}};
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << "exported " << name << " (" << bytes_field(model, "bytes") << ") to " << directory
              << "\n";
  return {};
}

Status run_adapter_export(Session& session, const std::string& name, const std::string& directory) {
  TANDEM_RETURN_IF_ERROR(require_empty(directory));
  TANDEM_ASSIGN_OR_RETURN(const Json shown, session.manifest(name));
  TANDEM_ASSIGN_OR_RETURN(const auto manifest,
                          storage::parse_manifest(shown.value("manifest", "")));
  if (manifest.kind != protocol::ManifestKind::kAdapter)
    return refused_error(str(name, " is a ", storage::manifest_kind_name(manifest.kind),
                             ", not an adapter; export what its job publishes"));
  TANDEM_ASSIGN_OR_RETURN(const auto config, worker::runtime::manifest_lora(manifest));
  TANDEM_ASSIGN_OR_RETURN(protocol::client::BulkTransfer* const bulk, session.bulk());
  std::vector<std::vector<std::byte>> blobs;
  for (const auto& tensor : manifest.tensors)
    for (const Digest& chunk : tensor.chunks) {
      TANDEM_ASSIGN_OR_RETURN(auto bytes, bulk->get(chunk));
      blobs.push_back(std::move(bytes));
    }
  std::vector<std::vector<std::byte>> joined;
  joined.reserve(manifest.tensors.size());
  TANDEM_ASSIGN_OR_RETURN(auto sites, to_peft_sites(manifest, blobs, joined));
  for (auto& site : sites) site.scale = config.scale(site.site, site.a.shape[0]);
  std::int64_t layers = 0;
  if (const auto base = session.call("model.show", {{"model", field(shown, "model")}}); base.ok())
    layers = base->value("layers", std::int64_t{0});
  TANDEM_RETURN_IF_ERROR(storage::write_peft(directory, config, sites, layers));
  const Json result{{"adapter", name},
                    {"digest", field(shown, "digest")},
                    {"directory", directory},
                    {"sites", sites.size()}};
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << "exported " << name << " (" << sites.size() << " sites) to " << directory << "\n";
  return {};
}

Status run_adapter_import(Session& session, const std::string& name, const std::string& directory,
                          const std::string& model) {
  TANDEM_ASSIGN_OR_RETURN(const storage::PeftAdapter adapter, storage::read_peft(directory));
  if (const auto without = worker::model::sites_without_tensors(adapter); !without.empty())
    std::cerr << "tandem: warning: " << directory << " has no tensors for " << without.size()
              << " of the layers that its target_modules name, the first " << without.front()
              << "; they stay as the base has them\n";
  TANDEM_ASSIGN_OR_RETURN(const Json base, session.call("model.show", {{"model", model}}));
  TANDEM_ASSIGN_OR_RETURN(const Digest base_digest, Digest::parse(field(base, "digest")));
  TANDEM_ASSIGN_OR_RETURN(const auto packed, worker::runtime::pack_peft(base_digest, adapter));
  TANDEM_ASSIGN_OR_RETURN(protocol::client::BulkTransfer* const bulk, session.bulk());
  const std::string upload = random_id("import-", 16);
  for (const auto& blob : packed.blobs) TANDEM_RETURN_IF_ERROR(bulk->put(blob.bytes, upload));
  TANDEM_ASSIGN_OR_RETURN(
      const Json result,
      session.call(
          "adapter.import",
          {{"name", name}, {"model", model}, {"manifest", packed.manifest}, {"upload", upload}}));
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << "imported " << name << " version " << field(result, "version") << " "
              << digest_field(result, "digest") << "\n";
  return {};
}

Status run_adapter_alias(Session& session, const std::string& alias, const std::string& target) {
  TANDEM_ASSIGN_OR_RETURN(const Json result,
                          session.call("adapter.alias", {{"alias", alias}, {"target", target}}));
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << alias << " -> version " << field(result, "version") << " "
              << digest_field(result, "digest") << "\n";
  return {};
}

Status run_adapter_rollback(Session& session, const std::string& alias, std::int64_t version) {
  Json params{{"alias", alias}};
  if (version > 0) params["version"] = version;
  TANDEM_ASSIGN_OR_RETURN(const Json result, session.call("adapter.rollback", params));
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << alias << " -> version " << field(result, "version") << " "
              << digest_field(result, "digest") << "\n";
  return {};
}

}  // namespace tandem::tools
