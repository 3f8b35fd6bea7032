#include "protocol/base/units.h"
#include "tools/cli/commands.h"
#include "tools/cli/model_files.h"
#include "tools/cli/output.h"
#include "worker/data/doctor.h"
#include "worker/model/model_loader.h"
#include "worker/runtime/encoder.h"

#include <unistd.h>

#include <filesystem>
#include <iostream>

namespace tandem::tools {
namespace {

namespace fs = std::filesystem;

/// What each list shows: the JSON's list, and columns as (header, how to read a cell).
struct Listing {
  std::string method, items;
  std::vector<std::pair<std::string, std::function<std::string(const Json&)>>> columns;
};

std::function<std::string(const Json&)> text(const std::string& name) {
  return [name](const Json& row) { return field(row, name); };
}
std::function<std::string(const Json&)> digest(const std::string& name) {
  return [name](const Json& row) { return digest_field(row, name); };
}
std::function<std::string(const Json&)> bytes(const std::string& name) {
  return [name](const Json& row) { return bytes_field(row, name); };
}
std::function<std::string(const Json&)> age(const std::string& name) {
  return [name](const Json& row) { return age_field(row, name); };
}
/// A job's worker; of several, the first and how many more.
std::string workers_of(const Json& row) {
  const std::size_t all = row.value("workers", Json::array()).size();
  return field(row, "worker") + (all > 1 ? str(" +", all - 1) : "");
}
/// Where a model was added from, or which job published it.
std::string origin(const Json& row) {
  const std::string job = field(row, "job");
  return job.empty() || job == "-" ? field(row, "path") : job;
}
std::string progress(const Json& row) {
  return field(row, "step") + "/" + field(row, "total_steps");
}

const std::map<std::string, Listing>& listings() {
  static const std::map<std::string, Listing> table{
      {"model",
       {"model.list",
        "models",
        {{"NAME", text("name")},
         {"DIGEST", digest("digest")},
         {"FAMILY", text("family")},
         {"SIZE", bytes("bytes")},
         {"CONTEXT", text("context")},
         {"WORKERS", text("workers")},
         {"FROM", origin}}}},
      {"data",
       {"data.list",
        "data",
        {{"NAME", text("name")},
         {"DIGEST", digest("digest")},
         {"SIZE", bytes("bytes")},
         {"ADDED", age("created")}}}},
      {"job",
       {"job.list",
        "jobs",
        {{"JOB", text("job")},
         {"STATE", text("state")},
         {"MODEL", text("model")},
         {"PUBLISHES", text("publishes")},
         {"STEP", progress},
         {"LOSS", text("loss")},
         {"WORKER", workers_of},
         {"WAITING FOR", text("reason")}}}},
      {"adapter",
       {"adapter.list",
        "adapters",
        {{"NAME", text("name")},
         {"VERSION", text("version")},
         {"DIGEST", digest("digest")},
         {"MODEL", text("model")},
         {"SIZE", bytes("bytes")},
         {"JOB", text("job")},
         {"CREATED", age("created")}}}},
      {"worker",
       {"worker.list",
        "workers",
        {{"WORKER", text("worker")},
         {"STATE", text("state")},
         {"DEVICE", text("device")},
         {"MODEL", text("model")},
         {"REQUESTS", text("requests")},
         {"JOBS", text("jobs")},
         {"REPLICA", text("replica")},
         {"TOKENS/S", text("tokens_per_second")}}}},
      {"replica",
       {"replica.list",
        "replicas",
        {{"REPLICA", text("replica")},
         {"MODEL", text("model")},
         {"LAYOUT", text("layout")},
         {"STATE", text("state")},
         {"EPOCH", text("epoch")},
         {"WORKERS", workers_of},
         {"REQUESTS", text("requests")},
         {"TOKENS/S", text("tokens_per_second")},
         {"WAITING FOR", text("reason")}}}},
      {"key",
       {"key.list",
        "keys",
        {{"NAME", text("name")}, {"ROLE", text("role")}, {"PUBLIC", text("public")}}}},
  };
  return table;
}

void print_object(Session& session, const Json& object) {
  if (session.json())
    std::cout << object.dump() << "\n";
  else
    std::cout << describe(object);
}

}  // namespace

Status run_list(Session& session, const std::string& what) {
  const Listing& listing = listings().at(what);
  Json all = Json::array();
  for (std::string after;;) {
    Json params = Json::object();
    if (!after.empty()) params["after"] = after;
    TANDEM_ASSIGN_OR_RETURN(const Json page, session.call(listing.method, params));
    for (const auto& row : page.value(listing.items, Json::array())) all.push_back(row);
    after = page.value("next", "");
    if (after.empty()) break;
  }
  if (session.json()) {
    std::cout << Json{{listing.items, all}}.dump() << "\n";
    return {};
  }
  std::vector<std::string> header;
  for (const auto& [name, cell] : listing.columns) header.push_back(name);
  Table rows(header);
  for (const auto& row : all) {
    std::vector<std::string> cells;
    for (const auto& [name, cell] : listing.columns) cells.push_back(cell(row));
    rows.add(std::move(cells));
  }
  std::cout << rows.to_string();
  return {};
}

Status run_show(Session& session, const std::string& what, const std::string& name) {
  TANDEM_ASSIGN_OR_RETURN(const Json object, session.call(what + ".show", {{what, name}}));
  print_object(session, object);
  return {};
}

Status run_remove(Session& session, const std::string& what, const std::string& name, bool force) {
  Json params{{what, name}};
  if (force) params["force"] = true;
  TANDEM_ASSIGN_OR_RETURN(const Json result, session.call(what + ".rm", params));
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << "removed " << what << " " << name << "\n";
  return {};
}

namespace {

/// What no engine could load is refused before it has a name. A path that only the coordinator's
/// host has is left to the engines.
Status check_model(const std::string& path) {
  std::error_code error;
  if (!fs::exists(path, error)) return {};
  const auto loaded = worker::model::load_model(path);
  const Status status =
      loaded.ok() ? worker::runtime::make_encoder(*loaded, path).status() : loaded.status();
  if (status.ok())
    for (const std::string& setting : loaded->generation.not_applied)
      std::cerr << "tandem: warning: " << path << "/generation_config.json: " << setting
                << " is not applied to what is generated\n";
  if (status.ok() || status.message().find(path) != std::string::npos) return status;
  return {status.code(), str(path, ": ", status.message())};
}

}  // namespace

Status run_model_add(Session& session, const std::string& name, const std::string& path,
                     bool shared) {
  std::error_code error;
  const std::string absolute = fs::absolute(path, error).lexically_normal().string();
  TANDEM_RETURN_IF_ERROR(check_model(absolute));
  TANDEM_ASSIGN_OR_RETURN(
      const Json model,
      session.call("model.add", {{"name", name}, {"path", absolute}, {"shared", shared}}));
  if (session.json())
    std::cout << model.dump() << "\n";
  else
    std::cout << "added model " << name << " " << digest_field(model, "digest") << " ("
              << bytes_field(model, "bytes") << ")\n";
  return {};
}

Result<Json> add_data(Session& session, const std::string& path, const std::string& name) {
  TANDEM_ASSIGN_OR_RETURN(Json upload, session.upload_file(path));
  const bool known = session.call("data.show", {{"data", upload["digest"]}}).ok();
  if (!name.empty())
    upload["name"] = name;
  else if (!known)
    upload["name"] = fs::path(path).filename().string();
  return session.call("data.add", upload);
}

Status run_data_add(Session& session, const std::string& path, const std::string& name) {
  TANDEM_ASSIGN_OR_RETURN(const Json data, add_data(session, path, name));
  if (session.json())
    std::cout << data.dump() << "\n";
  else
    std::cout << "added data set " << field(data, "name") << " " << digest_field(data, "digest")
              << " (" << bytes_field(data, "bytes") << ")\n";
  return {};
}

Status run_data_check(Session& session, const std::string& path, const std::string& model,
                      std::int64_t max_length, int samples) {
  std::string model_path = model;
  std::unique_ptr<const ModelFiles> files;
  if (const auto shown = session.call("model.show", {{"model", model}}); shown.ok()) {
    TANDEM_ASSIGN_OR_RETURN(files, ModelFiles::find(session, *shown, ModelFiles::Part::kTexts));
    model_path = files->path();
  } else if (std::error_code error; !fs::exists(model, error)) {
    return shown.status();
  }
  TANDEM_ASSIGN_OR_RETURN(const auto loaded, worker::model::load_model_texts(model_path));
  TANDEM_ASSIGN_OR_RETURN(const auto encoder, worker::runtime::make_encoder(loaded, model_path));
  if (max_length > loaded.config.context_max)
    return invalid_error(str("max_length ", max_length, " exceeds the context of model ", model,
                             " (", loaded.config.context_max, ")"));
  worker::data::DoctorOptions options;
  options.dataset.max_length = max_length;
  options.samples = static_cast<std::size_t>(samples);
  TANDEM_ASSIGN_OR_RETURN(const auto report, worker::data::examine_file(path, encoder, options));
  if (session.json())
    session.print_json(worker::data::to_json(report));
  else
    std::cout << worker::data::to_text(report, colors(STDOUT_FILENO));
  return report.ok() ? Status() : invalid_error(str(path, ": ", report.problems.front()));
}

}  // namespace tandem::tools
