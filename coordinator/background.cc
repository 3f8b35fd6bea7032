#include "coordinator/background.h"

#include "coordinator/model_files.h"
#include "coordinator/registry_store.h"
#include "coordinator/stored_model.h"
#include "protocol/zap.h"
#include "storage/manifest.h"
#include "storage/peft_manifest.h"

#include <nlohmann/json.hpp>

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <filesystem>

namespace tandem::coordinator {
namespace {

using Json = nlohmann::ordered_json;
constexpr std::size_t kProblemsMax = 1000;
const std::string kDataTensor = "data";

/// Every chunk is durable, or which is not.
Status check_chunks(storage::Registry& registry, const storage::Manifest& manifest) {
  std::vector<Digest> chunks;
  for (const storage::ManifestTensor& tensor : manifest.tensors)
    chunks.insert(chunks.end(), tensor.chunks.begin(), tensor.chunks.end());
  TANDEM_ASSIGN_OR_RETURN(const auto missing, registry.blobs().missing(chunks));
  if (missing.empty()) return {};
  return not_found_error(str(missing.size(), " of ", chunks.size(),
                             " chunks were not uploaded, the first is ", missing.front().hex(),
                             "; upload them again"));
}

Result<WorkResult> work(const HashModel& request, storage::Registry&,
                        const BackgroundOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(auto model,
                          hash_model(request, options.model_roots, options.hash_threads));
  return WorkResult(std::move(model));
}

Result<WorkResult> work(const DescribeStoredModel& request, storage::Registry& registry,
                        const BackgroundOptions&) {
  TANDEM_ASSIGN_OR_RETURN(auto model,
                          describe_stored_model(request.files_manifest, registry.blobs()));
  return WorkResult(std::move(model));
}

Result<WorkResult> work(const VerifyManifest& request, storage::Registry& registry,
                        const BackgroundOptions&) {
  std::string text = request.text;
  if (text.empty()) {
    TANDEM_ASSIGN_OR_RETURN(const auto bytes, registry.blob(request.blob));
    text.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  TANDEM_ASSIGN_OR_RETURN(const auto manifest, storage::parse_manifest(text));
  if (manifest.kind != request.kind)
    return invalid_error(str("a manifest of kind ", storage::manifest_kind_name(request.kind),
                             " is needed here, not ", storage::manifest_kind_name(manifest.kind)));
  if (!request.base.empty()) {
    TANDEM_ASSIGN_OR_RETURN(const auto base, storage::parse_manifest(request.base));
    TANDEM_RETURN_IF_ERROR(storage::check_adapter_fits(manifest, base));
  }
  TANDEM_RETURN_IF_ERROR(check_chunks(registry, manifest));
  ManifestVerified verified;
  verified.digest = storage::manifest_digest(text);
  verified.text = std::move(text);
  verified.bytes = manifest.bytes();
  const Json settings = Json::parse(manifest.settings_json, nullptr, false);
  if (settings.is_object() && settings.contains("base_model") &&
      settings["base_model"].is_string()) {
    TANDEM_ASSIGN_OR_RETURN(verified.base_model,
                            Digest::parse(settings["base_model"].get<std::string>()));
  }
  return WorkResult(std::move(verified));
}

Result<WorkResult> work(const DescribeDataset& request, storage::Registry& registry,
                        const BackgroundOptions&) {
  Hasher leaves;
  for (const Digest& chunk : request.chunks) leaves.update(std::as_bytes(std::span(chunk.bytes)));
  if (const Digest root = leaves.finish(); root != request.root)
    return invalid_error(
        str("the chunks have the content root ", root.hex(), ", not ", request.root.hex()));
  storage::Manifest manifest;
  manifest.kind = ManifestKind::kDataset;
  storage::ManifestTensor data;
  data.name = kDataTensor;
  data.dtype = "u8";
  data.shape = {request.bytes};
  data.bytes = request.bytes;
  data.root = request.root;
  data.chunks = request.chunks;
  manifest.tensors.push_back(std::move(data));
  TANDEM_RETURN_IF_ERROR(check_chunks(registry, manifest));
  // The last chunk's size is the only one that `bytes` can be wrong about.
  TANDEM_ASSIGN_OR_RETURN(const auto last, registry.blobs().get(request.chunks.back()));
  const std::int64_t bytes =
      static_cast<std::int64_t>(request.chunks.size() - 1) * kDigestLeafBytes +
      static_cast<std::int64_t>(last.size());
  if (bytes != request.bytes)
    return invalid_error(
        str("the chunks hold ", bytes, " bytes, not ", request.bytes, " as the call says"));
  ManifestVerified verified;
  TANDEM_ASSIGN_OR_RETURN(verified.text, storage::encode_manifest(manifest));
  verified.digest = storage::manifest_digest(verified.text);
  verified.bytes = request.bytes;
  return WorkResult(std::move(verified));
}

Result<WorkResult> work(const ReadEvents& request, storage::Registry& registry,
                        const BackgroundOptions&) {
  RegistryStore store(registry);
  TANDEM_ASSIGN_OR_RETURN(auto events, store.events(request.job, request.count));
  return WorkResult(EventsRead{std::move(events)});
}

Result<Json> check_registry(storage::Registry& registry, bool deep) {
  TANDEM_ASSIGN_OR_RETURN(const auto findings, registry.check(deep));
  TANDEM_ASSIGN_OR_RETURN(const auto stats, registry.store().stats());
  TANDEM_ASSIGN_OR_RETURN(const auto blobs, registry.blobs().stats());
  Json problems = Json::array();
  for (const auto& finding : findings)
    if (problems.size() < kProblemsMax) problems.push_back(finding.where + ": " + finding.message);
  return Json{{"ok", findings.empty()},
              {"records", stats.entries},
              {"blobs", blobs.chunks},
              {"bytes", blobs.bytes},
              {"registry_bytes", stats.used_bytes},
              {"registry_bytes_max", stats.map_bytes},
              {"problems", std::move(problems)}};
}

Result<WorkResult> work(const Maintain& request, storage::Registry& registry,
                        const BackgroundOptions&) {
  Json json;
  if (request.what == Maintenance::kCheck) {
    TANDEM_ASSIGN_OR_RETURN(json, check_registry(registry, request.deep));
  } else if (request.what == Maintenance::kGc) {
    TANDEM_ASSIGN_OR_RETURN(const auto result, registry.gc());
    json = Json{{"blobs", result.blobs.removed},
                {"bytes", result.blobs.removed_bytes},
                {"manifests", result.manifests_removed},
                {"results", result.results_removed},
                {"spared", result.blobs.spared}};
  } else {
    TANDEM_RETURN_IF_ERROR(registry.backup(request.argument));
    TANDEM_ASSIGN_OR_RETURN(const auto blobs, registry.blobs().stats());
    TANDEM_ASSIGN_OR_RETURN(const auto stats, registry.store().stats());
    json = Json{{"path", request.argument}, {"bytes", blobs.bytes + stats.used_bytes}};
  }
  return WorkResult(JsonDone{json.dump()});
}

Result<WorkResult> work(const ManageKeys& request, storage::Registry&,
                        const BackgroundOptions& options) {
  if (options.keys_dir.empty())
    return refused_error(
        "keys need a keys_dir and a key_file of the coordinator; ipc sockets are "
        "guarded by their directory's mode instead");
  protocol::KeyRing ring(options.keys_dir);
  const std::string path = options.keys_dir + "/" + request.name + ".key";
  if (request.verb == "list") {
    Json keys = Json::array();
    for (const protocol::KeyFile& key : ring.list())
      keys.push_back({{"name", key.name},
                      {"role", protocol::key_role_name(key.role)},
                      {"public", key.public_key}});
    return WorkResult(JsonDone{Json{{"keys", std::move(keys)}}.dump()});
  }
  const auto known = ring.find_name(request.name);
  if (request.verb == "revoke") {
    if (!known.ok()) return known.status();
    if (::unlink(path.c_str()) != 0)
      return internal_error(str("cannot remove ", path, ": remove the file by hand"));
    return WorkResult(JsonDone{"{}"});
  }
  if (known.ok())
    return conflict_error(str("a key named ", request.name, " exists; revoke it first"));
  TANDEM_ASSIGN_OR_RETURN(const auto role, protocol::parse_key_role(request.role));
  TANDEM_ASSIGN_OR_RETURN(const auto pair, protocol::generate_curve_keys());
  protocol::KeyFile file;
  file.name = request.name;
  file.role = role;
  file.public_key = pair.public_key;
  TANDEM_RETURN_IF_ERROR(protocol::write_key_file(path, file));
  return WorkResult(JsonDone{Json{{"name", request.name},
                                  {"role", request.role},
                                  {"public", pair.public_key},
                                  {"secret", pair.secret_key},
                                  {"server_public", options.server_public_key}}
                                 .dump()});
}

}  // namespace

WorkDone do_work(const StartWork& start, storage::Registry& registry,
                 const BackgroundOptions& options) {
  // What a library throws about one file fails one piece of work, not the coordinator.
  const auto run = [&]() -> Result<WorkResult> {
    try {
      return std::visit([&](const auto& r) { return work(r, registry, options); }, start.request);
    } catch (const std::filesystem::filesystem_error& error) {
      return invalid_error(str(error.path1().string(), ": ", error.code().message()));
    } catch (const std::exception& error) {
      return internal_error(error.what());
    }
  };
  auto result = run();
  if (!result.ok()) return {start.id, result.status(), {}};
  return {start.id, {}, std::move(*result)};
}

Background::Background(storage::Registry& registry, BackgroundOptions options,
                       std::function<void(WorkDone)> done)
    : registry_(registry), options_(std::move(options)), done_(std::move(done)) {
  quick_thread_ = std::thread([this] { loop(quick_); });
  slow_thread_ = std::thread([this] { loop(slow_); });
}

Background::~Background() {
  ending_ = true;
  quick_.close();
  slow_.close();
  quick_thread_.join();
  slow_thread_.join();
}

void Background::start(StartWork work_to_do) {
  const bool slow = std::holds_alternative<HashModel>(work_to_do.request) ||
                    std::holds_alternative<DescribeStoredModel>(work_to_do.request) ||
                    std::holds_alternative<Maintain>(work_to_do.request) ||
                    std::holds_alternative<ManageKeys>(work_to_do.request);
  const std::uint64_t id = work_to_do.id;
  if (!(slow ? slow_ : quick_).try_push(std::move(work_to_do)))
    done_({id, busy_error("too much background work waits; retry after 1000 ms"), {}});
}

void Background::loop(Queue& queue) {
  while (!ending_)
    if (auto next = queue.pop_for(std::chrono::milliseconds(1000)))
      done_(do_work(*next, registry_, options_));
}

}  // namespace tandem::coordinator
