// Backup of one object and its restore, through running coordinators. A backup is a folder:
//   backup.json     what it is of; written last: a folder without it is not a backup
//   manifests/HEX   canonical manifests of adapters and checkpoints, by their digest
//   blobs/HEX       the chunks that these and the job's data sets name
//   model/...       a base model's files, as they were added
// Everything is verified by its digest when it is written and again when it is restored.
#include "protocol/base/str.h"
#include "storage/file_io.h"
#include "storage/json_strict.h"
#include "storage/manifest.h"
#include "tools/cli/commands.h"
#include "tools/cli/output.h"

#include <array>
#include <filesystem>
#include <iostream>
#include <set>

namespace tandem::tools {
namespace {

namespace fs = std::filesystem;
using protocol::client::BulkTransfer;

constexpr const char* kFormat = "tandem-object-backup";
constexpr int kVersion = 1;
constexpr std::int64_t kInfoBytesMax = 16 << 20;
constexpr std::size_t kManifestInCallMax = 1 << 20;  // larger ones go over the bulk socket
constexpr std::int64_t kCanonicalBytesMax = static_cast<std::int64_t>(storage::kManifestBytesMax);

void print(Session& session, const Json& result) {
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << describe(result);
}

// -- backup
// -----------------------------------------------------------------------------------------

/// The folder while it is filled.
class Writer {
 public:
  Writer(Session& session, std::string folder, BulkTransfer& bulk)
      : session_(session), folder_(std::move(folder)), bulk_(bulk) {}

  Status add_chunks(const std::vector<Digest>& chunks) {
    for (const Digest& chunk : chunks) {
      if (!stored_.insert(chunk).second) continue;
      TANDEM_ASSIGN_OR_RETURN(const auto bytes, bulk_.get(chunk));  // verified by its digest
      TANDEM_RETURN_IF_ERROR(write("blobs", chunk, bytes));
      bytes_ += static_cast<std::int64_t>(bytes.size());
    }
    return {};
  }
  /// The manifest of an adapter or of JOB@step-N, and its chunks; its digest.
  Result<Json> add_manifest(const std::string& name) {
    TANDEM_ASSIGN_OR_RETURN(Json shown, session_.manifest(name));
    const std::string text = shown.value("manifest", "");
    TANDEM_ASSIGN_OR_RETURN(const auto manifest, storage::parse_manifest(text));
    TANDEM_ASSIGN_OR_RETURN(const Digest digest, Digest::parse(field(shown, "digest")));
    if (storage::manifest_digest(text) != digest)
      return corrupt_error(str(name, ": its manifest does not have the digest ", digest));
    for (const auto& tensor : manifest.tensors) TANDEM_RETURN_IF_ERROR(add_chunks(tensor.chunks));
    TANDEM_RETURN_IF_ERROR(write("manifests", digest, storage::as_bytes(text)));
    return shown;
  }
  Result<Json> add_dataset(const std::string& digest) {
    TANDEM_ASSIGN_OR_RETURN(Json data, session_.call("data.show", {{"data", digest}}));
    std::vector<Digest> chunks;
    for (const auto& chunk : data.value("chunks", Json::array())) {
      TANDEM_ASSIGN_OR_RETURN(chunks.emplace_back(), Digest::parse(chunk.get<std::string>()));
    }
    TANDEM_RETURN_IF_ERROR(add_chunks(chunks));
    return data;
  }
  Status add_model_file(const std::string& path, const std::string& root, std::int64_t bytes) {
    TANDEM_ASSIGN_OR_RETURN(const Digest digest, Digest::parse(root));
    const std::string to = folder_ + "/model" + (path.empty() ? "" : "/" + path);
    TANDEM_RETURN_IF_ERROR(storage::make_directories(fs::path(to).parent_path().string()));
    TANDEM_RETURN_IF_ERROR(storage::require_free_space(folder_, bytes));
    bytes_ += bytes;
    return bulk_.get_content(digest, to);
  }
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }

 private:
  Status write(const std::string& part, const Digest& digest, std::span<const std::byte> bytes) {
    TANDEM_RETURN_IF_ERROR(storage::make_directories(folder_ + "/" + part));
    const std::array<std::span<const std::byte>, 1> parts{bytes};
    return storage::write_file_durably(folder_ + "/" + part + "/" + digest.hex(), parts);
  }

  Session& session_;
  const std::string folder_;
  BulkTransfer& bulk_;
  std::set<Digest> stored_;
  std::int64_t bytes_ = 0;
};

Result<Json> backup_job(Writer& writer, const Json& job) {
  const std::string id = field(job, "job");
  Json info{{"kind", "job"},
            {"job", id},
            {"digest", nullptr},
            {"name", job.value("name", "")},
            {"spec", job.value("spec", Json::object())},
            {"model", field(job, "model_digest")},
            {"dataset", job.value("dataset", "")},
            {"eval_dataset", job.value("eval_dataset", "")},
            {"datasets", Json::array()},
            {"checkpoints", Json::array()}};
  for (const auto& checkpoint : job.value("checkpoints", Json::array())) {
    const auto step = checkpoint.value("step", std::int64_t{0});
    TANDEM_ASSIGN_OR_RETURN(const Json shown, writer.add_manifest(str(id, "@step-", step)));
    info["checkpoints"].push_back({{"step", step}, {"digest", field(shown, "digest")}});
    info["digest"] = field(shown, "digest");  // the newest is last
  }
  if (info["checkpoints"].empty())
    return not_found_error(
        str(id, " has no checkpoint to back up; it writes one every save_steps, and when paused"));
  for (const char* which : {"dataset", "eval_dataset"})
    if (const std::string digest = info.value(which, ""); !digest.empty()) {
      TANDEM_ASSIGN_OR_RETURN(const Json data, writer.add_dataset(digest));
      info["datasets"].push_back(data);
    }
  return info;
}

Result<Json> backup_model(Writer& writer, const Json& model) {
  Json info{{"kind", "model"},
            {"name", field(model, "name")},
            {"digest", field(model, "digest")},
            {"files", model.value("files", Json::array())}};
  for (const auto& file : info["files"])
    TANDEM_RETURN_IF_ERROR(writer.add_model_file(file.value("path", ""), file.value("digest", ""),
                                                 file.value("bytes", std::int64_t{0})));
  return info;
}

Result<Json> backup_adapter(Session& session, Writer& writer, const Json& adapter) {
  const std::string digest = field(adapter, "digest");
  TANDEM_ASSIGN_OR_RETURN(const Json shown, writer.add_manifest(digest));
  TANDEM_ASSIGN_OR_RETURN(const Json base,
                          session.call("model.show", {{"model", field(shown, "model")}}));
  return Json{{"kind", "adapter"},
              {"name", field(adapter, "name")},
              {"digest", digest},
              {"model", field(base, "digest")},
              {"metadata", adapter.value("metadata", Json::object())}};
}

/// What `object` names: a job, an adapter (a version of it) or a model, in that order.
Result<Json> backup_object(Session& session, Writer& writer, const std::string& object) {
  if (object.starts_with("job-") && object.find('@') == std::string::npos) {
    TANDEM_ASSIGN_OR_RETURN(const Json job, session.call("job.show", {{"job", object}}));
    return backup_job(writer, job);
  }
  const auto adapter = session.call("adapter.show", {{"adapter", object}});
  if (adapter.ok()) return backup_adapter(session, writer, *adapter);
  if (adapter.status().code() != StatusCode::kNotFound &&
      adapter.status().code() != StatusCode::kInvalid)
    return adapter.status();
  const auto model = session.call("model.show", {{"model", object}});
  if (object.find('@') != std::string::npos && !model.ok()) return adapter.status();
  if (model.status().code() == StatusCode::kNotFound)
    return not_found_error(str("no model, adapter or job ", object));
  if (!model.ok()) return model.status();
  return backup_model(writer, *model);
}

// -- restore
// ----------------------------------------------------------------------------------------

/// A file of the backup whose name is its digest.
Result<std::string> read_named(const std::string& folder, const std::string& part,
                               const Digest& digest, std::int64_t bytes_max) {
  const std::string path = folder + "/" + part + "/" + digest.hex();
  TANDEM_ASSIGN_OR_RETURN(std::string bytes, storage::read_file(path, bytes_max));
  if (sha256(bytes) != digest)
    return corrupt_error(str(path, " has the digest ", sha256(bytes), "; the backup is damaged"));
  return bytes;
}

class Reader {
 public:
  Reader(Session& session, std::string folder, BulkTransfer& bulk)
      : session_(session), folder_(std::move(folder)), bulk_(bulk) {}

  Status put_chunks(const std::vector<Digest>& chunks) {
    TANDEM_ASSIGN_OR_RETURN(const auto there, bulk_.has(chunks));
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      TANDEM_ASSIGN_OR_RETURN(const std::string bytes,
                              read_named(folder_, "blobs", chunks[i], kDigestLeafBytes));
      if (!there[i]) TANDEM_RETURN_IF_ERROR(bulk_.put(storage::as_bytes(bytes), pin_));
    }
    return {};
  }
  /// Puts a manifest's chunks; its text.
  Result<std::string> put_manifest(const std::string& hex) {
    TANDEM_ASSIGN_OR_RETURN(const Digest digest, Digest::parse(hex));
    TANDEM_ASSIGN_OR_RETURN(std::string text,
                            read_named(folder_, "manifests", digest, kCanonicalBytesMax));
    TANDEM_ASSIGN_OR_RETURN(const auto manifest, storage::parse_manifest(text));
    for (const auto& tensor : manifest.tensors) TANDEM_RETURN_IF_ERROR(put_chunks(tensor.chunks));
    return text;
  }
  /// `model` is a digest; kNotFound says how to bring it here.
  Status need_model(const std::string& model, const std::string& what) {
    const auto shown = session_.call("model.show", {{"model", model}});
    if (shown.status().code() != StatusCode::kNotFound) return shown.status();
    return not_found_error(str(what, " needs the base model ", model.substr(0, 12),
                               ", which is not registered here; add it, or restore its backup "
                               "first"));
  }

  Result<Json> adapter(const Json& info, const std::string& name) {
    TANDEM_RETURN_IF_ERROR(need_model(field(info, "model"), "adapter " + name));
    const auto known = session_.call("adapter.show", {{"adapter", name}});
    if (known.ok() && field(*known, "digest") == field(info, "digest")) return *known;
    TANDEM_ASSIGN_OR_RETURN(const std::string text, put_manifest(field(info, "digest")));
    return session_.call("adapter.import", {{"name", name},
                                            {"model", field(info, "model")},
                                            {"manifest", text},
                                            {"metadata", info.value("metadata", Json::object())},
                                            {"upload", pin_}});
  }

  /// A data set that this made visible goes again when the job cannot be restored.
  Result<Json> job(const Json& info) {
    TANDEM_RETURN_IF_ERROR(need_model(field(info, "model"), field(info, "job")));
    std::vector<std::string> manifests;
    for (const auto& checkpoint : info.value("checkpoints", Json::array())) {
      TANDEM_ASSIGN_OR_RETURN(manifests.emplace_back(), put_manifest(field(checkpoint, "digest")));
    }
    std::vector<std::string> added;
    const Status data = add_datasets(info, added);
    Result<Json> job = data.ok() ? add_checkpoints(info, manifests) : Result<Json>(data);
    for (std::size_t i = 0; !job.ok() && i < added.size(); ++i)
      (void)session_.call("data.rm", {{"data", added[i]}});  // refused where the job is there
    return job;
  }

  /// Copies the files into the coordinator's data folder, which is to be on this host, and adds
  /// them.
  Result<Json> model(const Json& info, const std::string& name) {
    const std::string digest = field(info, "digest");
    if (auto known = session_.call("model.show", {{"model", digest}}); known.ok())
      return name_known(*known, name);
    TANDEM_ASSIGN_OR_RETURN(const Json status, session_.call("status", Json::object()));
    TANDEM_RETURN_IF_ERROR(Digest::parse(digest).status());
    const std::string home = field(status, "data_dir") + "/restored";
    const std::string folder = home + "/" + digest;
    if (!fs::exists(field(status, "data_dir")))
      return refused_error(str("the coordinator's folder ", field(status, "data_dir"),
                               " is not on this host; restore a model where the coordinator runs"));
    TANDEM_RETURN_IF_ERROR(storage::make_directories(home));
    std::error_code error;
    fs::remove_all(folder, error);  // what an interrupted restore left
    TANDEM_RETURN_IF_ERROR(copy_model(info, folder));
    auto added = session_.call("model.add", {{"name", name}, {"path", folder}});
    if (added.ok() && field(*added, "digest") == digest) return added;
    if (added.ok()) (void)session_.call("model.rm", {{"model", name}});
    fs::remove_all(folder, error);
    if (!added.ok()) return added.status();
    return corrupt_error(str("the files of model ", name, " have the digest ",
                             field(*added, "digest"), ", the backup says ", digest));
  }

 private:
  /// A model that is here has that name too from now on.
  Result<Json> name_known(const Json& known, const std::string& name) {
    auto named = session_.call("model.show", {{"model", name}});
    if (named.ok() && field(*named, "digest") == field(known, "digest")) return named;
    const std::string path = known.value("path", "");
    if (!path.empty()) return session_.call("model.add", {{"name", name}, {"path", path}});
    return conflict_error(str("the model is here already, as ", field(known, "name")));
  }

  /// `added`: digests of those that were not there.
  Status add_datasets(const Json& info, std::vector<std::string>& added) {
    for (Json data : info.value("datasets", Json::array())) {
      std::vector<Digest> chunks;
      for (const auto& chunk : data.value("chunks", Json::array())) {
        TANDEM_ASSIGN_OR_RETURN(chunks.emplace_back(),
                                Digest::parse(chunk.is_string() ? chunk.get<std::string>() : ""));
      }
      TANDEM_RETURN_IF_ERROR(put_chunks(chunks));
      data.erase("created");
      data["upload"] = pin_;
      const std::string digest = data.value("digest", "");
      const bool there = session_.call("data.show", {{"data", digest}}).ok();
      if (there) data.erase("name");  // maybe it has another one
      TANDEM_RETURN_IF_ERROR(session_.call("data.add", data).status());
      if (!there) added.push_back(digest);
    }
    return {};
  }

  /// `manifests`: theirs, in the same order.
  Result<Json> add_checkpoints(const Json& info, const std::vector<std::string>& manifests) {
    Result<Json> restored = invalid_error(str(folder_, "/backup.json names no checkpoint"));
    std::size_t next = 0;
    for (const auto& checkpoint : info.value("checkpoints", Json::array())) {
      Json params{{"job", field(info, "job")},
                  {"spec", info.value("spec", Json::object())},
                  {"name", info.value("name", "")},
                  {"model", field(info, "model")},
                  {"dataset", field(info, "dataset")},
                  {"step", checkpoint.value("step", std::int64_t{-1})}};
      const std::string& manifest = manifests[next++];
      if (manifest.size() > kManifestInCallMax) {
        TANDEM_RETURN_IF_ERROR(bulk_.put(storage::as_bytes(manifest), pin_));
        params["manifest_digest"] = storage::manifest_digest(manifest).hex();
      } else {
        params["manifest"] = manifest;
      }
      if (info.value("eval_dataset", "") != "") params["eval_dataset"] = info["eval_dataset"];
      restored = session_.call("job.restore", params);
      TANDEM_RETURN_IF_ERROR(restored.status());
    }
    return restored;
  }

  Status copy_model(const Json& info, const std::string& folder) {
    for (const auto& file : info.value("files", Json::array())) {
      const fs::path path = file.value("path", "");
      for (const auto& part : path)
        if (path.is_absolute() || part == "..")
          return invalid_error(
              str(folder_, "/backup.json names a file outside the backup: ", path.string()));
      const std::string from = folder_ + "/model" + (path.empty() ? "" : "/" + path.string());
      const std::string to = folder + (path.empty() ? "" : "/" + path.string());
      TANDEM_RETURN_IF_ERROR(storage::make_directories(fs::path(to).parent_path().string()));
      std::error_code error;
      if (!fs::is_regular_file(from, error))
        return corrupt_error(str(from, " is not there; the backup is damaged"));
      TANDEM_RETURN_IF_ERROR(storage::require_free_space(
          fs::path(to).parent_path().string(), static_cast<std::int64_t>(fs::file_size(from))));
      TANDEM_RETURN_IF_ERROR(storage::copy_file_durably(from, to));
    }
    return {};
  }

  Session& session_;
  const std::string folder_;
  BulkTransfer& bulk_;
  const std::string pin_ = random_id("restore-", 16);
};

}  // namespace

Status run_object_backup(Session& session, const std::string& object, const std::string& path) {
  std::error_code error;
  const std::string folder = fs::absolute(path, error).lexically_normal().string();
  if (fs::exists(folder + "/backup.json"))
    return conflict_error(str(folder, " holds a backup already; choose another folder"));
  if (fs::exists(folder) && !fs::is_empty(folder, error))
    return conflict_error(str(folder, " is not empty; choose another folder"));
  TANDEM_ASSIGN_OR_RETURN(BulkTransfer* const bulk, session.bulk());
  Writer writer(session, folder, *bulk);
  TANDEM_ASSIGN_OR_RETURN(Json info, backup_object(session, writer, object));
  info["format"] = kFormat;
  info["version"] = kVersion;
  TANDEM_RETURN_IF_ERROR(storage::make_directories(folder));
  TANDEM_RETURN_IF_ERROR(storage::write_file_durably(folder + "/backup.json", info.dump(1)));
  print(session, {{"kind", field(info, "kind")},
                  {"object", object},
                  {"digest", field(info, "digest")},
                  {"path", folder},
                  {"bytes", writer.bytes()}});
  return {};
}

Status run_restore(Session& session, const std::string& path, const std::string& name) {
  TANDEM_ASSIGN_OR_RETURN(const std::string text,
                          storage::read_file(path + "/backup.json", kInfoBytesMax));
  TANDEM_RETURN_IF_ERROR(storage::parse_json_strict(text, path + "/backup.json").status());
  const Json info = Json::parse(text, nullptr, false);
  if (!info.is_object() || info.value("format", Json()) != Json(kFormat)) {
    if (name.empty()) return run_registry(session, "restore", path);
    return refused_error(str(path, " is not a backup of one object; --name names only such"));
  }
  if (info.value("version", Json()) != Json(kVersion))
    return refused_error(str(path, " is a backup of version ", info.value("version", Json()).dump(),
                             "; this program reads ", kVersion));
  const std::string kind = field(info, "kind");
  TANDEM_ASSIGN_OR_RETURN(BulkTransfer* const bulk, session.bulk());
  Reader reader(session, path, *bulk);
  const std::string as = name.empty() ? field(info, "name") : name;
  auto restored =
      kind == "adapter" ? reader.adapter(info, as)
      : kind == "model" ? reader.model(info, as)
      : kind == "job"
          ? reader.job(info)
          : Result<Json>(refused_error(str(path, " is a backup of a ", kind,
                                           "; this program restores adapters, jobs and models")));
  TANDEM_RETURN_IF_ERROR(restored.status());
  Json result{{"kind", kind}, {"digest", field(info, "digest")}, {"from", path}};
  if (kind == "job")
    result["job"] = field(info, "job");
  else
    result["name"] = as;
  if (kind == "adapter") result["version"] = (*restored)["version"];
  print(session, result);
  return {};
}

}  // namespace tandem::tools
