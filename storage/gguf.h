// GGUF files, versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
// metadata, tensors and their dequantization, read strictly because model files come from
// strangers. Every length is checked against the file before it is used; nothing is allocated by a
// number in the file alone.
//
// Layout that a model loader must know. Shapes here are row-major (Hugging Face order): GGUF stores
// the dimensions reversed, so a linear layer is [out, in] here. For the architectures with
// interleaved
// ("NORM") rope, llama among them, the converter permuted the rows of attn_q and attn_k (weight and
// bias) within each head; undo it with unpermute_rope_rows (heads for q, kv heads for k) to get the
// Hugging Face layout. qwen2 and qwen3 ("NEOX" rope) are not permuted; gguf_permutes_rope says
// which.
#pragma once

#include "protocol/base/dtype.h"
#include "protocol/base/result.h"
#include "storage/mapped_file.h"

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::storage {

inline constexpr std::uint64_t kGgufTensorsMax = 1 << 20;
inline constexpr std::uint64_t kGgufMetadataMax = 1 << 16;
inline constexpr std::uint64_t kGgufKeyBytesMax = 65535;
inline constexpr std::uint64_t kGgufTensorNameBytesMax = 256;
inline constexpr std::uint32_t kGgufRankMax = 4;
inline constexpr std::uint64_t kGgufAlignmentMax = 1 << 20;

/// The element types that can be dequantized; the numbers are ggml's.
enum class GgufType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};
/// "q4_1" and so on: used in manifests and messages.
const char* gguf_type_name(GgufType type);
/// Elements and bytes of one block (1 element for the float types).
std::int64_t gguf_block_elements(GgufType type);
std::int64_t gguf_block_bytes(GgufType type);

struct GgufTensor {
  std::string name;
  GgufType type = GgufType::kF32;
  std::vector<std::int64_t> shape;   ///< row-major, [out, in] for a linear layer
  std::span<const std::byte> bytes;  ///< blocks run along the last dimension
  [[nodiscard]] std::int64_t numel() const;
};

/// What the file says about its tokenizer. Empty or unset where it says nothing.
struct GgufTokenizer {
  std::string model;  ///< tokenizer.ggml.model: "gpt2" (byte-level BPE), "llama", ...
  std::string pre;    ///< tokenizer.ggml.pre: the pre-tokenizer, "smollm", "llama-bpe", ...
  std::vector<std::string> tokens;  ///< by id
  std::vector<std::int32_t>
      token_types;  ///< 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
  std::vector<float> scores;
  std::vector<std::string> merges;  ///< "left right", most frequent first
  std::optional<std::uint32_t> bos_id, eos_id, unk_id, pad_id;
  std::optional<bool> add_bos, add_eos, add_space_prefix;
  std::string chat_template;
};

/// One open file. A cheap handle: copies share the mapping. Any thread may read.
class Gguf {
 public:
  /// Errors: not_found, corrupt (names the offset and what was expected there), refused (version,
  /// or a tensor whose type cannot be dequantized: names tensor and type).
  static Result<Gguf> open(const std::string& path);
  static Result<Gguf> parse(std::shared_ptr<const MappedFile> file);

  [[nodiscard]] const std::string& path() const { return file_->path(); }
  [[nodiscard]] std::uint32_t version() const { return version_; }

  /// Sorted by name. nullptr when there is no such tensor.
  [[nodiscard]] const std::vector<GgufTensor>& tensors() const { return tensors_; }
  [[nodiscard]] const GgufTensor* find(std::string_view name) const;

  // Metadata. A getter fails with not_found when the key is absent and invalid when it holds
  // another type (any integer type is read as an integer when the value fits; any number as a
  // double).
  [[nodiscard]] bool has(std::string_view key) const;
  [[nodiscard]] std::vector<std::string> keys() const;
  [[nodiscard]] Result<std::int64_t> integer(std::string_view key) const;
  [[nodiscard]] Result<double> number(std::string_view key) const;
  [[nodiscard]] Result<bool> boolean(std::string_view key) const;
  [[nodiscard]] Result<std::string> text(std::string_view key) const;
  [[nodiscard]] Result<std::vector<std::int64_t>> integers(std::string_view key) const;
  [[nodiscard]] Result<std::vector<double>> numbers(std::string_view key) const;
  [[nodiscard]] Result<std::vector<std::string>> texts(std::string_view key) const;
  /// The value as stored, type code first: what a manifest hashes.
  [[nodiscard]] Result<std::span<const std::byte>> raw(std::string_view key) const;

  /// general.architecture: "llama", "qwen2", "qwen3", ...
  [[nodiscard]] Result<std::string> architecture() const { return text("general.architecture"); }
  /// The tokenizer's data; invalid when a list's length does not match the tokens or an id is out
  /// of range.
  [[nodiscard]] Result<GgufTokenizer> tokenizer() const;

 private:
  friend class GgufParser;
  struct Value {
    std::uint32_t type = 0;                         ///< GGUF value type
    std::uint32_t element = 0;                      ///< element type of an array
    std::uint64_t count = 0;                        ///< elements of an array; 1 for a scalar
    std::span<const std::byte> bytes;               ///< fixed-size payload
    std::vector<std::span<const std::byte>> texts;  ///< string payloads
    std::span<const std::byte> raw;
  };
  [[nodiscard]] Result<const Value*> value(std::string_view key) const;

  std::shared_ptr<const MappedFile> file_;
  std::uint32_t version_ = 0;
  std::map<std::string, Value, std::less<>> metadata_;
  std::vector<GgufTensor> tensors_;
};

/// Dequantizes blocks to f32, each value exactly ggml's reference formula in f32. `bytes` must hold
/// whole blocks and `out` exactly their elements, so a caller may hand in any range of rows (and
/// several threads several ranges). Overwrites. Errors: invalid (sizes).
Status dequantize(GgufType type, std::span<const std::byte> bytes, std::span<float> out);
/// The same, each f32 then rounded to bf16 (nearest, ties to even).
Status dequantize(GgufType type, std::span<const std::byte> bytes, std::span<bf16> out);

/// True where the converter permuted q and k rows for interleaved rope.
bool gguf_permutes_rope(std::string_view architecture);
/// order[i] = the GGUF row that is row i of the Hugging Face matrix, for a q or k projection of
/// `rows` rows and `heads` heads. Inverse of convert_hf_to_gguf.py's LlamaModel.permute. Errors:
/// invalid (rows not a multiple of 2 * heads).
Result<std::vector<std::int64_t>> rope_row_order(std::int64_t rows, std::int64_t heads);
/// Applies that order in place to a row-major matrix [rows, matrix.size() / rows].
Status unpermute_rope_rows(std::span<float> matrix, std::int64_t rows, std::int64_t heads);
Status unpermute_rope_rows(std::span<bf16> matrix, std::int64_t rows, std::int64_t heads);

/// "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight" for the Llama, Qwen2 and Qwen3
/// families; nothing for a name that has no counterpart (rope_freqs.weight is one: it holds llama3
/// rope factors, not a weight).
std::optional<std::string> gguf_to_hf_name(std::string_view gguf_name);

}  // namespace tandem::storage
