#include "storage/peft.h"

#include "storage/file_io.h"
#include "storage/json_strict.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>

namespace tandem::storage {
namespace {

constexpr const char* kPrefix = "base_model.model.";
constexpr const char* kEndingA = ".lora_A.weight";
constexpr const char* kEndingB = ".lora_B.weight";

const std::set<std::string> kHandled{"peft_type",
                                     "task_type",
                                     "base_model_name_or_path",
                                     "r",
                                     "lora_alpha",
                                     "lora_dropout",
                                     "use_rslora",
                                     "target_modules",
                                     "rank_pattern",
                                     "alpha_pattern",
                                     "init_lora_weights",
                                     "bias"};
// Says how it was trained or where it came from; an adapter's tensors already hold the outcome.
const std::set<std::string> kIgnored{"auto_mapping",   "peft_version",       "revision",
                                     "inference_mode", "exclude_modules",    "layers_to_transform",
                                     "layers_pattern", "megatron_core",      "eva_config",
                                     "lora_ga_config", "velora_config",      "qalora_group_size",
                                     "runtime_config", "ensure_weight_tying"};
// Changes the mathematics wherever it is not neutral: false, null, or empty.
const std::set<std::string> kNeutralOnly{"use_dora",
                                         "use_qalora",
                                         "use_bdlora",
                                         "fan_in_fan_out",
                                         "lora_bias",
                                         "modules_to_save",
                                         "megatron_config",
                                         "trainable_token_indices",
                                         "loftq_config",
                                         "corda_config",
                                         "alora_invocation_tokens",
                                         "monteclora_config",
                                         "layer_replication",
                                         "target_parameters",
                                         "arrow_config",
                                         "kasa_config"};

bool is_neutral(const Json& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) ||
         (value.is_structured() && value.empty());
}

/// A pattern key without regular-expression characters: what PEFT matches then is a whole name, or
/// its end after a dot ("^" in front: a whole name only).
bool is_plain_key(const std::string& key) {
  return !key.empty() && key.find_first_of("*+?()[]{}|\\$", 0) == std::string::npos &&
         key.find('^', 1) == std::string::npos;
}

bool key_matches(std::string_view key, std::string_view site) {
  if (key.starts_with('^')) return site == key.substr(1);
  return site == key || (site.size() > key.size() && site.ends_with(key) &&
                         site[site.size() - key.size() - 1] == '.');
}

template <class Map>
const typename Map::mapped_type* find_pattern(const Map& patterns, const std::string& site) {
  for (const auto& [key, value] : patterns)
    if (key_matches(key, site)) return &value;
  return nullptr;
}

Status read_targets(const Json& value, const std::string& what, PeftConfig& config) {
  if (value.is_null()) return {};
  if (value.is_string()) {
    config.all_linear = value == "all-linear";
    if (!config.all_linear) config.target_pattern = value.get<std::string>();
    return {};
  }
  if (!value.is_array())
    return invalid_error(what + ": target_modules is neither a list nor a string");
  for (const Json& name : value) {
    if (!name.is_string())
      return invalid_error(what + ": target_modules holds something that is not a string");
    config.target_modules.push_back(name.get<std::string>());
  }
  std::sort(config.target_modules.begin(), config.target_modules.end());
  return {};
}

template <class T>
Status read_patterns(const Json& value, const std::string& field, const std::string& what,
                     std::map<std::string, T>& patterns) {
  if (value.is_null()) return {};
  if (!value.is_object()) return invalid_error(what + ": " + field + " is not an object");
  for (const auto& item : value.items()) {
    const std::string& key = item.key();
    const Json& number = item.value();
    if (!number.is_number() || (std::is_integral_v<T> && !number.is_number_integer()) ||
        !(number.get<double>() > 0))
      return invalid_error(str(what, ": ", field, " of ", key, " is not a positive number"));
    if (!is_plain_key(key))
      return refused_error(str(what, ": ", field, " \"", key,
                               "\" is a regular expression; only module names are supported"));
    patterns[key] = number.get<T>();
  }
  // PEFT takes the first match in the file's order, which JSON objects do not promise: only what is
  // unambiguous.
  for (const auto& [a, unused_a] : patterns)
    for (const auto& [b, unused_b] : patterns)
      if (a != b && key_matches(a, b) && patterns[a] != patterns[b])
        return refused_error(str(what, ": ", field, " \"", a, "\" and \"", b, "\" overlap"));
  return {};
}

Status check_init(const Json& value, const std::string& what) {
  if (value.is_boolean() || value.is_null()) return {};
  const std::string name = value.is_string() ? value.get<std::string>() : value.dump();
  if (name == "gaussian" || name == "orthogonal" || name == "eva") return {};
  return refused_error(
      str(what, ": init_lora_weights \"", name,
          "\" changes the base weights and is not supported; convert the adapter with PEFT's "
          "save_pretrained(path_initial_model_for_weight_conversion=...)"));
}

Status check_fields(const Json& json, const std::string& what) {
  std::vector<std::string> known;
  for (const auto* set : {&kHandled, &kIgnored, &kNeutralOnly})
    known.insert(known.end(), set->begin(), set->end());
  for (const auto& [field, value] : json.items()) {
    if (kNeutralOnly.contains(field) && !is_neutral(value))
      return refused_error(
          str(what, ": ", field, " ", value.dump().substr(0, 80), " is not supported"));
    if (std::find(known.begin(), known.end(), field) != known.end() || is_neutral(value)) continue;
    const std::string close = nearest_name(field, known);
    return refused_error(str(what, ": the field ", field,
                             " is not known and may change the mathematics",
                             close.empty() ? "" : "; did you mean " + close + "?"));
  }
  return {};
}

Status read_numbers(const Json& json, const std::string& what, PeftConfig& config) {
  const Json r = json.value("r", Json(8));
  if (!r.is_number_integer() || r.get<std::int64_t>() < 1)
    return invalid_error(
        str(what, ": r ", r.dump(), " is not an integer from 1 to ", kLoraRankMax));
  if (r.get<std::int64_t>() > kLoraRankMax)
    return refused_error(
        str(what, ": r ", r.dump(), "; adapters of rank 1 to ", kLoraRankMax, " are served"));
  config.r = r.get<std::int64_t>();
  const Json alpha = json.value("lora_alpha", Json(8));
  if (!alpha.is_number() || !(alpha.get<double>() > 0))
    return invalid_error(str(what, ": lora_alpha ", alpha.dump(), " is not a positive number"));
  config.lora_alpha = alpha.get<double>();
  const Json dropout = json.value("lora_dropout", Json(0.0));
  if (!dropout.is_number() || dropout.get<double>() < 0 || dropout.get<double>() >= 1)
    return invalid_error(str(what, ": lora_dropout ", dropout.dump(), " is not in [0, 1)"));
  config.lora_dropout = dropout.get<double>();
  const Json rslora = json.value("use_rslora", Json(false));
  if (!rslora.is_boolean() && !rslora.is_null())
    return invalid_error(what + ": use_rslora is not a boolean");
  config.use_rslora = rslora.is_boolean() && rslora.get<bool>();
  return {};
}

Result<PeftConfig> read_config(const Json& json, const std::string& what) {
  if (!json.is_object()) return invalid_error(what + ": not a JSON object");
  if (json.value("peft_type", Json()) != Json("LORA"))
    return refused_error(str(what, ": peft_type ", json.value("peft_type", Json()).dump(),
                             " is not supported; LORA is"));
  const Json bias = json.value("bias", Json("none"));
  if (bias != "none" && !bias.is_null())
    return refused_error(str(what, ": bias ", bias.dump(), " is not supported; \"none\" is"));
  TANDEM_RETURN_IF_ERROR(check_fields(json, what));
  PeftConfig config;
  TANDEM_RETURN_IF_ERROR(read_numbers(json, what, config));
  TANDEM_RETURN_IF_ERROR(check_init(json.value("init_lora_weights", Json(true)), what));
  TANDEM_RETURN_IF_ERROR(read_targets(json.value("target_modules", Json()), what, config));
  TANDEM_RETURN_IF_ERROR(
      read_patterns(json.value("rank_pattern", Json()), "rank_pattern", what, config.rank_pattern));
  TANDEM_RETURN_IF_ERROR(read_patterns(json.value("alpha_pattern", Json()), "alpha_pattern", what,
                                       config.alpha_pattern));
  if (const Json name = json.value("base_model_name_or_path", Json()); name.is_string())
    config.base_model_name_or_path = name.get<std::string>();
  const Json task = json.value("task_type", Json());
  if (!task.is_null() && task != "CAUSAL_LM")
    return refused_error(str(what, ": task_type ", task.dump(), " is not supported; CAUSAL_LM is"));
  return config;
}

}  // namespace

std::int64_t PeftConfig::rank(const std::string& site) const {
  const auto* found = find_pattern(rank_pattern, site);
  return found == nullptr ? r : *found;
}

double PeftConfig::scale(const std::string& site, std::int64_t rank) const {
  const auto* found = find_pattern(alpha_pattern, site);
  const double alpha = found == nullptr ? lora_alpha : *found;
  return use_rslora ? alpha / std::sqrt(static_cast<double>(rank))
                    : alpha / static_cast<double>(rank);
}

Result<PeftConfig> parse_peft_config(std::string_view text, const std::string& what) {
  TANDEM_ASSIGN_OR_RETURN(const Json json, parse_json_strict(text, what));
  try {
    return read_config(json, what);
  } catch (const std::exception& error) {
    return invalid_error(str(what, ": ", error.what()));
  }
}

namespace {

std::string shape_text(const TensorInfo& tensor) {
  std::string text;
  for (std::int64_t d : tensor.shape) text += (text.empty() ? "[" : ", ") + std::to_string(d);
  return (text.empty() ? "[" : text) + "]";
}

}  // namespace

Status check_site(const AdapterTensors& site, const PeftConfig& config, const std::string& what) {
  auto wrong = [&](const std::string& message) {
    return invalid_error(str(what, ", site ", site.site, ": ", message));
  };
  for (const TensorInfo* tensor : {&site.a, &site.b}) {
    if (tensor->name.empty()) return wrong("one of lora_A and lora_B is missing");
    if (tensor->shape.size() != 2)
      return wrong(tensor->name + " has shape " + shape_text(*tensor) +
                   "; two dimensions are needed");
    if (tensor->dtype != DType::kF32 && tensor->dtype != DType::kBF16 &&
        tensor->dtype != DType::kF16)
      return wrong(str(tensor->name, " is of type ", dtype_name(tensor->dtype),
                       "; f32, bf16 and f16 are supported"));
  }
  const std::int64_t rank = site.a.shape[0];
  if (rank < 1 || site.a.shape[1] < 1 || site.b.shape[0] < 1)
    return wrong(str("lora_A ", shape_text(site.a), ", lora_B ", shape_text(site.b),
                     ": the rank must be 1 to ", kLoraRankMax));
  if (rank > kLoraRankMax)
    return refused_error(str(what, ", site ", site.site, " has rank ", rank,
                             "; adapters of rank 1 to ", kLoraRankMax, " are served"));
  if (site.b.shape[1] != rank)
    return wrong("lora_A " + shape_text(site.a) + " and lora_B " + shape_text(site.b) +
                 " do not share a rank");
  if (config.rank(site.site) != rank)
    return wrong(
        str("lora_A has rank ", rank, ", the configuration says ", config.rank(site.site)));
  if (!std::isfinite(static_cast<float>(config.scale(site.site, rank))))
    return wrong(str("its scale ", config.scale(site.site, rank), " is no finite f32"));
  const auto& targets = config.target_modules;
  if (!targets.empty() && std::none_of(targets.begin(), targets.end(), [&](const std::string& t) {
        return key_matches(t, site.site);
      }))
    return wrong("target_modules of the configuration does not name it");
  return {};
}

namespace {

/// "base_model.model.SITE.lora_A.weight" -> SITE and which half.
Result<std::pair<std::string, bool>> split_name(const std::string& name, const std::string& what) {
  const std::size_t prefix = std::char_traits<char>::length(kPrefix),
                    ending = std::char_traits<char>::length(kEndingA);
  const bool is_a = name.ends_with(kEndingA), is_b = name.ends_with(kEndingB);
  if (!name.starts_with(kPrefix) || (!is_a && !is_b) || name.size() <= prefix + ending)
    return invalid_error(str(what, ": the tensor ", name,
                             " is not lora_A or lora_B of a linear layer (", kPrefix, "SITE",
                             kEndingA, ")"));
  return std::pair(name.substr(prefix, name.size() - prefix - ending), is_a);
}

/// Those whose exponent is all ones.
template <class Bits>
std::int64_t count_exponents(std::span<const std::byte> from, Bits mask) {
  std::int64_t count = 0;
  for (std::size_t at = 0; at + sizeof(Bits) <= from.size(); at += sizeof(Bits)) {
    Bits bits;
    std::memcpy(&bits, from.data() + at, sizeof bits);
    count += (bits & mask) == mask ? 1 : 0;
  }
  return count;
}

}  // namespace

std::int64_t count_not_finite(std::span<const std::byte> from, DType dtype) {
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
  if (dtype == DType::kF32) return count_exponents<std::uint32_t>(from, 0x7f800000u);
  return count_exponents<std::uint16_t>(from, dtype == DType::kBF16 ? 0x7f80u : 0x7c00u);
}

Result<PeftAdapter> read_peft(const std::string& folder) {
  namespace fs = std::filesystem;
  const std::string config_path = (fs::path(folder) / "adapter_config.json").string();
  const std::string tensors_path = (fs::path(folder) / "adapter_model.safetensors").string();
  TANDEM_ASSIGN_OR_RETURN(const std::string text, read_file(config_path, kAdapterConfigBytesMax));
  PeftAdapter adapter;
  TANDEM_ASSIGN_OR_RETURN(adapter.config, parse_peft_config(text, config_path));
  std::error_code ignored;
  if (!fs::exists(tensors_path, ignored) &&
      fs::exists(fs::path(folder) / "adapter_model.bin", ignored))
    return refused_error(
        folder +
        " holds adapter_model.bin, a pickle, which is never read; save the adapter as safetensors");
  TANDEM_ASSIGN_OR_RETURN(adapter.file, Safetensors::open(tensors_path));
  std::map<std::string, AdapterTensors> sites;
  for (const TensorInfo& tensor : adapter.file.tensors()) {
    TANDEM_ASSIGN_OR_RETURN(const auto parts, split_name(tensor.name, tensors_path));
    AdapterTensors& site = sites[parts.first];
    site.site = parts.first;
    (parts.second ? site.a : site.b) = tensor;
  }
  if (sites.empty()) return invalid_error(tensors_path + ": no tensors");
  for (auto& [name, site] : sites) {
    TANDEM_RETURN_IF_ERROR(check_site(site, adapter.config, tensors_path));
    for (const TensorInfo* tensor : {&site.a, &site.b})
      if (const auto bad = count_not_finite(tensor->bytes, tensor->dtype); bad > 0)
        return invalid_error(str(tensors_path, ": ", tensor->name, " holds ", bad,
                                 " values that are infinite or no numbers, of ", tensor->numel()));
    site.scale = adapter.config.scale(name, site.a.shape[0]);
    adapter.sites.push_back(std::move(site));
  }
  return adapter;
}

namespace {

Json config_json(const PeftConfig& config) {
  Json json{
      {"alpha_pattern", config.alpha_pattern},
      {"auto_mapping", nullptr},
      {"base_model_name_or_path",
       config.base_model_name_or_path.empty() ? Json() : Json(config.base_model_name_or_path)},
      {"bias", "none"},
      {"fan_in_fan_out", false},
      {"inference_mode", true},
      {"init_lora_weights", true},
      {"lora_alpha", config.lora_alpha},
      {"lora_dropout", config.lora_dropout},
      {"modules_to_save", nullptr},
      {"peft_type", "LORA"},
      {"r", config.r},
      {"rank_pattern", config.rank_pattern},
      {"layers_to_transform", nullptr},
      {"target_modules", nullptr},
      {"task_type", "CAUSAL_LM"},
      {"use_dora", false},
      {"use_rslora", config.use_rslora}};
  // A whole number is written as one, as PEFT's own files have it.
  if (config.lora_alpha == std::floor(config.lora_alpha) && config.lora_alpha < 1e15)
    json["lora_alpha"] = static_cast<std::int64_t>(config.lora_alpha);
  if (config.all_linear) json["target_modules"] = "all-linear";
  if (!config.target_pattern.empty()) json["target_modules"] = config.target_pattern;
  return json;
}

/// N of "model.layers.N.…"; -1: another site.
std::int64_t layer_of(std::string_view site) {
  constexpr std::string_view kLayers = "model.layers.";
  if (!site.starts_with(kLayers)) return -1;
  site.remove_prefix(kLayers.size());
  std::int64_t layer = -1;
  const auto [end, error] = std::from_chars(site.data(), site.data() + site.size(), layer);
  return error == std::errc() && end != site.data() + site.size() && *end == '.' ? layer : -1;
}

/// Lets target_modules name the sites and no others: with layers_to_transform where these have the
/// same modules, else one by one.
void name_sites(const std::set<std::string>& sites, const std::set<std::string>& modules,
                std::int64_t base_layers, Json& json) {
  if (json["target_modules"].is_string()) return;  // a pattern, or all
  std::set<std::int64_t> layers;
  for (const std::string& site : sites) layers.insert(layer_of(site));
  if (sites.size() != layers.size() * modules.size() || layers.contains(-1)) {
    json["target_modules"] = sites;
    return;
  }
  json["target_modules"] = modules;
  if (static_cast<std::int64_t>(layers.size()) != base_layers) json["layers_to_transform"] = layers;
}

}  // namespace

Status write_peft(const std::string& folder, const PeftConfig& config,
                  std::span<const AdapterTensors> sites, std::int64_t base_layers) {
  std::vector<TensorInfo> tensors;
  std::set<std::string> names, modules;
  if (sites.empty()) return invalid_error("an adapter without tensors");
  for (const AdapterTensors& site : sites) {
    AdapterTensors named = site;
    named.a.name = kPrefix + site.site + kEndingA;
    named.b.name = kPrefix + site.site + kEndingB;
    TANDEM_RETURN_IF_ERROR(check_site(named, config, folder));
    if (site.scale != config.scale(site.site, site.a.shape[0]))
      return invalid_error(str(folder, ", site ", site.site, ": scale ", site.scale,
                               ", the configuration gives ",
                               config.scale(site.site, site.a.shape[0])));
    if (!names.insert(site.site).second)
      return invalid_error(str(folder, ": the site ", site.site, " is given twice"));
    modules.insert(site.site.substr(site.site.rfind('.') + 1));
    tensors.push_back(std::move(named.a));
    tensors.push_back(std::move(named.b));
  }
  std::string text;
  try {
    Json json = config_json(config);
    name_sites(names, modules, base_layers, json);
    text = json.dump(2);
  } catch (const std::exception& error) {
    return invalid_error(str(folder, ": adapter_config.json cannot be written: ", error.what()));
  }
  TANDEM_RETURN_IF_ERROR(make_directories(folder));
  TANDEM_RETURN_IF_ERROR(
      write_safetensors(folder + "/adapter_model.safetensors", tensors, {{"format", "pt"}}));
  return write_file_durably(folder + "/adapter_config.json", text);
}

}  // namespace tandem::storage
