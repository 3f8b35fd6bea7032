// BPE tokenizers, byte-level (GPT-2's family: SmolLM2, Llama 3, Qwen2/3) and SentencePiece's (Llama
// 2, TinyLlama), from a Hugging Face tokenizer.json or from the metadata of a GGUF file. The oracle
// is the Hugging Face `tokenizers` library: same text, same ids.
//
// A Tokenizer is immutable after loading; copies share one vocabulary. Every const function may be
// called from any thread at once.
#pragma once

#include "protocol/base/result.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::storage {
struct GgufTokenizer;
}

namespace tandem::worker::text {

/// Longest text that one encode() accepts, in bytes.
inline constexpr std::size_t kEncodeBytesMax = std::size_t{16} << 20;
/// Largest tokenizer.json that is read, in bytes, and the largest vocabulary, in tokens.
inline constexpr std::size_t kTokenizerJsonBytesMax = std::size_t{256} << 20;
inline constexpr std::size_t kVocabularyMax = std::size_t{1} << 22;

struct EncodeOptions {
  /// Adds what the tokenizer puts around a text (BOS and so on). A rendered chat template already
  /// holds its own BOS: encode it with false.
  bool add_special_tokens = true;
  /// Special tokens spelled in the text become their ids. With false their spelling is plain text,
  /// so that a user cannot write one; added tokens that are not special are found either way.
  bool parse_special = true;
  /// The text goes on where another ended, in the middle of its plain text: nothing is put before
  /// it that a tokenizer puts before a text (a space, often).
  bool continues = false;
};

/// What decoding does with spaces at the very beginning, where the tokenizer may have put one.
enum class LeadingSpace {
  kKept,
  kOneDropped,      ///< of the whole text
  kOfFirstDropped,  ///< all that the first token begins with
};

class Tokenizer {
 public:
  /// From the text of tokenizer.json. `tokenizer_config_json` ("" when the folder has none) names
  /// bos, eos, unk and pad tokens. Refused: any model but BPE and any component that this class
  /// does not know, named in the message. Invalid: not JSON, or contradictory.
  static Result<Tokenizer> from_json(std::string_view tokenizer_json,
                                     std::string_view tokenizer_config_json = {});
  /// From the metadata of a GGUF file (storage::Gguf::tokenizer()). Refused: a model other than
  /// "gpt2" and "llama", an unknown `pre`.
  static Result<Tokenizer> from_gguf(const storage::GgufTokenizer& data);

  /// The ids of `text`. Invalid: not UTF-8 (with the byte's offset), or over kEncodeBytesMax.
  [[nodiscard]] Result<std::vector<std::int32_t>> encode(std::string_view text,
                                                         EncodeOptions options = {}) const;

  /// The text of `ids`. Bytes that are no UTF-8 become U+FFFD, one per maximal invalid part.
  /// Ids outside the vocabulary add nothing. `skip_special` leaves special tokens out.
  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids,
                                   bool skip_special = false) const;

  /// The bytes that `id` stands for (see leading_space for the first of a text); they need not be
  /// whole characters. Empty: not in the
  /// vocabulary. Valid as long as any copy of this tokenizer lives.
  [[nodiscard]] std::string_view token_bytes(std::int32_t id) const;

  /// One more than the largest id; a model's output rows may exceed it.
  [[nodiscard]] std::int32_t vocab_size() const;
  [[nodiscard]] std::optional<std::int32_t> bos_id() const;
  [[nodiscard]] std::optional<std::int32_t> eos_id() const;
  [[nodiscard]] std::optional<std::int32_t> unk_id() const;
  [[nodiscard]] std::optional<std::int32_t> pad_id() const;
  /// The spelling of bos/eos as chat templates want it; "" when there is none.
  [[nodiscard]] std::string bos_token() const;
  [[nodiscard]] std::string eos_token() const;

  /// Whether the id is an added token's: plain text begins anew after it.
  [[nodiscard]] bool is_added(std::int32_t id) const;
  /// Whether decode(skip_special = true) leaves this id out.
  [[nodiscard]] bool is_special(std::int32_t id) const;
  /// The id of the added token (special or not) with exactly this content.
  [[nodiscard]] std::optional<std::int32_t> added_token_id(std::string_view content) const;
  /// What decode, and whoever adds up token_bytes, does to the beginning of a text.
  [[nodiscard]] LeadingSpace leading_space() const;
  /// Whether encode(add_special_tokens = true) puts the BOS token first.
  [[nodiscard]] bool adds_bos() const;

  /// The parts; internal to worker/text.
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

 private:
  std::shared_ptr<const Impl> impl_;
};

/// A token's bytes without the spaces that decoding drops; `first` (true until the first token that
/// has bytes) is kept by the caller.
std::string_view drop_leading_space(LeadingSpace what, bool& first, std::string_view bytes);

/// A GGUF file's tokenizer as a Hugging Face folder has it: same ids for every text. Errors as
/// Tokenizer::from_gguf.
struct HfTokenizerFiles {
  std::string tokenizer_json;
  std::string tokenizer_config_json;  ///< with the chat template, when there is one
};
Result<HfTokenizerFiles> hf_tokenizer_files(const storage::GgufTokenizer& data);

}  // namespace tandem::worker::text
