#include "storage/manifest.h"

#include "protocol/base/dtype.h"
#include "storage/gguf.h"
#include "storage/json_strict.h"
#include "storage/safetensors.h"

#include <algorithm>
#include <array>
#include <optional>

namespace tandem::storage {
namespace {

constexpr int kManifestFormat = 1;

std::optional<ManifestKind> parse_kind(std::string_view name) {
  for (ManifestKind kind : {ManifestKind::kModel, ManifestKind::kAdapter, ManifestKind::kCheckpoint,
                            ManifestKind::kDataset})
    if (name == manifest_kind_name(kind)) return kind;
  return {};
}

struct Block {
  std::int64_t elements, bytes;
};

/// Elements and bytes of the smallest unit of an element type; nothing for an unknown name.
std::optional<Block> block_of(std::string_view dtype) {
  if (const auto plain = parse_dtype(dtype)) return Block{1, dtype_bytes(*plain)};
  for (GgufType type : {GgufType::kQ4_0, GgufType::kQ4_1, GgufType::kQ5_0, GgufType::kQ5_1,
                        GgufType::kQ8_0, GgufType::kQ4_K, GgufType::kQ5_K, GgufType::kQ6_K})
    if (dtype == gguf_type_name(type))
      return Block{gguf_block_elements(type), gguf_block_bytes(type)};
  return {};
}

Status check_tensor(const ManifestTensor& tensor) {
  auto wrong = [&](const std::string& what) {
    return invalid_error("tensor " + tensor.name + ": " + what);
  };
  if (tensor.name.empty() || tensor.name.size() > kTensorNameBytesMax)
    return wrong("a name of 1 to 1024 bytes is needed");
  const auto block = block_of(tensor.dtype);
  if (!block) return wrong("unknown dtype " + tensor.dtype);
  if (tensor.shape.size() > kTensorRankMax) return wrong("too many dimensions");
  auto numel = checked_numel(tensor.shape, block->bytes);
  if (!numel.ok()) return wrong(numel.status().message());
  if (*numel % block->elements != 0 || tensor.bytes != *numel / block->elements * block->bytes)
    return wrong(str("shape and dtype do not give ", tensor.bytes, " bytes"));
  const std::int64_t leaves =
      tensor.bytes / kDigestLeafBytes + (tensor.bytes % kDigestLeafBytes != 0);
  if (static_cast<std::int64_t>(tensor.chunks.size()) != leaves)
    return wrong(
        str(tensor.chunks.size(), " chunks for ", tensor.bytes, " bytes; ", leaves, " are needed"));
  Hasher root;
  for (const Digest& chunk : tensor.chunks) root.update(std::as_bytes(std::span(chunk.bytes)));
  if (root.finish() != tensor.root) return wrong("the root does not match the chunks");
  return {};
}

Status check_tensors(const Manifest& manifest) {
  if (manifest.tensors.size() > kManifestTensorsMax)
    return invalid_error(
        str(manifest.tensors.size(), " tensors; the limit is ", kManifestTensorsMax));
  for (const ManifestTensor& tensor : manifest.tensors)
    TANDEM_RETURN_IF_ERROR(check_tensor(tensor));
  return {};
}

template <class Values, class Write>
void append_list(std::string& text, const Values& values, const Write& write) {
  text += '[';
  for (const auto& value : values) {
    if (&value != &values[0]) text += ',';
    write(value);
  }
  text += ']';
}

/// As canonical_json would write it, without the tree of values: an adapter has hundreds, and a
/// publish waits for them on both sides. The dtype is a known name.
Status append_tensor(std::string& text, const ManifestTensor& tensor) {
  TANDEM_ASSIGN_OR_RETURN(const std::string name, canonical_json(tensor.name));
  const auto append_digest = [&](const Digest& digest) { text += '"' + digest.hex() + '"'; };
  text += "{\"bytes\":" + std::to_string(tensor.bytes) + ",\"chunks\":";
  append_list(text, tensor.chunks, append_digest);
  text += ",\"dtype\":\"" + tensor.dtype + "\",\"name\":" + name + ",\"root\":";
  append_digest(tensor.root);
  text += ",\"shape\":";
  append_list(text, tensor.shape, [&](std::int64_t size) { text += std::to_string(size); });
  text += '}';
  return {};
}

// Throws what the JSON library throws when a field is missing or of another type.
ManifestTensor tensor_from_json(const Json& json) {
  ManifestTensor tensor;
  tensor.name = json.at("name").get<std::string>();
  tensor.dtype = json.at("dtype").get<std::string>();
  tensor.bytes = whole_number(json.at("bytes"));
  for (const Json& size : json.at("shape")) tensor.shape.push_back(whole_number(size));
  auto root = Digest::parse(json.at("root").get<std::string>());
  if (!root.ok()) throw std::runtime_error(root.status().message());
  tensor.root = *root;
  for (const Json& chunk : json.at("chunks")) {
    auto digest = Digest::parse(chunk.get<std::string>());
    if (!digest.ok()) throw std::runtime_error(digest.status().message());
    tensor.chunks.push_back(*digest);
  }
  return tensor;
}

}  // namespace

const char* manifest_kind_name(ManifestKind kind) {
  switch (kind) {
    case ManifestKind::kModel:
      return "model";
    case ManifestKind::kAdapter:
      return "adapter";
    case ManifestKind::kCheckpoint:
      return "checkpoint";
    case ManifestKind::kDataset:
      return "dataset";
  }
  return "unknown";
}

std::int64_t Manifest::bytes() const {
  std::int64_t sum = 0;
  for (const ManifestTensor& tensor : tensors) sum += tensor.bytes;
  return sum;
}

const ManifestTensor* Manifest::find(std::string_view name) const {
  const auto at = std::find_if(tensors.begin(), tensors.end(),
                               [&](const ManifestTensor& t) { return t.name == name; });
  return at == tensors.end() ? nullptr : &*at;
}

ManifestTensor describe_hashed(std::string name, std::string dtype, std::vector<std::int64_t> shape,
                               std::int64_t bytes, std::vector<Digest> chunks) {
  Hasher root;
  for (const Digest& chunk : chunks) root.update(std::as_bytes(std::span(chunk.bytes)));
  return {std::move(name), std::move(dtype), std::move(shape),
          bytes,           root.finish(),    std::move(chunks)};
}

ManifestTensor describe_tensor(std::string name, std::string dtype, std::vector<std::int64_t> shape,
                               std::span<const std::byte> bytes, int threads) {
  return describe_hashed(std::move(name), std::move(dtype), std::move(shape),
                         static_cast<std::int64_t>(bytes.size()),
                         sha256_each(digest_leaves(bytes), threads));
}

Result<std::string> encode_manifest(const Manifest& manifest) {
  TANDEM_RETURN_IF_ERROR(check_tensors(manifest));
  auto settings = parse_json_strict(manifest.settings_json, "the manifest's settings");
  if (!settings.ok() || !settings->is_object())
    return invalid_error(settings.ok() ? "the manifest's settings are not a JSON object"
                                       : settings.status().message());
  std::vector<const ManifestTensor*> order;
  for (const ManifestTensor& tensor : manifest.tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(),
            [](const ManifestTensor* a, const ManifestTensor* b) { return a->name < b->name; });
  TANDEM_ASSIGN_OR_RETURN(std::string text,
                          canonical_json({{"format", kManifestFormat},
                                          {"kind", manifest_kind_name(manifest.kind)},
                                          {"settings", *settings}}));
  text.back() = ',';  // the last name in order follows
  text += "\"tensors\":[";
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (i > 0 && order[i]->name == order[i - 1]->name)
      return invalid_error("the tensor " + order[i]->name + " is given twice");
    if (i > 0) text += ',';
    TANDEM_RETURN_IF_ERROR(append_tensor(text, *order[i]));
  }
  text += "]}";
  if (text.size() > kManifestBytesMax)
    return invalid_error(
        str("a manifest of ", text.size(), " bytes; the limit is ", kManifestBytesMax));
  return text;
}

Result<Manifest> parse_manifest(std::string_view text) {
  if (text.size() > kManifestBytesMax)
    return corrupt_error(
        str("a manifest of ", text.size(), " bytes; the limit is ", kManifestBytesMax));
  TANDEM_ASSIGN_OR_RETURN(const Json json, parse_json_strict(text, "the manifest"));
  Manifest manifest;
  try {
    if (whole_number(json.at("format")) != kManifestFormat)
      return refused_error(str("a manifest of format ", json.at("format").dump(), "; format ",
                               kManifestFormat, " is supported"));
    const auto kind = parse_kind(json.at("kind").get<std::string>());
    if (!kind) return corrupt_error("a manifest of the unknown kind " + json.at("kind").dump());
    manifest.kind = *kind;
    manifest.settings_json = json.at("settings").dump();
    for (const Json& tensor : json.at("tensors"))
      manifest.tensors.push_back(tensor_from_json(tensor));
  } catch (const std::exception& error) {
    return corrupt_error(str("a manifest cannot be read: ", error.what()));
  }
  // Only one text per content: otherwise one adapter could have two identities.
  auto canonical = encode_manifest(manifest);
  if (!canonical.ok())
    return corrupt_error("a manifest contradicts itself: " + canonical.status().message());
  if (*canonical != text) return corrupt_error("a manifest is not in its canonical form");
  return manifest;
}

Result<std::vector<Digest>> manifest_chunks(std::string_view text) {
  constexpr std::string_view kList = "\"chunks\":[";  // in a string its quotes would be escaped
  constexpr std::size_t kHex = 2 * sizeof(Digest::bytes);
  std::vector<Digest> chunks;
  bool canonical =
      text.starts_with(str("{\"format\":", kManifestFormat, ",")) && text.ends_with("]}");
  for (std::size_t at = text.find(kList); canonical && at != text.npos; at = text.find(kList, at)) {
    at += kList.size();
    for (bool more = text.substr(at, 1) != "]"; canonical && more; at += kHex + 3) {
      const std::string_view item = text.substr(std::min(at, text.size()), kHex + 3);  // "HEX",
      more = item.ends_with("\",");
      const auto digest = Digest::parse(item.substr(std::min<std::size_t>(1, item.size()), kHex));
      canonical = digest.ok() && item.starts_with('"') && (more || item.ends_with("\"]"));
      if (canonical) chunks.push_back(*digest);
    }
  }
  if (canonical) return chunks;
  TANDEM_ASSIGN_OR_RETURN(const Manifest manifest, parse_manifest(text));
  chunks.clear();
  for (const ManifestTensor& tensor : manifest.tensors)
    chunks.insert(chunks.end(), tensor.chunks.begin(), tensor.chunks.end());
  return chunks;
}

Digest manifest_digest(std::string_view canonical_text) {
  return sha256(canonical_text);
}

}  // namespace tandem::storage
