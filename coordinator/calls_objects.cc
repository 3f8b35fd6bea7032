// Verbs of models, data sets and adapters.
#include "coordinator/adapters.h"
#include "coordinator/calls.h"
#include "coordinator/resolve.h"
#include "coordinator/views.h"

#include <algorithm>

namespace tandem::coordinator {
namespace {

constexpr std::int64_t kAnswerRest = 16 << 10;  // what stands in an answer beside a manifest

}  // namespace

/// One page in the map's order, which is that of the names, so that a page follows any name, of
/// what was removed meanwhile too; `view` returns (name, JSON) or a null JSON to leave one out.
template <class Map, class View>
void Calls::list(const Ask& ask, Params& params, const char* what, const Map& map, View view) {
  const auto max = static_cast<std::int64_t>(context_.limits().page_max);
  const auto limit = params.integer("limit", max, 1, max);
  const std::string after = params.text("after", false);
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  Json items = Json::array();
  std::string last, next;
  for (const auto& entry : map) {
    auto [name, json] = view(entry);
    if (json.is_null() || name <= after) continue;
    if (static_cast<std::int64_t>(items.size()) >= limit) {
      next = last;
      break;
    }
    items.push_back(std::move(json));
    last = name;
  }
  answer(ask, {{what, std::move(items)}, {"next", next}});
}

void Calls::model_add(const Ask& ask, Params& params) {
  const std::string name = params.text("name"), path = params.text("path");
  const bool shared = params.boolean("shared", false);
  Status status = params.finish();
  if (status.ok()) status = check_name("a model's name", name, context_.limits().name_bytes_max);
  if (status.ok() && context_.tables().aliases.contains(name))
    status = check_free(context_.tables(), name, true);
  if (status.ok() && path.front() != '/')
    status = invalid_error(str("the path of model ", name, " must be absolute, not ", path));
  if (!status.ok()) return reply(ask, status);
  start(
      ask, HashModel{name, path, shared}, [this, name](const Ask& first, const WorkResult& result) {
        ModelHashed hashed = std::get<ModelHashed>(result);
        ModelRecord& model = hashed.model;
        model.name = name;
        const auto known = context_.tables().models.find(name);
        if (known != context_.tables().models.end() && known->second.digest != model.digest)
          return reply(
              first, conflict_error(str(
                         "model ", name, " has digest ", known->second.digest.short_hex(), ", not ",
                         model.digest.short_hex(), "; remove it first or choose another name")));
        if (context_.tables().aliases.contains(name))
          return reply(first, check_free(context_.tables(), name, true));
        for (const auto& [id, job] : context_.tables().jobs)
          if (!is_terminal(job.state) && job.adapter == name)
            return reply(first, conflict_error(str(id, " will publish under the name ", name)));
        model.created_unix_ms = known == context_.tables().models.end()
                                    ? context_.now().unix_ms
                                    : known->second.created_unix_ms;
        context_.put(ManifestRecord{
            model.digest, ManifestKind::kModel, hashed.manifest, {}, model.created_unix_ms});
        context_.put(model);
        context_.log(LogLevel::kInfo, "model ", name, " ", model.digest, " from ", model.path);
        answer(first, model_json(model, workers_));
      });
}

void Calls::model_list(const Ask& ask, Params& params) {
  list(ask, params, "models", context_.tables().models, [&](const auto& entry) {
    return std::pair(entry.first, model_json(entry.second, workers_));
  });
}

void Calls::model_show(const Ask& ask, Params& params) {
  const std::string name = params.text("model");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto model = find_model(context_.tables(), name);
  if (!model.ok()) return reply(ask, model.status());
  Json json = model_json(**model, workers_);
  json["config"] = parse_object((*model)->summary_json);
  Json files = Json::array();
  for (const ModelFile& file : (*model)->files)
    files.push_back({{"path", file.path}, {"digest", file.root.hex()}, {"bytes", file.bytes}});
  json["files"] = std::move(files);
  answer(ask, json);
}

void Calls::model_rm(const Ask& ask, Params& params) {
  const std::string name = params.text("model");
  const bool force = params.boolean("force", false);
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto found = find_model(context_.tables(), name);
  if (!found.ok()) return reply(ask, found.status());
  const ModelRecord model = **found;
  std::string others;  // of the same bytes, which then stay
  for (const auto& [other, record] : context_.tables().models)
    if (record.digest == model.digest && other != model.name)
      others += str(others.empty() ? "" : ", ", other);
  if (!others.empty() && name == model.name) {
    context_.put(EraseModel{model.name});
    return answer(ask, Json::object());
  }
  if (!others.empty())
    return reply(ask, invalid_error(str("digest ", name, " has several names: ", model.name, ", ",
                                        others, "; remove one of them")));
  for (const auto& [id, job] : context_.tables().jobs)
    if (!is_terminal(job.state) && job.model == model.digest)
      return reply(ask, refused_error(str(id, " needs model ", model.name, "; cancel it first")));
  for (const auto& [id, replica] : context_.tables().replicas)
    if (replica.model == model.digest)
      return reply(ask, refused_error(str(id, " serves model ", model.name,
                                          "; remove it first: tandem replica rm ", id)));
  if (!force)
    for (const auto& [key, adapter] : context_.tables().adapters)
      if (adapter.base_model == model.digest)
        return reply(
            ask, refused_error(str("adapter ", adapter.name, "@", adapter.version, " needs model ",
                                   model.name, "; remove it first, or force")));
  context_.put(EraseModel{model.name});
  answer(ask, Json::object());
}

void Calls::data_add(const Ask& ask, Params& params) {
  const Digest root = params.digest("digest");
  const std::string name = params.text("name", false);
  const std::int64_t bytes = params.integer("bytes", -1, 0, INT64_MAX);
  const std::vector<Digest> chunks = params.digests("chunks");
  (void)params.text("upload", false);  // its pins end by themselves
  const std::int64_t rows = params.integer("rows", 0, 0, INT64_MAX);
  const std::string format = params.text("format", false);
  Status status = params.finish();
  if (status.ok() && (bytes <= 0 || chunks.empty()))
    status = invalid_error(
        str("data set ", name, " is empty: it has ", std::max<std::int64_t>(bytes, 0), " bytes"));
  if (status.ok() && !name.empty())
    status = check_name("a data set's name", name, context_.limits().name_bytes_max);
  if (!status.ok()) return reply(ask, status);
  Dataset data{root,
               {},
               name.empty() ? root.short_hex() : name,
               rows,
               bytes,
               format,
               chunks,
               context_.now().unix_ms};
  if (const auto known = context_.tables().datasets.find(root);
      known != context_.tables().datasets.end()) {
    if (!name.empty() && name != known->second.name)
      return reply(
          ask, conflict_error(str("data set ", name, " is there already as ", known->second.name,
                                  ": the same bytes, ", root.short_hex(),
                                  "; use that name, or remove it "
                                  "first")));
    return answer(ask, data_json(known->second));
  }
  start(ask, DescribeDataset{root, chunks, bytes},
        [this, data](const Ask& first, const WorkResult& result) {
          const auto& manifest = std::get<ManifestVerified>(result);
          Dataset done = data;
          done.manifest = manifest.digest;
          context_.put(ManifestRecord{
              manifest.digest, ManifestKind::kDataset, manifest.text, {}, done.created_unix_ms});
          context_.put(done);
          answer(first, data_json(done));
        });
}

void Calls::data_list(const Ask& ask, Params& params) {
  list(ask, params, "data", context_.tables().datasets,
       [](const auto& entry) { return std::pair(entry.first.hex(), data_json(entry.second)); });
}

void Calls::data_show(const Ask& ask, Params& params) {
  const std::string name = params.text("data");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto data = find_dataset(context_.tables(), name);
  if (!data.ok()) return reply(ask, data.status());
  Json json = data_json(**data);
  Json chunks = Json::array();
  for (const Digest& chunk : (*data)->chunks) chunks.push_back(chunk.hex());
  json["chunks"] = std::move(chunks);
  answer(ask, json);
}

void Calls::data_rm(const Ask& ask, Params& params) {
  const std::string name = params.text("data");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto found = find_dataset(context_.tables(), name);
  if (!found.ok()) return reply(ask, found.status());
  const Dataset data = **found;
  for (const auto& [id, job] : context_.tables().jobs)
    if (!is_terminal(job.state) && (job.dataset == data.root || job.eval_dataset == data.root))
      return reply(ask, refused_error(str(id, " needs data set ", data.name, "; cancel it first")));
  context_.put(EraseDataset{data.root, data.manifest});
  answer(ask, Json::object());
}

void Calls::adapter_list(const Ask& ask, Params& params) {
  const std::string model = params.text("model", false);
  Digest base;
  if (!model.empty()) {
    auto found = find_model(context_.tables(), model);
    if (!found.ok()) return reply(ask, found.status());
    base = (*found)->digest;
  }
  list(ask, params, "adapters", context_.tables().aliases, [&](const auto& entry) {
    const AdapterVersionRecord* adapter = context_.tables().current_adapter(entry.first);
    if (adapter == nullptr || (!base.empty() && adapter->base_model != base))
      return std::pair(entry.first, Json());
    Json json = adapter_json(*adapter, context_.tables(), workers_);
    json["name"] = entry.first;
    return std::pair(entry.first, std::move(json));
  });
}

void Calls::adapter_show(const Ask& ask, Params& params) {
  const std::string name = params.text("adapter");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto found = find_adapter(context_.tables(), name);
  if (!found.ok()) return reply(ask, found.status());
  const AdapterVersionRecord& adapter = **found;
  Json json = adapter_json(adapter, context_.tables(), workers_);
  json["metadata"] = parse_object(adapter.metadata_json);
  json["manifest"] = context_.tables().manifest(adapter.digest);
  Json history = Json::array(), aliases = Json::array();
  for (const auto& [key, version] : context_.tables().adapters)
    if (version.name == adapter.name)
      history.push_back({{"version", version.version},
                         {"digest", version.digest.hex()},
                         {"time", version.created_unix_ms},
                         {"job", version.job}});
  for (const auto& [alias_name, alias] : context_.tables().aliases)
    if (alias.adapter == adapter.name && alias.version == adapter.version)
      aliases.push_back(alias_name);
  json["history"] = std::move(history);
  json["aliases"] = std::move(aliases);
  answer(ask, json);
}

void Calls::adapter_alias(const Ask& ask, Params& params) {
  const std::string name = params.text("alias"), target = params.text("target");
  Status status = params.finish();
  if (status.ok()) status = check_name("an alias", name, context_.limits().name_bytes_max);
  if (status.ok()) status = check_unpromised(context_.tables(), name, false);
  if (!status.ok()) return reply(ask, status);
  auto adapter = find_adapter(context_.tables(), target);
  if (!adapter.ok()) return reply(ask, adapter.status());
  const AliasRecord alias = point_alias(context_, name, AdapterVersionRecord(**adapter), "alias");
  answer(ask, {{"alias", name}, {"version", alias.version}, {"digest", alias.digest.hex()}});
}

void Calls::adapter_rollback(const Ask& ask, Params& params) {
  const std::string name = params.text("alias");
  const auto version = params.integer("version", 0, 1, UINT32_MAX);
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  const auto found = context_.tables().aliases.find(name);
  if (found == context_.tables().aliases.end())
    return reply(ask, find_adapter(context_.tables(), name).ok()
                          ? invalid_error(str(name, " is not an alias"))
                          : find_adapter(context_.tables(), name).status());
  const AliasRecord alias = found->second;
  const auto& adapters = context_.tables().adapters;
  const auto target = version > 0
                          ? adapters.find({alias.adapter, static_cast<std::uint32_t>(version)})
                          : version_before(context_.tables(), alias);
  if (target == adapters.end())
    return reply(ask, not_found_error(version > 0 ? str(name, " has no version ", version)
                                                  : str(name, " has no version before ",
                                                        alias.adapter, "@", alias.version)));
  const AdapterVersionRecord old = target->second;
  const std::string reason = str(kRollbackReason, "to version ", old.version);
  if (alias.last_version == 0) {  // it has no versions of its own, and gets none by this
    const AliasRecord moved = point_alias(context_, name, old, reason);
    return answer(ask,
                  {{"alias", name}, {"version", moved.version}, {"digest", moved.digest.hex()}});
  }
  const AdapterVersionRecord made =
      add_version(context_, {name, context_.tables().manifest(old.digest), old.digest,
                             old.base_model, old.job, old.metadata_json, reason});
  answer(ask, {{"alias", name}, {"version", made.version}, {"digest", made.digest.hex()}});
}

void Calls::adapter_rm(const Ask& ask, Params& params) {
  const std::string name = params.text("adapter");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto found = find_adapter(context_.tables(), name);
  if (!found.ok()) return reply(ask, found.status());
  const bool one_version = !context_.tables().aliases.contains(name);  // NAME@VERSION, or a digest
  const std::string owner = one_version ? (*found)->name : name;
  const std::uint32_t version = (*found)->version;
  if (one_version && name.find('@') == std::string::npos) {
    std::string others;
    for (const auto& [key, adapter] : context_.tables().adapters)
      if (adapter.digest == (*found)->digest && &adapter != *found)
        others += str(", ", adapter.name, "@", adapter.version);
    if (!others.empty())
      return reply(ask, invalid_error(str("digest ", name, " has several names: ", owner, "@",
                                          version, others, "; remove one of them")));
  }
  for (const auto& [alias_name, alias] : context_.tables().aliases)
    if (alias.adapter == owner && (one_version ? alias.version == version : alias_name != owner))
      return reply(ask, refused_error(str("alias ", alias_name, " points at ", alias.adapter, "@",
                                          alias.version, "; move or remove it first")));
  std::vector<std::uint32_t> versions;
  for (const auto& [key, adapter] : context_.tables().adapters)
    if (adapter.name == owner && (!one_version || adapter.version == version))
      versions.push_back(adapter.version);
  for (const std::uint32_t gone : versions) context_.put(EraseAdapter{owner, gone});
  if (!one_version) remove_name(context_, owner);
  answer(ask, Json::object());
}

void Calls::adapter_import(const Ask& ask, Params& params) {
  const std::string name = params.text("name"), model_name = params.text("model");
  const std::string manifest = params.text("manifest");
  const std::string metadata = params.object("metadata", false);
  (void)params.text("upload", false);
  Status status = params.finish();
  if (status.ok()) status = check_name("an adapter's name", name, context_.limits().name_bytes_max);
  if (status.ok()) status = check_unpromised(context_.tables(), name, false);
  if (!status.ok()) return reply(ask, status);
  auto model = find_model(context_.tables(), model_name);
  if (!model.ok()) return reply(ask, model.status());
  const Digest base = (*model)->digest;
  start(ask, VerifyManifest{manifest, ManifestKind::kAdapter, context_.tables().manifest(base)},
        [this, name, base, metadata](const Ask& first, const WorkResult& result) {
          const auto& verified = std::get<ManifestVerified>(result);
          if (verified.base_model != base)
            return reply(first, refused_error(str("adapter ", name, " is of base ",
                                                  verified.base_model.short_hex(), ", not ",
                                                  base.short_hex())));
          if (Status taken = check_unpromised(context_.tables(), name, false); !taken.ok())
            return reply(first, taken);
          if (context_.tables().model_by_digest(base) == nullptr)
            return reply(first, not_found_error(str("base ", base.short_hex(), " of adapter ", name,
                                                    " was removed meanwhile; add it again")));
          const AdapterVersionRecord made = add_version(
              context_, {name, verified.text, verified.digest, base, "", metadata, "import"});
          answer(first, adapter_json(made, context_.tables(), workers_));
          announce(context_, workers_, made);
        });
}

void Calls::adapter_manifest(const Ask& ask, Params& params) {
  const std::string name = params.text("adapter");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto target = resolve(context_.tables(), name);
  if (!target.ok()) return reply(ask, target.status());
  if (target->adapter.empty())
    return reply(ask, invalid_error(str(name, " is a base model, not an adapter")));
  Json manifest = target->manifest;
  // A checkpoint of many ranks may have one larger than an answer; the bulk socket has them all.
  if (static_cast<std::int64_t>(dump(manifest).size()) > protocol::kCallJsonBytesMax - kAnswerRest)
    manifest = "";
  answer(ask, {{"digest", target->adapter.hex()},
               {"manifest", std::move(manifest)},
               {"name", target->name},
               {"model", target->model.name}});
}

}  // namespace tandem::coordinator
