#include "worker/runtime/adapter_codec.h"

#include "storage/peft_manifest.h"
#include "worker/model/peft.h"
#include "worker/runtime/checkpoint_pieces.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

namespace tandem::worker::runtime {
namespace {

using Json = nlohmann::json;

constexpr const char* kPeftPrefix = "base_model.model.";

Result<std::vector<float>> to_floats(std::span<const std::byte> bytes, const std::string& dtype,
                                     const std::string& name) {
  const auto parsed = parse_dtype(dtype);
  if (!parsed || !is_stored_float(*parsed))
    return refused_error(
        str("tensor ", name, " has dtype ", dtype, "; f32, bf16 and f16 are supported"));
  std::vector<float> values(bytes.size() / static_cast<std::size_t>(dtype_bytes(*parsed)));
  load_floats(bytes.data(), *parsed, values);
  return values;
}

/// A tensor to be packed; the bytes are the object's storage.
struct TensorView {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;
};

/// Adds tensors to a manifest and their chunks to the object. `on_blob` hears of each chunk in
/// order, while later ones are still being hashed.
void add_tensors(PackedObject& object, storage::Manifest& manifest, std::vector<TensorView> tensors,
                 int threads, const OnBlob& on_blob = {}) {
  std::vector<std::span<const std::byte>> leaves;
  for (const TensorView& tensor : tensors)
    for (const auto& leaf : digest_leaves(tensor.bytes)) leaves.push_back(leaf);
  object.blobs.reserve(leaves.size());
  sha256_each(leaves, threads, [&](std::size_t i, const Digest& digest) {
    object.blobs.push_back({digest, leaves[i]});
    if (on_blob) on_blob(object.blobs.back(), i + 1 == leaves.size());
  });
  std::size_t next = 0;
  for (TensorView& tensor : tensors) {
    std::vector<Digest> chunks;
    for (std::size_t left = digest_leaves(tensor.bytes).size(); left > 0; --left)
      chunks.push_back(object.blobs[next++].digest);
    manifest.tensors.push_back(storage::describe_hashed(
        std::move(tensor.name), dtype_name(tensor.dtype), std::move(tensor.shape),
        static_cast<std::int64_t>(tensor.bytes.size()), std::move(chunks)));
  }
}

Json lora_settings(const Digest& base_model, const storage::PeftConfig& config) {
  Json settings{{"base_model", base_model.hex()},
                {"r", config.r},
                {"lora_alpha", config.lora_alpha},
                {"use_rslora", config.use_rslora},
                {"target_modules", config.target_modules}};
  if (!config.rank_pattern.empty()) settings["rank_pattern"] = config.rank_pattern;
  if (!config.alpha_pattern.empty()) settings["alpha_pattern"] = config.alpha_pattern;
  return settings;
}

Result<PackedObject> finish(PackedObject object, storage::Manifest& manifest,
                            const Json& settings) {
  manifest.settings_json = settings.dump();
  TANDEM_ASSIGN_OR_RETURN(object.manifest, storage::encode_manifest(manifest));
  object.digest = storage::manifest_digest(object.manifest);
  return object;
}

/// All tensors of a manifest as f32, in the manifest's order.
Result<std::vector<std::vector<float>>> fetch_tensors(const storage::Manifest& manifest,
                                                      const FetchBlobs& fetch) {
  std::vector<Digest> digests;
  for (const auto& tensor : manifest.tensors)
    digests.insert(digests.end(), tensor.chunks.begin(), tensor.chunks.end());
  TANDEM_ASSIGN_OR_RETURN(auto blobs, fetch(digests));
  std::vector<std::vector<float>> tensors;
  std::size_t next = 0;
  for (const auto& tensor : manifest.tensors) {
    std::vector<std::byte> bytes;
    if (!tensor.chunks.empty()) bytes = std::move(blobs[next++]);
    for (std::size_t i = 1; i < tensor.chunks.size(); ++i, ++next)
      bytes.insert(bytes.end(), blobs[next].begin(), blobs[next].end());
    if (static_cast<std::int64_t>(bytes.size()) != tensor.bytes)
      return corrupt_error(str("tensor ", tensor.name, " has ", bytes.size(),
                               " bytes, its manifest says ", tensor.bytes));
    TANDEM_ASSIGN_OR_RETURN(auto values, to_floats(bytes, tensor.dtype, tensor.name));
    if (const auto bad = storage::count_not_finite(bytes, *parse_dtype(tensor.dtype)); bad > 0)
      return invalid_error(str("adapter tensor ", tensor.name, " holds ", bad,
                               " values that are infinite or no numbers, of ", values.size()));
    tensors.push_back(std::move(values));
  }
  return tensors;
}

/// "PATH.lora_A.weight" (adapter) or "PATH.lora_A.param" (checkpoint) -> PATH and 'A' or 'B'.
std::optional<std::pair<std::string, char>> split_name(const std::string& name,
                                                       storage::ManifestKind kind) {
  const bool adapter = kind == storage::ManifestKind::kAdapter;
  std::string path = name;
  if (adapter) {
    if (!path.starts_with(kPeftPrefix)) return std::nullopt;
    path.erase(0, std::strlen(kPeftPrefix));
  }
  for (char half : {'A', 'B'}) {
    const std::string ending = str(".lora_", half, adapter ? ".weight" : ".param");
    if (path.ends_with(ending)) return std::pair{path.substr(0, path.size() - ending.size()), half};
  }
  return std::nullopt;
}

/// Of a checkpoint the adapter's whole tensors alone: moments and pieces are not an adapter's.
Status take_adapter(const std::string& text, const Digest& base_model, const FetchBlobs& fetch,
                    storage::Manifest& manifest, std::vector<std::vector<float>>& values) {
  TANDEM_ASSIGN_OR_RETURN(const auto source, CheckpointSource::open(text, base_model, fetch));
  manifest.tensors.clear();
  for (const auto& [name, shape] : source->shapes()) {
    if (!split_name(name, manifest.kind)) continue;
    TANDEM_ASSIGN_OR_RETURN(auto tensor, source->whole(name));
    manifest.tensors.push_back({name, dtype_name(DType::kF32), shape, 0, {}, {}});
    values.push_back(std::move(tensor.values));
  }
  return {};
}

Status check_shape(const storage::ManifestTensor& tensor, std::int64_t rows, std::int64_t columns) {
  if (tensor.shape == std::vector<std::int64_t>{rows, columns}) return {};
  std::string actual;
  for (auto d : tensor.shape) actual += (actual.empty() ? "" : ", ") + std::to_string(d);
  return conflict_error(str("tensor ", tensor.name, " has shape [", actual, "], this model needs [",
                            rows, ", ", columns, "]"));
}

}  // namespace

Json checkpoint_settings(const Digest& base_model, const storage::PeftConfig* config) {
  if (config != nullptr) return lora_settings(base_model, *config);
  return {{"base_model", base_model.hex()}, {"method", "full"}};
}

Status check_base(const Json& settings, const Digest& base_model) {
  const std::string base = settings.value("base_model", "");
  if (base == base_model.hex()) return {};
  return conflict_error(
      str("the adapter belongs to base model ", base.substr(0, 12), ", this one is ", base_model));
}

FetchBlobs PackedObject::fetch() const {
  return [this](std::span<const Digest> digests) -> Result<std::vector<std::vector<std::byte>>> {
    std::map<Digest, std::span<const std::byte>> known;
    for (const BlobView& blob : blobs) known[blob.digest] = blob.bytes;
    std::vector<std::vector<std::byte>> found;
    for (const Digest& wanted : digests) {
      const auto bytes = known.find(wanted);
      if (bytes == known.end()) return not_found_error(str("no chunk ", wanted.hex()));
      found.emplace_back(bytes->second.begin(), bytes->second.end());
    }
    return found;
  };
}

storage::PeftConfig peft_config(const model::LoraConfig& lora) {
  storage::PeftConfig config;
  config.r = lora.r;
  config.lora_alpha = lora.lora_alpha;
  config.lora_dropout = lora.lora_dropout;
  config.use_rslora = lora.use_rslora;
  for (model::Site site : lora.target_modules)
    config.target_modules.push_back(model::site_name(site));
  std::sort(config.target_modules.begin(), config.target_modules.end());
  return config;
}

Result<PackedObject> pack_adapter(const Digest& base_model, const storage::PeftConfig& config,
                                  std::shared_ptr<const model::FlatAdapter> adapter,
                                  const OnBlob& on_blob) {
  PackedObject object;
  storage::Manifest manifest;
  manifest.kind = storage::ManifestKind::kAdapter;
  std::vector<TensorView> tensors;
  for (const auto& pair : adapter->layout.pairs) {
    const std::string site = kPeftPrefix + model::site_path(pair.layer, pair.site);
    tensors.push_back({site + ".lora_A.weight",
                       adapter->dtype,
                       {pair.rank, pair.i},
                       adapter->part(pair.a_begin, pair.rank * pair.i)});
    tensors.push_back({site + ".lora_B.weight",
                       adapter->dtype,
                       {pair.n, pair.rank},
                       adapter->part(pair.b_begin, pair.n * pair.rank)});
  }
  add_tensors(object, manifest, std::move(tensors), hash_threads(adapter->bytes.size()), on_blob);
  object.storage = std::move(adapter);
  return finish(std::move(object), manifest, lora_settings(base_model, config));
}

Result<PackedObject> pack_checkpoint(const Digest& base_model, const storage::PeftConfig* config,
                                     std::shared_ptr<const train::TrainState> state) {
  PackedObject object;
  storage::Manifest manifest;
  manifest.kind = storage::ManifestKind::kCheckpoint;
  std::vector<TensorView> tensors;
  for (const auto& t : state->tensors)
    tensors.push_back({t.name, DType::kF32, t.shape, std::as_bytes(std::span(t.values))});
  add_tensors(object, manifest, std::move(tensors), 1);
  Json settings = checkpoint_settings(base_model, config);
  settings["state"] = state->json;
  object.storage = std::move(state);
  return finish(std::move(object), manifest, settings);
}

Result<PackedObject> pack_peft(const Digest& base_model, const storage::PeftAdapter& adapter) {
  PackedObject object;
  storage::Manifest manifest;
  manifest.kind = storage::ManifestKind::kAdapter;
  storage::PeftConfig config = adapter.config;
  std::vector<TensorView> tensors;
  std::set<std::string> modules;  // a pattern or "all-linear" becomes the names it matched
  for (const auto& site : adapter.sites) {
    const std::string path = kPeftPrefix + site.site;
    modules.insert(site.site.substr(site.site.rfind('.') + 1));
    for (const auto& [half, tensor] :
         {std::pair{".lora_A.weight", &site.a}, {".lora_B.weight", &site.b}})
      tensors.push_back({path + half, tensor->dtype, tensor->shape, tensor->bytes});
  }
  add_tensors(object, manifest, std::move(tensors), 1);
  config.target_modules.assign(modules.begin(), modules.end());
  return finish(std::move(object), manifest, lora_settings(base_model, config));
}

Result<storage::PeftConfig> manifest_lora(const storage::Manifest& manifest) {
  auto config = storage::lora_config(manifest.settings_json);
  if (!config.ok()) return corrupt_error("adapter manifest: " + config.status().message());
  if (config->r < 1 || config->r > storage::kLoraRankMax)
    return corrupt_error(
        str("adapter manifest: r ", config->r, " is not in 1..", storage::kLoraRankMax));
  return config;
}

Result<std::vector<model::HostAdapterTensor>> unpack_adapter(const std::string& text,
                                                             const Digest& base_model,
                                                             const model::ModelConfig& model,
                                                             const FetchBlobs& fetch) {
  TANDEM_ASSIGN_OR_RETURN(storage::Manifest manifest, storage::parse_manifest(text));
  TANDEM_ASSIGN_OR_RETURN(const storage::PeftConfig config, manifest_lora(manifest));
  TANDEM_RETURN_IF_ERROR(
      check_base(Json::parse(manifest.settings_json, nullptr, false), base_model));
  std::vector<std::vector<float>> values;
  if (manifest.kind == storage::ManifestKind::kCheckpoint) {
    TANDEM_RETURN_IF_ERROR(take_adapter(text, base_model, fetch, manifest, values));
  } else {
    TANDEM_ASSIGN_OR_RETURN(values, fetch_tensors(manifest, fetch));
  }
  std::map<std::pair<std::int64_t, model::Site>, model::HostAdapterTensor> sites;
  for (std::size_t i = 0; i < manifest.tensors.size(); ++i) {
    const auto& tensor = manifest.tensors[i];
    const auto name = split_name(tensor.name, manifest.kind);
    const auto place = name ? model::parse_site_path(name->first) : std::nullopt;
    if (!place || place->first >= model.layers)
      return conflict_error(str("adapter tensor ", tensor.name, " matches no site of this model (",
                                model.layers, " layers)"));
    const auto shape = model::site_shape(model, place->second);
    auto& site = sites[{place->first, place->second}];
    site.layer = place->first;
    site.site = place->second;
    const std::int64_t rank =
        tensor.shape.size() == 2 ? tensor.shape[name->second == 'A' ? 0 : 1] : -1;
    if (rank < 1 || (site.rank && site.rank != rank))
      return conflict_error(
          str("adapter tensor ", tensor.name, " has rank ", rank, ", its other half ", site.rank));
    site.rank = rank;
    site.scale = static_cast<float>(config.scale(name->first, rank));
    TANDEM_RETURN_IF_ERROR(name->second == 'A' ? check_shape(tensor, rank, shape.i)
                                               : check_shape(tensor, shape.n, rank));
    (name->second == 'A' ? site.a : site.b) = std::move(values[i]);
  }
  std::vector<model::HostAdapterTensor> tensors;
  for (auto& [place, site] : sites) {
    if (site.a.empty() || site.b.empty())
      return conflict_error(str("adapter site ", model::site_path(site.layer, site.site),
                                " lacks lora_", site.a.empty() ? "A" : "B"));
    tensors.push_back(std::move(site));
  }
  if (tensors.empty()) return conflict_error("the adapter has no tensors");
  return tensors;
}

Result<train::TrainState> unpack_checkpoint(const std::string& text, const Digest& base_model,
                                            const FetchBlobs& fetch) {
  TANDEM_ASSIGN_OR_RETURN(const auto source, CheckpointSource::open(text, base_model, fetch));
  train::TrainState state;
  state.json = source->state_json();
  for (const auto& [name, shape] : source->shapes()) {
    TANDEM_ASSIGN_OR_RETURN(state.tensors.emplace_back(), source->whole(name));
  }
  return state;
}

}  // namespace tandem::worker::runtime
