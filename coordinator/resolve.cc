#include "coordinator/resolve.h"

#include "protocol/base/str.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <set>

namespace tandem::coordinator {
namespace {

constexpr std::size_t kPrefixDigitsMin = 12;

bool is_digest_prefix(const std::string& text) {
  return text.size() >= kPrefixDigitsMin && text.size() <= 64 &&
         std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool has_prefix(const Digest& digest, const std::string& digits) {
  return digest.hex().compare(0, digits.size(), digits) == 0;
}

/// The refusal of digits that several objects' digests begin with.
Status ambiguous(const std::string& digits, const std::map<Digest, std::string>& fitting) {
  std::string names;
  for (const auto& [digest, name] : fitting)
    names += str(names.empty() ? "" : ", ", name, " (", digest.hex(), ")");
  return invalid_error(
      str("digest ", digits, "… fits ", fitting.size(), " objects: ", names, "; name one of them"));
}

/// Of records whose digest begins with `digits` the first; null: none does. kInvalid, with their
/// names: several do that are not the same object.
template <class Map, class Digester, class Namer>
Result<const typename Map::mapped_type*> by_digits(const Map& records, const std::string& digits,
                                                   Digester digest, Namer name) {
  const typename Map::mapped_type* first = nullptr;
  std::map<Digest, std::string> fitting;
  for (const auto& [key, record] : records) {
    if (!has_prefix(digest(record), digits)) continue;
    if (first == nullptr) first = &record;
    fitting.emplace(digest(record), name(record));
  }
  if (fitting.size() > 1) return ambiguous(digits, fitting);
  return first;
}

template <class Number>
std::optional<Number> parse_number(const std::string& text) {
  Number number = 0;
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, number);
  if (text.empty() || result.ec != std::errc() || result.ptr != end) return std::nullopt;
  return number;
}

std::string suggestion(const std::string& name, const std::vector<std::string>& known) {
  const std::string nearest = nearest_name(name, known);
  return nearest.empty() ? "" : str("; did you mean ", nearest, "?");
}

std::vector<std::string> names(const Tables& tables) {
  std::vector<std::string> known;
  for (const auto& [name, model] : tables.models) known.push_back(name);
  for (const auto& [name, alias] : tables.aliases) known.push_back(name);
  return known;
}

Result<Target> target_of(const Tables& tables, const AdapterVersionRecord& adapter) {
  const ModelRecord* model = tables.model_by_digest(adapter.base_model);
  if (model == nullptr)
    return not_found_error(str("adapter ", adapter.name, "@", adapter.version, " needs base ",
                               adapter.base_model.short_hex(),
                               ", which is not registered; add it with: tandem model add"));
  Target target{model_ref(*model),
                adapter.digest,
                tables.manifest(adapter.digest),
                str(adapter.name, "@", adapter.version),
                {},
                {}};
  if (target.manifest.empty())
    return corrupt_error(str("the manifest of adapter ", target.name,
                             " is not in the registry; "
                             "run: tandem registry check"));
  return target;
}

Result<Target> target_of(const Tables& tables, const CheckpointRecord& checkpoint) {
  const auto job = tables.jobs.find(JobId(checkpoint.job));
  const ModelRecord* model =
      job == tables.jobs.end() ? nullptr : tables.model_by_digest(job->second.model);
  if (model == nullptr)
    return not_found_error(str("the base of ", checkpoint.job, " is not registered any more"));
  Target target{model_ref(*model),
                checkpoint.manifest,
                tables.manifest(checkpoint.manifest),
                str(checkpoint.job, "@step-", checkpoint.step),
                {},
                {}};
  if (job->second.full)
    target.unservable = refused_error(
        str(target.name,
            " is the state of a full fine-tune, not an adapter of its base: engines "
            "serve what the job publishes, ",
            job->second.adapter, job->second.published.empty() ? ", when it has ended" : ""));
  return target;
}

/// JOB@latest and JOB@step-N.
Result<Target> resolve_job(const Tables& tables, const std::string& id, const std::string& what) {
  TANDEM_ASSIGN_OR_RETURN(const Job* job, find_job(tables, id));
  const CheckpointRecord* checkpoint = nullptr;
  if (what == "latest") {
    checkpoint = tables.latest_checkpoint(job->id);
    if (checkpoint == nullptr && is_terminal(job->state))
      return not_found_error(str(id, " is ", job_state_name(job->state), " and has no checkpoint"));
    if (checkpoint == nullptr)
      return not_found_error(
          str(id, " has no checkpoint yet (step ", job->step, "); set save_steps lower or wait"));
  } else {
    const auto step =
        what.rfind("step-", 0) == 0 ? parse_number<std::int64_t>(what.substr(5)) : std::nullopt;
    if (!step) return invalid_error(str(id, "@", what, ": write JOB@latest or JOB@step-N"));
    const auto found = tables.checkpoints.find(std::pair(id, *step));
    if (found == tables.checkpoints.end()) {
      std::string kept;
      for (const CheckpointRecord& record : tables.checkpoints_of(job->id))
        kept += str(kept.empty() ? "" : ", ", "step-", record.step);
      return not_found_error(
          str("no checkpoint ", id, "@", what, "; kept are: ", kept.empty() ? "none" : kept));
    }
    checkpoint = &found->second;
  }
  auto target = target_of(tables, *checkpoint);
  if (target.ok() && what == "latest") target->job = job->id;
  return target;
}

Result<Target> resolve_digest(const Tables& tables, const std::string& digits) {
  std::map<Digest, Target> found;
  for (const auto& [name, model] : tables.models)
    if (has_prefix(model.digest, digits))
      found[model.digest] = {model_ref(model), {}, "", name, {}, {}};
  for (const auto& [key, adapter] : tables.adapters) {
    if (!has_prefix(adapter.digest, digits)) continue;
    TANDEM_ASSIGN_OR_RETURN(found[adapter.digest], target_of(tables, adapter));
  }
  for (const auto& [key, checkpoint] : tables.checkpoints) {
    if (!has_prefix(checkpoint.manifest, digits) || found.contains(checkpoint.manifest)) continue;
    TANDEM_ASSIGN_OR_RETURN(found[checkpoint.manifest], target_of(tables, checkpoint));
  }
  if (found.empty()) return not_found_error(str("no model or adapter has a digest ", digits, "…"));
  if (found.size() > 1) {
    std::map<Digest, std::string> fitting;
    for (const auto& [digest, target] : found) fitting.emplace(digest, target.name);
    return ambiguous(digits, fitting);
  }
  return std::move(found.begin()->second);
}

}  // namespace

protocol::ModelRef model_ref(const ModelRecord& model) {
  protocol::ModelRef ref{model.digest, model.name, model.path, model.shared, {}};
  for (const ModelFile& file : model.files) ref.files.emplace_back(file.path, file.root);
  return ref;
}

Result<Target> resolve(const Tables& tables, const std::string& name) {
  if (name.empty()) return invalid_error("a model, adapter or digest must be named");
  const auto at = name.find('@');
  if (at != std::string::npos) {
    const std::string base = name.substr(0, at), what = name.substr(at + 1);
    if (base.rfind("job-", 0) == 0 && !tables.aliases.contains(base))
      return resolve_job(tables, base, what);
    TANDEM_ASSIGN_OR_RETURN(const AdapterVersionRecord* adapter, find_adapter(tables, name));
    return target_of(tables, *adapter);
  }
  if (const auto model = tables.models.find(name); model != tables.models.end())
    return Target{model_ref(model->second), {}, "", name, {}, {}};
  if (const AdapterVersionRecord* adapter = tables.current_adapter(name))
    return target_of(tables, *adapter);
  if (is_digest_prefix(name)) return resolve_digest(tables, name);
  return not_found_error(str("no model or adapter named ", name, suggestion(name, names(tables))));
}

Result<const ModelRecord*> find_model(const Tables& tables, const std::string& name) {
  if (const auto found = tables.models.find(name); found != tables.models.end())
    return &found->second;
  if (tables.aliases.contains(name))
    return invalid_error(str(name, " is an adapter; a base model is needed here"));
  if (is_digest_prefix(name)) {
    TANDEM_ASSIGN_OR_RETURN(const ModelRecord* model,
                            by_digits(
                                tables.models, name, [](const ModelRecord& m) { return m.digest; },
                                [](const ModelRecord& m) { return m.name; }));
    if (model != nullptr) return model;
  }
  std::vector<std::string> known;
  for (const auto& [model_name, model] : tables.models) known.push_back(model_name);
  return not_found_error(str("no model named ", name, suggestion(name, known),
                             known.empty() ? "; add one with: tandem model add NAME PATH" : ""));
}

Result<const Dataset*> find_dataset(const Tables& tables, const std::string& name) {
  if (const Dataset* found = tables.dataset_by_name(name)) return found;
  if (is_digest_prefix(name)) {
    TANDEM_ASSIGN_OR_RETURN(const Dataset* dataset,
                            by_digits(
                                tables.datasets, name, [](const Dataset& d) { return d.root; },
                                [](const Dataset& d) { return d.name; }));
    if (dataset != nullptr) return dataset;
  }
  std::vector<std::string> known;
  for (const auto& [digest, dataset] : tables.datasets) known.push_back(dataset.name);
  return not_found_error(str("no data set ", name, suggestion(name, known)));
}

Result<const AdapterVersionRecord*> find_adapter(const Tables& tables, const std::string& name) {
  const auto at = name.find('@');
  const std::string base = name.substr(0, at);
  if (at != std::string::npos) {
    const auto version = parse_number<std::uint32_t>(name.substr(at + 1));
    if (!version) return invalid_error(str(name, ": write NAME@VERSION with a whole number"));
    const auto alias = tables.aliases.find(base);
    const std::string& owner = alias == tables.aliases.end() ? base : alias->second.adapter;
    for (const std::string& candidate : {base, owner})
      if (const auto found = tables.adapters.find(std::pair(candidate, *version));
          found != tables.adapters.end())
        return &found->second;
    if (alias != tables.aliases.end())
      return not_found_error(
          str(base, " has no version ", *version, "; its current one is ", alias->second.version));
  } else {
    if (const AdapterVersionRecord* found = tables.current_adapter(base)) return found;
    if (is_digest_prefix(base)) {
      TANDEM_ASSIGN_OR_RETURN(
          const AdapterVersionRecord* adapter,
          by_digits(
              tables.adapters, base, [](const AdapterVersionRecord& a) { return a.digest; },
              [](const AdapterVersionRecord& a) { return str(a.name, "@", a.version); }));
      if (adapter != nullptr) return adapter;
    }
  }
  std::vector<std::string> known;
  for (const auto& [alias_name, alias] : tables.aliases) known.push_back(alias_name);
  return not_found_error(str("no adapter named ", base, suggestion(base, known)));
}

Result<const Job*> find_job(const Tables& tables, const std::string& id) {
  if (const auto found = tables.jobs.find(JobId(id)); found != tables.jobs.end())
    return &found->second;
  std::vector<std::string> known;
  for (const auto& [job_id, job] : tables.jobs) known.push_back(job_id.value);
  return not_found_error(str("no job ", id, suggestion(id, known)));
}

Status check_name(const std::string& what, const std::string& name, std::size_t bytes_max) {
  if (name.empty() || name.size() > bytes_max)
    return invalid_error(
        str(what, " must have 1 to ", bytes_max, " characters, not ", name.size()));
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-' || c == '/' || c == ':';
  };
  for (const char c : name)
    if (!allowed(c))
      return invalid_error(
          str(what, " '", name, "' may hold letters, digits and . _ - / : only ('@' is reserved)"));
  const char first = name[0];
  if (first == '.' || first == '_' || first == '-' || first == '/' || first == ':' ||
      name.back() == '/' || name.find("//") != std::string::npos ||
      name.find("..") != std::string::npos)
    return invalid_error(str(what, " '", name,
                             "' must begin with a letter or digit and hold no "
                             "'..', '//' or trailing '/'"));
  if (is_digest_prefix(name) || name.rfind("job-", 0) == 0)
    return invalid_error(str(what, " '", name, "' looks like a digest or a job; choose another"));
  return {};
}

Status check_free(const Tables& tables, const std::string& name, bool adapters_too) {
  if (tables.models.contains(name))
    return conflict_error(str("a base model is named ", name,
                              " already; models and adapters share "
                              "one name space"));
  if (adapters_too && tables.aliases.contains(name))
    return conflict_error(str("an adapter is named ", name,
                              " already; models and adapters share "
                              "one name space"));
  return {};
}

Status check_unpromised(const Tables& tables, const std::string& name, bool model,
                        const JobId& self) {
  TANDEM_RETURN_IF_ERROR(check_free(tables, name, model));
  for (const auto& [id, job] : tables.jobs)
    if (id != self && !is_terminal(job.state) && job.adapter == name && (model || job.full))
      return conflict_error(str(id, " will publish ", job.full ? "a model" : "an adapter",
                                " under the name ", name, "; choose another name"));
  return {};
}

}  // namespace tandem::coordinator
