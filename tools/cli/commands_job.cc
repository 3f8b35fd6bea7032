#include "protocol/base/units.h"
#include "protocol/job_spec.h"
#include "tools/cli/commands.h"
#include "tools/cli/output.h"
#include "worker/model/model_loader.h"
#include "worker/runtime/encoder.h"
#include "worker/train/batch_source.h"

#include <yaml-cpp/yaml.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <regex>

namespace tandem::tools {
namespace {

/// A scalar of a YAML file or command line as the JSON value it looks like; YAML's and people's
/// fractions without digits on one side (.5, 1.e-3) are numbers too.
Json scalar_value(const std::string& text, bool quoted) {
  if (quoted) return text;
  Json value = Json::parse(text, nullptr, false);
  if (!value.is_discarded() && !value.is_null() && !value.is_object()) return value;
  static const std::regex fraction(R"([-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]{1,2})?)");
  if (std::regex_match(text, fraction)) return std::strtod(text.c_str(), nullptr);
  return text;
}

Json from_yaml(const YAML::Node& node) {
  if (node.IsMap()) {
    Json object = Json::object();
    for (const auto& entry : node) {
      const auto name = entry.first.as<std::string>();
      if (object.contains(name))
        throw YAML::Exception(entry.first.Mark(), str("\"", name, "\" is given twice"));
      object[name] = from_yaml(entry.second);
    }
    return object;
  }
  if (node.IsSequence()) {
    Json array = Json::array();
    for (const auto& item : node) array.push_back(from_yaml(item));
    return array;
  }
  if (node.IsNull()) return nullptr;
  return scalar_value(node.Scalar(), node.Tag() == "!");
}

/// A job file: model, data, eval_data, adapter or name, priority and training settings, side by
/// side.
Result<Json> read_job_file(const std::string& path) {
  try {
    const YAML::Node root = YAML::LoadFile(path);
    Json file = from_yaml(root);
    if (!file.is_object()) return invalid_error(str(path, ": expected \"name: value\" lines"));
    for (const char* name : {"model", "data", "eval_data", "adapter", "name"})
      if (root[name] && root[name].IsScalar()) file[name] = root[name].Scalar();  // 1.10 is no 1.1
    return file;
  } catch (const YAML::BadFile&) {
    return not_found_error(str("no job file ", path));
  } catch (const std::ios_base::failure&) {  // of a directory
    return invalid_error(str(path, " cannot be read as a job file"));
  } catch (const YAML::Exception& error) {
    return invalid_error(str(path, ":", error.mark.line + 1, ": ", error.msg));
  }
}

struct JobRequest {
  std::string model, data, eval_data, adapter, name;
  std::int64_t priority = 0;
  Json train = Json::object();
};

/// The job file's values, overridden by the command line's.
Result<JobRequest> merge(const TrainOptions& options) {
  JobRequest request;
  if (!options.file.empty()) {
    TANDEM_ASSIGN_OR_RETURN(const Json file, read_job_file(options.file));
    for (const auto& [name, value] : file.items()) {
      const auto text = [&value = value] {
        if (value.is_null()) return std::string();
        return value.is_string() ? value.get<std::string>() : value.dump();
      };
      if (name == "model")
        request.model = text();
      else if (name == "data")
        request.data = text();
      else if (name == "eval_data")
        request.eval_data = text();
      else if (name == "adapter")
        request.adapter = text();
      else if (name == "name")
        request.name = text();
      else if (name == "priority" && !value.is_number_integer())
        return invalid_error(
            str(options.file, ": priority must be an integer in -100..100, not ", value.dump()));
      else if (name == "priority")
        request.priority = value.get<std::int64_t>();
      else
        request.train[name] = value;
    }
  }
  if (!options.model.empty()) request.model = options.model;
  if (!options.data.empty()) request.data = options.data;
  if (!options.eval_data.empty()) request.eval_data = options.eval_data;
  if (!options.adapter.empty()) request.adapter = options.adapter;
  if (!options.name.empty()) request.name = options.name;
  if (options.priority) request.priority = *options.priority;
  for (const auto& [name, value] : options.settings) {
    if (name == "target_modules" && value.find(',') != std::string::npos) {
      Json names = Json::array();
      std::stringstream words(value);
      for (std::string word; std::getline(words, word, ',');) names.push_back(word);
      request.train[name] = names;
    } else {
      request.train[name] = scalar_value(value, false);
    }
  }
  // Spelling and ranges are checked here already, before any data travels.
  auto settings = protocol::TrainSettings::parse(request.train.dump());
  if (!settings.ok()) return settings.status();
  return request;
}

/// Reads the files as training would, where they and the base model's can be read here: a bad line,
/// or more passes than there may be, is better found before anything travels. Elsewhere the engine
/// says the same when the job starts. What there is to train on, or null.
Result<Json> check_data(Session& session, const JobRequest& request) {
  TANDEM_ASSIGN_OR_RETURN(const Json shown, session.call("model.show", {{"model", request.model}}));
  const std::string model_path = shown.value("path", "");
  std::error_code error;
  const auto here = [&](const std::string& path) { return std::filesystem::exists(path, error); };
  if (!here(model_path) || (!here(request.data) && !here(request.eval_data))) return Json();
  TANDEM_ASSIGN_OR_RETURN(const auto loaded, worker::model::load_model(model_path));
  TANDEM_ASSIGN_OR_RETURN(const auto encoder, worker::runtime::make_encoder(loaded, model_path));
  TANDEM_ASSIGN_OR_RETURN(const auto settings,
                          protocol::TrainSettings::parse(request.train.dump()));
  const auto load =
      [&](const std::string& path) -> Result<std::shared_ptr<const worker::data::Dataset>> {
    if (!here(path)) return std::shared_ptr<const worker::data::Dataset>();
    TANDEM_ASSIGN_OR_RETURN(
        auto data,
        worker::data::load_dataset(path, encoder, worker::runtime::dataset_options(settings)));
    return std::make_shared<const worker::data::Dataset>(std::move(data));
  };
  TANDEM_ASSIGN_OR_RETURN(const auto data, load(request.data));
  TANDEM_ASSIGN_OR_RETURN(const auto eval, load(request.eval_data));
  if (data == nullptr) return Json();
  TANDEM_ASSIGN_OR_RETURN(const auto batches,
                          worker::train::make_packed_batches(data, eval, settings));
  return Json{{"rows", data->examples.size()},
              {"tokens", data->total_tokens()},
              {"trained_tokens", data->trained_tokens()},
              {"steps_per_epoch", batches->steps_per_epoch()},
              {"steps", batches->total_steps()}};
}

/// A data set by file (uploaded and registered) or by the name or digest it has.
Result<std::string> resolve_data(Session& session, const std::string& data) {
  if (!std::filesystem::exists(data)) {
    TANDEM_ASSIGN_OR_RETURN(const Json known, session.call("data.show", {{"data", data}}));
    return known.value("digest", "");
  }
  TANDEM_ASSIGN_OR_RETURN(const Json added, add_data(session, data, ""));
  return added.value("digest", "");
}

/// Draws one event; keeps the losses for the curve at the end.
class Follower {
 public:
  explicit Follower(bool json) : json_(json) {}

  /// False when the job has ended.
  bool show(const Json& event) {
    if (json_) std::cout << event.dump() << std::endl;
    if (event.contains("state") && !event.contains("kind")) {
      end_ = event;
      return false;
    }
    const std::string kind = event.value("kind", "");
    const Json metrics = event.value("metrics", Json::object());
    if (kind == "step") {
      losses_.push_back(metrics.value("loss", 0.0));
      tokens_ += metrics.value("tokens", 0.0);
      seconds_ += metrics.value("seconds", 0.0);
      char text[160];
      std::snprintf(text, sizeof text, "loss %.4f  lr %.2e  %.0f tokens/s",
                    metrics.value("loss", 0.0), metrics.value("learning_rate", 0.0),
                    metrics.value("tokens_per_second", 0.0));
      if (!json_)
        bar_.update(event.value("step", std::int64_t{0}),
                    event.value("total_steps", std::int64_t{0}), text);
    } else if (!json_ && kind == "eval") {
      bar_.finish();
      std::fprintf(stderr, "%s loss %.4f, accuracy %.3f\n",
                   metrics.value("base", false) ? "base: " : "eval:",
                   metrics.value("eval_loss", 0.0), metrics.value("eval_accuracy", 0.0));
    } else if (!json_ && !event.value("message", "").empty()) {
      bar_.finish();
      std::fprintf(stderr, "%s\n", event.value("message", "").c_str());
    }
    return true;
  }

  void summary() {
    bar_.finish();
    if (json_ || losses_.empty()) return;
    std::fprintf(stderr, "loss %s  %.4f -> %.4f, %.0f tokens/s\n", sparkline(losses_, 48).c_str(),
                 losses_.front(), losses_.back(), seconds_ > 0 ? tokens_ / seconds_ : 0.0);
  }
  [[nodiscard]] const Json& end() const { return end_; }

 private:
  const bool json_;
  ProgressBar bar_;
  std::vector<double> losses_;
  double tokens_ = 0, seconds_ = 0;
  Json end_;
};

Status follow(Session& session, const std::string& job) {
  Follower follower(session.json());
  const Interruptible interruptible(false);
  const Status status = session.stream("job.watch", {{"job", job}}, [&](const Json& event) {
    return follower.show(event) && !Interruptible::interrupted();
  });
  follower.summary();
  if (Interruptible::interrupted()) {
    if (!session.json())
      std::fprintf(stderr, "detached; the job goes on: tandem job watch %s\n", job.c_str());
    return {};
  }
  TANDEM_RETURN_IF_ERROR(status);
  const std::string state = follower.end().value("state", "");
  if (state == "done" || state == "succeeded") {
    if (!session.json())
      std::fprintf(stderr, "published as %s: tandem generate --model %s --prompt ...\n",
                   field(follower.end(), "adapter").c_str(),
                   field(follower.end(), "adapter").c_str());
    return {};
  }
  if (state == "cancelled") return cancelled_error(str("job ", job, " was cancelled"));
  return internal_error(
      str("job ", job, " ", state.empty() ? "ended" : state, ": ", field(follower.end(), "error")));
}

}  // namespace

Status run_train(Session& session, const TrainOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const JobRequest request, merge(options));
  for (const auto& [flag, value] : {std::pair{"--model", request.model}, {"--data", request.data}})
    if (value.empty())
      return invalid_error(str("tandem train needs ", flag, " (or the same in the job file)"));
  Json spec{{"model", request.model},
            {"adapter", request.adapter},
            {"priority", request.priority},
            {"train", request.train}};
  if (!request.name.empty()) spec["name"] = request.name;
  Json named = spec;
  named["dataset"] = "uploaded below";
  TANDEM_RETURN_IF_ERROR(protocol::JobSpec::parse(named.dump()).status());
  TANDEM_RETURN_IF_ERROR(check_data(session, request).status());
  TANDEM_ASSIGN_OR_RETURN(spec["dataset"], resolve_data(session, request.data));
  if (!request.eval_data.empty()) {
    TANDEM_ASSIGN_OR_RETURN(spec["eval_dataset"], resolve_data(session, request.eval_data));
  }
  TANDEM_ASSIGN_OR_RETURN(const Json job, session.call("job.submit", {{"spec", spec}}));
  const std::string id = job.value("job", "");
  if (session.json())
    std::cout << job.dump() << std::endl;
  else
    std::cout << id << " " << field(job, "state") << "\n";
  if (options.follow) return follow(session, id);
  if (!session.json()) std::cout << "follow it with: tandem job watch " << id << "\n";
  return {};
}

Status run_job_watch(Session& session, const std::string& job) {
  return follow(session, job);
}

Status run_job_logs(Session& session, const std::string& job) {
  return session.stream("job.logs", {{"job", job}}, [&](const Json& event) {
    if (session.json())
      std::cout << event.dump() << "\n";
    else if (event.contains("line"))
      std::cout << event.value("line", "") << "\n";
    return true;
  });
}

Status run_job_action(Session& session, const std::string& action, const std::string& job,
                      const std::map<std::string, std::string>& layout) {
  Json params{{"job", job}};
  for (const auto& [name, value] : layout) params["layout"][name] = scalar_value(value, false);
  TANDEM_ASSIGN_OR_RETURN(const Json result, session.call("job." + action, params));
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << field(result, "job") << " " << field(result, "state") << "\n";
  return {};
}

Status run_estimate(Session& session, const TrainOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const JobRequest request, merge(options));
  if (request.model.empty()) return invalid_error("tandem estimate needs --model");
  for (const std::string& name : {request.data, request.eval_data})
    if (!name.empty() && !std::filesystem::exists(name))
      TANDEM_RETURN_IF_ERROR(session.call("data.show", {{"data", name}}).status());
  TANDEM_ASSIGN_OR_RETURN(const Json data, check_data(session, request));
  Json params{{"model", request.model}, {"train", request.train}};
  if (!request.eval_data.empty()) params["eval_data"] = true;
  TANDEM_ASSIGN_OR_RETURN(Json result, session.call("estimate", params));
  if (!data.is_null()) result["data"] = data;
  if (session.json()) {
    std::cout << result.dump() << "\n";
    return {};
  }
  if (const Json layouts = result.value("layouts", Json::array()); !layouts.empty()) {
    Table speeds({"layout", "tokens/s", "bubble", "largest rank", ""});
    for (const Json& l : layouts)
      speeds.add({l.value("name", ""),
                  str(static_cast<std::int64_t>(l.value("tokens_per_second", 0.0))),
                  str(static_cast<int>(100.0 * l.value("bubble_seconds", 0.0) /
                                       l.value("step_seconds", 1.0)),
                      " %"),
                  format_bytes(l.value("peak_bytes", std::int64_t{0})),
                  l.value("fits", false) ? "" : "does not fit"});
    std::cout << speeds.to_string() << "chosen: " << result.value("layout_name", "") << "\n\n";
  }
  Table table({"kind", "bytes", ""});
  const Json kinds = result.value("by_kind", Json::object());
  for (const auto& [kind, bytes] : kinds.items())
    if (bytes.is_number_integer())
      table.add({kind, bytes.dump(), format_bytes(bytes.get<std::int64_t>())});
  const Json ranks = result.value("ranks", Json::array());
  for (std::size_t rank = 0; rank < ranks.size(); ++rank)
    if (const auto peak = ranks[rank].value("peak_total", std::int64_t{0}); peak > 0)
      table.add({str("rank ", rank), str(peak), format_bytes(peak)});
  std::cout << table.to_string() << (ranks.empty() ? "peak " : "largest rank and engine ")
            << bytes_field(result, "peak_bytes") << " of "
            << bytes_field(result, result.contains("device_bytes") ? "device_bytes" : "limit_bytes")
            << (result.value("fits", false) ? ": fits\n" : ": does not fit\n");
  if (const std::string pool = result.value("pool", ""); !pool.empty())
    std::cout << "not on this pool: " << pool << "\n";
  if (!data.is_null())
    std::cout << field(data, "steps") << " steps, " << field(data, "steps_per_epoch")
              << " an epoch: " << field(data, "rows") << " rows, " << field(data, "tokens")
              << " tokens, " << field(data, "trained_tokens") << " of them trained\n";
  return {};
}

}  // namespace tandem::tools
