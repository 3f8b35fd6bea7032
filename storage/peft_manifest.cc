#include "storage/peft_manifest.h"

#include "storage/gguf.h"
#include "storage/json_strict.h"

#include <algorithm>
#include <set>

namespace tandem::storage {
namespace {

constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kEndingA = ".lora_A.weight";
constexpr std::string_view kEndingB = ".lora_B.weight";

Json settings_of(const PeftConfig& config, std::span<const AdapterTensors> sites,
                 const Digest& base_model) {
  std::set<std::string> modules(config.target_modules.begin(), config.target_modules.end());
  if (modules.empty())
    for (const AdapterTensors& site : sites)
      modules.insert(site.site.substr(site.site.rfind('.') + 1));
  Json settings{{"base_model", base_model.hex()},
                {"lora_alpha", config.lora_alpha},
                {"r", config.r},
                {"target_modules", modules},
                {"use_rslora", config.use_rslora}};
  if (!config.rank_pattern.empty()) settings["rank_pattern"] = config.rank_pattern;
  if (!config.alpha_pattern.empty()) settings["alpha_pattern"] = config.alpha_pattern;
  return settings;
}

void add_tensor(const TensorInfo& tensor, Manifest& manifest, AdapterImport& import) {
  manifest.tensors.push_back(
      describe_tensor(tensor.name, dtype_name(tensor.dtype), tensor.shape, tensor.bytes));
  const std::size_t leaf = kDigestLeafBytes;
  const auto& chunks = manifest.tensors.back().chunks;
  for (std::size_t i = 0; i < chunks.size(); ++i)
    import.chunks.push_back(
        {chunks[i],
         tensor.bytes.subspan(i * leaf, std::min(leaf, tensor.bytes.size() - i * leaf))});
}

}  // namespace

Result<AdapterImport> import_adapter(const PeftAdapter& adapter, const Digest& base_model) {
  Manifest manifest;
  manifest.kind = ManifestKind::kAdapter;
  AdapterImport import;
  for (const AdapterTensors& site : adapter.sites) {
    add_tensor(site.a, manifest, import);
    add_tensor(site.b, manifest, import);
  }
  manifest.settings_json = settings_of(adapter.config, adapter.sites, base_model).dump();
  TANDEM_ASSIGN_OR_RETURN(import.manifest, encode_manifest(manifest));
  import.digest = manifest_digest(import.manifest);
  return import;
}

namespace {

constexpr char kSettings[] = "the adapter's settings";

/// Throws what the JSON library throws when a field is missing or of another type.
PeftConfig config_of(const Json& settings) {
  PeftConfig config;
  config.r = whole_number(settings.at("r"));
  config.lora_alpha = settings.at("lora_alpha").get<double>();
  config.use_rslora = settings.value("use_rslora", false);
  config.target_modules = settings.value("target_modules", std::vector<std::string>{});
  const Json ranks = settings.value("rank_pattern", Json::object());
  for (const auto& [name, rank] : ranks.items()) config.rank_pattern[name] = whole_number(rank);
  config.alpha_pattern = settings.value("alpha_pattern", std::map<std::string, double>{});
  return config;
}
Status unreadable(const std::exception& error) {
  return invalid_error(str(kSettings, " cannot be read: ", error.what()));
}

Result<AdapterExport> read_settings(const std::string& text) {
  AdapterExport out;
  TANDEM_ASSIGN_OR_RETURN(const Json settings, parse_json_strict(text, kSettings));
  try {
    TANDEM_ASSIGN_OR_RETURN(out.base_model,
                            Digest::parse(settings.at("base_model").get<std::string>()));
    out.config = config_of(settings);
  } catch (const std::exception& error) {
    return unreadable(error);
  }
  return out;
}

Result<std::vector<std::byte>> fetch_tensor(
    const ManifestTensor& tensor,
    const std::function<Result<std::vector<std::byte>>(const Digest&)>& fetch) {
  std::vector<std::byte> bytes;
  for (const Digest& chunk : tensor.chunks) {
    TANDEM_ASSIGN_OR_RETURN(const auto part, fetch(chunk));
    if (sha256(part) != chunk)
      return corrupt_error(
          str("tensor ", tensor.name, ": a chunk does not match its digest ", chunk));
    bytes.insert(bytes.end(), part.begin(), part.end());
  }
  if (static_cast<std::int64_t>(bytes.size()) != tensor.bytes)
    return corrupt_error(str("tensor ", tensor.name, ": ", bytes.size(),
                             " bytes, its manifest says ", tensor.bytes));
  return bytes;
}

}  // namespace

Result<PeftConfig> lora_config(const std::string& settings_json) {
  TANDEM_ASSIGN_OR_RETURN(const Json settings, parse_json_strict(settings_json, kSettings));
  try {
    return config_of(settings);
  } catch (const std::exception& error) {
    return unreadable(error);
  }
}

namespace {

/// As strict as with the configuration of a PEFT folder.
Result<PeftConfig> strict_config(const std::string& settings_json) {
  TANDEM_RETURN_IF_ERROR(lora_config(settings_json).status());
  TANDEM_ASSIGN_OR_RETURN(Json settings, parse_json_strict(settings_json, kSettings));
  settings.erase("base_model");
  settings["peft_type"] = "LORA";
  return parse_peft_config(settings.dump(), kSettings);
}

}  // namespace

Status check_adapter_fits(const Manifest& adapter, const Manifest& base) {
  TANDEM_ASSIGN_OR_RETURN(const PeftConfig config, strict_config(adapter.settings_json));
  std::map<std::string, std::vector<std::int64_t>> layers;
  for (const ManifestTensor& tensor : base.tensors)
    if (tensor.shape.size() == 2)
      layers[gguf_to_hf_name(tensor.name).value_or(tensor.name)] = tensor.shape;
  std::map<std::string, AdapterTensors> sites;
  for (const ManifestTensor& tensor : adapter.tensors) {
    const bool is_a = tensor.name.ends_with(kEndingA);
    std::string site = tensor.name;
    if (site.starts_with(kPrefix) && (is_a || site.ends_with(kEndingB)))
      site = site.substr(kPrefix.size(), site.size() - kPrefix.size() - kEndingA.size());
    const auto layer = layers.find(site + ".weight");
    if (layer == layers.end() || !site.starts_with("model.layers."))
      return refused_error(
          str("adapter tensor ", tensor.name, " matches no linear layer of this model"));
    if (const auto dtype = parse_dtype(tensor.dtype); !dtype || !is_stored_float(*dtype))
      return refused_error(str("adapter tensor ", tensor.name, " has dtype ", tensor.dtype,
                               "; f32, bf16 and f16 are supported"));
    const std::int64_t out = layer->second[0], in = layer->second[1];
    const std::int64_t rank = tensor.shape.size() == 2 ? tensor.shape[is_a ? 0 : 1] : 0;
    using Shape = std::vector<std::int64_t>;
    if (rank < 1 || tensor.shape != (is_a ? Shape{rank, in} : Shape{out, rank}))
      return refused_error(str("adapter tensor ", tensor.name, " has shape ",
                               Json(tensor.shape).dump(), ", this model needs ",
                               is_a ? str("[r,", in, "]") : str("[", out, ",r]")));
    sites[site].site = site;
    (is_a ? sites[site].a : sites[site].b) = {
        tensor.name, *parse_dtype(tensor.dtype), tensor.shape, {}};
  }
  for (const auto& [name, site] : sites)
    TANDEM_RETURN_IF_ERROR(check_site(site, config, "the adapter"));
  return sites.empty() ? refused_error("the adapter has no tensors") : Status();
}

Result<AdapterExport> export_adapter(
    std::string_view text,
    const std::function<Result<std::vector<std::byte>>(const Digest&)>& fetch) {
  TANDEM_ASSIGN_OR_RETURN(const Manifest manifest, parse_manifest(text));
  if (manifest.kind != ManifestKind::kAdapter)
    return invalid_error(
        str("a manifest of kind ", manifest_kind_name(manifest.kind), " is not an adapter's"));
  TANDEM_ASSIGN_OR_RETURN(AdapterExport out, read_settings(manifest.settings_json));
  std::map<std::string, AdapterTensors> sites;
  for (const ManifestTensor& tensor : manifest.tensors) {
    const bool is_a = tensor.name.ends_with(kEndingA);
    const auto dtype = parse_dtype(tensor.dtype);
    if (!tensor.name.starts_with(kPrefix) || (!is_a && !tensor.name.ends_with(kEndingB)) ||
        tensor.name.size() <= kPrefix.size() + kEndingA.size() || !dtype)
      return invalid_error(
          str("the tensor ", tensor.name, " (", tensor.dtype, ") is not a LoRA tensor"));
    TANDEM_ASSIGN_OR_RETURN(auto bytes, fetch_tensor(tensor, fetch));
    out.buffers.push_back(std::make_shared<const std::vector<std::byte>>(std::move(bytes)));
    const std::string name =
        tensor.name.substr(kPrefix.size(), tensor.name.size() - kPrefix.size() - kEndingA.size());
    AdapterTensors& site = sites[name];
    site.site = name;
    (is_a ? site.a : site.b) = TensorInfo{tensor.name, *dtype, tensor.shape, *out.buffers.back()};
  }
  for (auto& [name, site] : sites) {
    if (site.a.shape.size() != 2 || site.b.shape.size() != 2 || site.a.shape[0] < 1)
      return invalid_error(str("the site ", name, " lacks lora_A or lora_B"));
    site.scale = out.config.scale(name, site.a.shape[0]);
    out.sites.push_back(std::move(site));
  }
  return out;
}

}  // namespace tandem::storage
