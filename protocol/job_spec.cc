#include "protocol/job_spec.h"

#include "protocol/base/dtype.h"
#include "protocol/base/json_nesting.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>

namespace tandem::protocol {
namespace {

using Json = nlohmann::ordered_json;

/// One settable field: how it is read, checked and written. The table of these is the format.
struct Field {
  std::string name;
  std::function<Status(TrainSettings&, const Json&)> read;
  std::function<Json(const TrainSettings&)> write;
};

Status wrong_type(const std::string& name, const char* expected, const Json& value) {
  return invalid_error(str(name, " must be ", expected, ", not ", value.dump()));
}

/// As a number of 64 bits: 2^64 - 1 is not -1.
bool in_range(const Json& value, std::int64_t low, std::int64_t high) {
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX) return false;
  return value.get<std::int64_t>() >= low && value.get<std::int64_t>() <= high;
}

Field integer(std::string name, std::int64_t TrainSettings::*member, std::int64_t low,
              std::int64_t high) {
  auto read = [=](TrainSettings& s, const Json& value) -> Status {
    if (!value.is_number_integer()) return wrong_type(name, "an integer", value);
    if (!in_range(value, low, high))
      return invalid_error(str(name, " must be in ", low, "..", high, ", not ", value.dump()));
    s.*member = value.get<std::int64_t>();
    return {};
  };
  return {name, read, [=](const TrainSettings& s) { return Json(s.*member); }};
}

struct Range {
  double low, high;
  bool low_open = false, high_open = false;
};

Field real(std::string name, double TrainSettings::*member, Range range) {
  auto read = [=](TrainSettings& s, const Json& value) -> Status {
    if (!value.is_number()) return wrong_type(name, "a number", value);
    const double number = value.get<double>();
    const bool low_ok = range.low_open ? number > range.low : number >= range.low;
    const bool high_ok = range.high_open ? number < range.high : number <= range.high;
    if (!std::isfinite(number) || !low_ok || !high_ok)
      return invalid_error(str(name, " must be in ", range.low_open ? "(" : "[", range.low, ", ",
                               range.high, range.high_open ? ")" : "]", ", not ", value.dump()));
    s.*member = number;
    return {};
  };
  return {name, read, [=](const TrainSettings& s) { return Json(s.*member); }};
}

Field boolean(std::string name, bool TrainSettings::*member) {
  auto read = [=](TrainSettings& s, const Json& value) -> Status {
    if (value.is_string()) {  // as YAML 1.1 and Python have it
      const auto word = value.get<std::string>();
      const auto is_one_of = [&](std::initializer_list<const char*> words) {
        return std::find(words.begin(), words.end(), word) != words.end();
      };
      const bool yes = is_one_of({"on", "On", "ON", "yes", "Yes", "YES", "True", "TRUE"});
      if (yes || is_one_of({"off", "Off", "OFF", "no", "No", "NO", "False", "FALSE"})) {
        s.*member = yes;
        return {};
      }
    }
    if (!value.is_boolean()) return wrong_type(name, "true or false", value);
    s.*member = value.get<bool>();
    return {};
  };
  return {name, read, [=](const TrainSettings& s) { return Json(s.*member); }};
}

template <class T>
Field choice(std::string name, T TrainSettings::*member,
             std::vector<std::pair<std::string, T>> options) {
  auto read = [=](TrainSettings& s, const Json& value) -> Status {
    std::string known;
    for (const auto& [text, option] : options) {
      if (value.is_string() && value.get<std::string>() == text) {
        s.*member = option;
        return {};
      }
      known += (known.empty() ? "" : ", ") + text;
    }
    const std::string meant =
        name.ends_with("dtype") && value.is_string() ? meant_dtype(value.get<std::string>()) : "";
    return invalid_error(str(name, " must be one of ", known, "; not ", value.dump(),
                             meant.empty() ? "" : str("; did you mean \"", meant, "\"?")));
  };
  auto write = [=](const TrainSettings& s) {
    for (const auto& [text, option] : options)
      if (s.*member == option) return Json(text);
    return Json();
  };
  return {name, read, write};
}

Field words(std::string name, std::vector<std::string> options,
            std::string TrainSettings::*member) {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (auto& option : options) pairs.emplace_back(option, option);
  return choice<std::string>(std::move(name), member, std::move(pairs));
}

Field name_list(std::string name, std::vector<std::string> TrainSettings::*member) {
  auto read = [=](TrainSettings& s, const Json& value) -> Status {
    std::vector<std::string> names;
    if (value.is_string())
      names.push_back(value.get<std::string>());
    else if (value.is_array())
      for (const auto& item : value) {
        if (!item.is_string()) return wrong_type(name, "a list of names", value);
        names.push_back(item.get<std::string>());
      }
    if (names.empty()) return wrong_type(name, "a name or a non-empty list of names", value);
    s.*member = std::move(names);
    return {};
  };
  return {name, read, [=](const TrainSettings& s) { return Json(s.*member); }};
}

const std::vector<Field>& fields() {
  using S = TrainSettings;
  constexpr double kInf = 1e30;
  constexpr std::int64_t kBig = std::int64_t{1} << 40;
  static const std::vector<Field> table{
      words("method", {"lora", "full"}, &S::method),
      integer("lora_r", &S::lora_r, 1, kLoraRankMax),
      real("lora_alpha", &S::lora_alpha, {0, kInf, true}),
      real("lora_dropout", &S::lora_dropout, {0, 1, false, true}),
      boolean("use_rslora", &S::use_rslora),
      name_list("target_modules", &S::target_modules),
      real("learning_rate", &S::learning_rate, {0, 10, true}),
      real("weight_decay", &S::weight_decay, {0, 10}),
      real("adam_beta1", &S::adam_beta1, {0, 1, false, true}),
      real("adam_beta2", &S::adam_beta2, {0, 1, false, true}),
      real("adam_epsilon", &S::adam_epsilon, {0, 1, true}),
      real("max_grad_norm", &S::max_grad_norm, {0, kInf}),
      choice<Schedule>("lr_scheduler_type", &S::lr_scheduler_type,
                       {{"cosine", Schedule::kCosine},
                        {"linear", Schedule::kLinear},
                        {"constant", Schedule::kConstant}}),
      real("warmup_ratio", &S::warmup_ratio, {0, 1}),
      integer("warmup_steps", &S::warmup_steps, 0, kBig),
      real("num_train_epochs", &S::num_train_epochs, {0, 1e6, true}),
      integer("max_steps", &S::max_steps, 0, kBig),
      integer("seed", &S::seed, 0, INT64_MAX),
      integer("per_device_train_batch_size", &S::per_device_train_batch_size, 1, 65536),
      integer("gradient_accumulation_steps", &S::gradient_accumulation_steps, 1, 4096),
      integer("max_length", &S::max_length, 8, 1 << 20),
      boolean("packing", &S::packing),
      choice<OverLength>("over_length", &S::over_length,
                         {{"raise", OverLength::kRaise},
                          {"drop", OverLength::kDrop},
                          {"truncate", OverLength::kTruncate}}),
      boolean("train_on_all_tokens", &S::train_on_all_tokens),
      real("eval_split", &S::eval_split, {0, 0.5}),
      integer("eval_steps", &S::eval_steps, 0, kBig),
      integer("save_steps", &S::save_steps, 0, kBig),
      integer("save_total_limit", &S::save_total_limit, 1, 1000),
      integer("logging_steps", &S::logging_steps, 1, kBig),
      words("dtype", {"auto", "f32", "bf16", "f16"}, &S::dtype),
      words("adapter_dtype", {"auto", "f32", "bf16", "f16"}, &S::adapter_dtype),
      words("recompute", {"none", "elementwise", "mlp", "block"}, &S::recompute),
      integer("dp", &S::dp, 1, kRanksMax),
      integer("tp", &S::tp, 1, kRanksMax),
      integer("pp", &S::pp, 1, kRanksMax),
      integer("dp_min", &S::dp_min, 0, kRanksMax),
      integer("zero", &S::zero, 0, 3),
      words("layout", {"manual", "auto"}, &S::layout),
      integer("ranks_max", &S::ranks_max, 0, kRanksMax),
      integer("virtual_pipeline_size", &S::virtual_pipeline_size, 1, kRanksMax),
      words("pipeline_balance", {"compute", "memory"}, &S::pipeline_balance),
      boolean("sequence_parallel", &S::sequence_parallel),
  };
  return table;
}

Result<Json> parse_object(const std::string& json, const char* what) {
  if (json_nests_too_deep(json))
    return invalid_error(str(what, " may nest at most ", kJsonNestingMax, " levels deep"));
  Json value = Json::parse(json, nullptr, false);
  if (value.is_discarded()) return invalid_error(str(what, " is not valid JSON"));
  if (!value.is_object())
    return invalid_error(str(what, " must be an object, not ", value.type_name()));
  return value;
}

constexpr double kFullLearningRate = 2e-5;

Status unknown_field(const std::string& name, const std::vector<std::string>& known) {
  const std::string nearest = nearest_name(name, known);
  return invalid_error(str("unknown setting \"", name, "\"",
                           nearest.empty() ? "" : str("; did you mean \"", nearest, "\"?")));
}

Status read_settings(const Json& object, TrainSettings& settings) {
  for (const auto& [name, value] : object.items()) {
    const Field* found = nullptr;
    for (const Field& field : fields())
      if (field.name == name) found = &field;
    if (!found) return unknown_field(name, TrainSettings::field_names());
    TANDEM_RETURN_IF_ERROR(found->read(settings, value));
  }
  if (settings.full() && !object.contains("learning_rate"))
    settings.learning_rate = kFullLearningRate;
  TANDEM_RETURN_IF_ERROR(settings.check_method());
  return settings.check_layout();
}

/// What came after protocol 1.2. An older worker refuses what it does not know, so these are named
/// only where they say something.
bool is_recent(const std::string& field) {
  static const std::set<std::string> names{"dp_min",           "layout",
                                           "ranks_max",        "virtual_pipeline_size",
                                           "pipeline_balance", "sequence_parallel"};
  return names.contains(field);
}

Json settings_json(const TrainSettings& settings) {
  static const TrainSettings defaults;
  Json object = Json::object();
  for (const Field& field : fields())
    if (Json value = field.write(settings);
        !is_recent(field.name) || value != field.write(defaults))
      object[field.name] = std::move(value);
  return object;
}

Status read_text(const Json& value, const std::string& name, std::string& out) {
  if (!value.is_string()) return wrong_type(name, "a string", value);
  out = value.get<std::string>();
  return {};
}

}  // namespace

Status TrainSettings::check_method() const {
  if (!full()) return {};
  const TrainSettings plain;
  for (const auto& [field, given] : {std::pair{"lora_r", lora_r != plain.lora_r},
                                     {"lora_alpha", lora_alpha != plain.lora_alpha},
                                     {"lora_dropout", lora_dropout != plain.lora_dropout},
                                     {"use_rslora", use_rslora != plain.use_rslora},
                                     {"target_modules", target_modules != plain.target_modules}})
    if (given)
      return refused_error(str(field,
                               " is of method \"lora\"; method \"full\" trains every weight, "
                               "leave it out"));
  return {};
}

Status TrainSettings::check_layout() const {
  const std::string name = str("dp ", dp, " x tp ", tp, " x pp ", pp);
  if (layout == "auto" && (ranks() > 1 || zero > 0 || virtual_pipeline_size > 1))
    return refused_error(
        str("layout auto chooses dp, tp, pp, zero and virtual_pipeline_size, and here they are ",
            name, ", zero ", zero, ", virtual_pipeline_size ", virtual_pipeline_size,
            "; leave them out, or set layout to manual"));
  if (ranks() > kRanksMax)
    return refused_error(str(name, " are ", ranks(), " ranks; a job has at most ", kRanksMax));
  if (zero > 0 && dp == 1)
    return refused_error(str("zero ", zero,
                             " shards over data-parallel ranks, and dp is 1; set dp "
                             "to 2 or more, or zero to 0"));
  if (gradient_accumulation_steps % dp != 0) {
    const std::int64_t fewer = std::gcd(gradient_accumulation_steps, dp);
    const bool allowed = fewer >= dp_min && (fewer > 1 || zero == 0);
    return refused_error(
        str("dp ", dp, " shares the micro-batches of a step, and gradient_accumulation_steps is ",
            gradient_accumulation_steps, ", not a multiple of ", dp,
            "; set gradient_accumulation_steps to ", (gradient_accumulation_steps / dp + 1) * dp,
            allowed ? str(", or dp to ", fewer) : std::string()));
  }
  if (virtual_pipeline_size > 1 && pp == 1)
    return refused_error(str("virtual_pipeline_size ", virtual_pipeline_size,
                             " cuts the stages of a pipeline, and pp is 1; set pp to 2 or more, or "
                             "virtual_pipeline_size to 1"));
  if (virtual_pipeline_size > 1 && gradient_accumulation_steps / dp < pp)
    return refused_error(str(
        "virtual_pipeline_size ", virtual_pipeline_size, " needs a micro-batch for each of pp ", pp,
        " ranks, and gradient_accumulation_steps ", gradient_accumulation_steps, " gives dp ", dp,
        " ranks ", gradient_accumulation_steps / dp, " each; set gradient_accumulation_steps to ",
        pp * dp, ", or virtual_pipeline_size to 1"));
  if (dp_min > 0) {
    const std::int64_t least = zero > 0 ? 2 : 1;
    if (dp_min > dp || dp_min < least || gradient_accumulation_steps % dp_min != 0)
      return refused_error(str("dp_min ", dp_min, " must be ", least,
                               zero > 0 ? " (zero shards over two at least)" : "", " to dp (", dp,
                               ") and divide gradient_accumulation_steps (",
                               gradient_accumulation_steps, ")"));
  }
  if (tp > 1 && lora_dropout > 0)
    return refused_error(str("lora_dropout ", lora_dropout, " over tensor-parallel ranks (tp ", tp,
                             ") is not supported; set lora_dropout to 0, or use ",
                             gradient_accumulation_steps % (dp * tp) == 0
                                 ? str("dp ", dp * tp, " x tp 1 x pp ", pp)
                                 : std::string("tp 1")));
  return {};
}

std::vector<std::int64_t> TrainSettings::dp_choices() const {
  std::vector<std::int64_t> choices{dp};
  for (std::int64_t d = dp - 1; dp_min > 0 && d >= dp_min; --d)
    if (gradient_accumulation_steps % d == 0) choices.push_back(d);
  return choices;
}

Result<TrainSettings> TrainSettings::parse(const std::string& json) {
  TANDEM_ASSIGN_OR_RETURN(const Json object, parse_object(json, "training settings"));
  TrainSettings settings;
  TANDEM_RETURN_IF_ERROR(read_settings(object, settings));
  return settings;
}

std::string TrainSettings::to_json() const {
  return settings_json(*this).dump();
}

std::string TrainSettings::default_of(const std::string& name) {
  for (const Field& field : fields())
    if (field.name == name) return field.write(TrainSettings()).dump();
  return "";
}

const std::vector<std::string>& TrainSettings::field_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const Field& field : fields()) list.push_back(field.name);
    return list;
  }();
  return names;
}

Result<JobSpec> JobSpec::parse(const std::string& json) {
  TANDEM_ASSIGN_OR_RETURN(const Json object, parse_object(json, "a job"));
  JobSpec spec;
  for (const auto& [name, value] : object.items()) {
    if (name == "model")
      TANDEM_RETURN_IF_ERROR(read_text(value, name, spec.model));
    else if (name == "dataset")
      TANDEM_RETURN_IF_ERROR(read_text(value, name, spec.dataset));
    else if (name == "eval_dataset")
      TANDEM_RETURN_IF_ERROR(read_text(value, name, spec.eval_dataset));
    else if (name == "adapter")
      TANDEM_RETURN_IF_ERROR(read_text(value, name, spec.adapter));
    else if (name == "name")
      TANDEM_RETURN_IF_ERROR(read_text(value, name, spec.name));
    else if (name == "priority") {
      if (!value.is_number_integer() || !in_range(value, -100, 100))
        return invalid_error(str("priority must be an integer in -100..100, not ", value.dump()));
      spec.priority = value.get<std::int32_t>();
    } else if (name == "train") {
      if (!value.is_object()) return wrong_type(name, "an object of training settings", value);
      TANDEM_RETURN_IF_ERROR(read_settings(value, spec.train));
    } else {
      return unknown_field(
          name, {"model", "dataset", "eval_dataset", "adapter", "name", "priority", "train"});
    }
  }
  for (const auto& [name, value] :
       {std::pair<const char*, const std::string*>{"model", &spec.model},
        {"dataset", &spec.dataset}})
    if (value->empty()) return invalid_error(str("a job needs a \"", name, "\""));
  const bool full = spec.train.full();
  if (full ? !spec.adapter.empty() : !spec.name.empty())
    return invalid_error(
        full ? str("method \"full\" publishes a model, not an adapter: give its name "
                   "as \"name\" (--name) instead of \"adapter\" (",
                   spec.adapter, ")")
             : str("method \"lora\" publishes an adapter, not a model: give its "
                   "name as \"adapter\" (--adapter) instead of \"name\" (",
                   spec.name, "), or set method to \"full\""));
  if (spec.published_name().empty())
    return invalid_error(
        full ? "a job of method \"full\" needs a \"name\" (--name): the model that "
               "it publishes"
             : "a job needs an \"adapter\" (--adapter): the name it publishes under");
  return spec;
}

std::string JobSpec::to_json() const {
  Json json{{"model", model},     {"dataset", dataset},   {"eval_dataset", eval_dataset},
            {"adapter", adapter}, {"priority", priority}, {"train", settings_json(train)}};
  if (!name.empty()) json["name"] = name;  // an older worker does not know it
  return json.dump();
}

}  // namespace tandem::protocol
