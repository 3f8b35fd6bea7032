// The parts of a Tokenizer, shared by its loaders; internal to worker/text.
#pragma once

#include "worker/text/added_tokens.h"
#include "worker/text/bpe.h"
#include "worker/text/normalizer.h"
#include "worker/text/pre_tokenizer.h"
#include "worker/text/tokenizer.h"

#include <memory>
#include <string>
#include <vector>

namespace tandem::worker::text {

struct Tokenizer::Impl {
  /// What an id stands for.
  struct Entry {
    std::string bytes;
    bool present = false;
    bool special = false;
    bool added = false;
  };
  std::vector<Entry> entries;  ///< by id
  std::vector<AddedToken> added;
  StringMap<std::int32_t> added_ids;
  AddedTokenMatcher raw_matcher;         ///< tokens looked for in the text as given
  AddedTokenMatcher normalized_matcher;  ///< tokens looked for in the normalized text
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::unique_ptr<Bpe> bpe;
  std::vector<std::int32_t> prefix_ids, suffix_ids;  ///< what add_special_tokens puts around
  std::optional<std::int32_t> bos_id, eos_id, unk_id, pad_id;
  LeadingSpace leading_space = LeadingSpace::kKept;

  /// Appends the ids of text that holds no added token of the raw matcher.
  Status encode_text(std::string_view text, bool parse_special, TextPlace place,
                     std::vector<std::int32_t>& ids) const;
};

/// What every loader hands to build().
struct TokenizerParts {
  StringMap<std::int32_t> vocabulary;                       ///< spelling -> id, as the file has it
  std::vector<std::pair<std::string, std::string>> merges;  ///< spellings, best first
  std::vector<AddedToken> added;
  BpeOptions bpe;
  // Of SentencePiece's spellings: what decoding makes of them.
  bool decodes_spaces = false;  ///< U+2581 is a space
  bool decodes_bytes = false;   ///< <0x0A> is a byte
};

/// Fills entries, matchers and bpe of `impl` (whose normalizer is set already). Invalid: ids out of
/// range or used twice, merges that do not fit the vocabulary, limits.
Status build_vocabulary(TokenizerParts parts, Tokenizer::Impl& impl);

}  // namespace tandem::worker::text
