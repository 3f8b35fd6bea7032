// Canonical manifests: the text whose SHA-256 is the identity of a model, an adapter, a checkpoint
// or a data set.
//
// The text is one JSON object without spaces, names sorted by bytes:
//   {"format":1,"kind":"adapter","settings":{...},"tensors":[{"bytes":N,"chunks":["HEX",...],
//    "dtype":"bf16","name":"...","root":"HEX","shape":[...]},...]}
// settings holds what changes the mathematics and nothing else (no names, no paths, no times);
// tensors are sorted by name. chunks are the SHA-256s of the tensor's 16 MiB leaves, root is
// SHA-256 over their concatenation (content_root of base/digest.h). Chunks of models are in the
// model's own files, all others in the blob store.
#pragma once

#include "protocol/base/digest.h"
#include "protocol/base/result.h"
#include "protocol/messages.h"
#include "protocol/records.h"

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::storage {

using protocol::ManifestKind;

inline constexpr std::size_t kManifestBytesMax = protocol::kManifestBytesMax;
inline constexpr std::size_t kManifestTensorsMax = 1 << 18;

const char* manifest_kind_name(ManifestKind kind);

struct ManifestTensor {
  std::string name;
  std::string dtype;  ///< dtype_name, or gguf_type_name for quantized base weights
  std::vector<std::int64_t> shape;
  std::int64_t bytes = 0;
  Digest root;
  std::vector<Digest> chunks;
};

struct Manifest {
  ManifestKind kind = ManifestKind::kAdapter;
  std::string settings_json =
      "{}";  ///< a JSON object; any spacing and order, encode makes it canonical
  std::vector<ManifestTensor> tensors;

  [[nodiscard]] std::int64_t bytes() const;
  [[nodiscard]] const ManifestTensor* find(std::string_view name) const;
};

/// Describes one tensor: splits `bytes` into 16 MiB leaves and hashes them with up to `threads`
/// threads.
ManifestTensor describe_tensor(std::string name, std::string dtype, std::vector<std::int64_t> shape,
                               std::span<const std::byte> bytes, int threads = 1);
/// The same of a tensor whose leaves' digests are known.
ManifestTensor describe_hashed(std::string name, std::string dtype, std::vector<std::int64_t> shape,
                               std::int64_t bytes, std::vector<Digest> chunks);

/// The canonical text. Errors: invalid (a name twice, settings not an object, sizes that do not
/// match).
Result<std::string> encode_manifest(const Manifest& manifest);
/// Accepts exactly what encode_manifest writes; anything else is corrupt, with the place.
Result<Manifest> parse_manifest(std::string_view text);
/// Every chunk that a canonical text names, much faster than parse_manifest; what does not look
/// canonical is parsed.
Result<std::vector<Digest>> manifest_chunks(std::string_view text);
/// SHA-256 of the canonical text.
Digest manifest_digest(std::string_view canonical_text);

}  // namespace tandem::storage
