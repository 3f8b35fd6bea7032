// Training data: JSON lines in one of five formats, detected and reported, turned into tokens and
// next-token labels. A row that would teach nothing, or not what it seems to, is an error that
// names the file and the line, before any work is done.
//
//   format      row                                                  what is trained
//   messages    {"messages":[{"role","content","weight"?}], "tools"?}  assistant turns of weight 1
//   prompt      {"prompt","completion"} (texts)                      the completion and EOS
//   alpaca      {"instruction","input"?,"output"}                    the output (as a chat turn
//               where the model has a chat template, else in Alpaca's own wording and EOS)
//   sharegpt    {"conversations":[{"from","value"}], "system"?}      turns of "gpt"
//   text        {"text"}                                             everything, and EOS
//
// Some templates write an earlier turn differently once later ones follow (Qwen3's leaves out what
// was thought, Mistral's moves the system message). A conversation with such a turn that is trained
// becomes one row per trained turn: the prompt for it and the turn, as the model is asked for it.
#pragma once

#include "protocol/base/result.h"
#include "worker/text/chat_template.h"
#include "worker/text/tokenizer.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::worker::data {

/// A label that adds nothing to the loss (the value that PyTorch and Hugging Face use).
inline constexpr std::int32_t kIgnore = -100;

/// Limits of one data set.
inline constexpr std::size_t kLineBytesMax = std::size_t{16} << 20;
inline constexpr std::size_t kRowsMax = std::size_t{1} << 24;
inline constexpr std::size_t kDatasetBytesMax = std::size_t{4} << 30;
inline constexpr int kJsonNestingMax = 64;
/// Bytes of all turns of one row that is trained turn by turn, each with what stands before it.
inline constexpr std::size_t kTurnsBytesMax = std::size_t{64} << 20;

enum class Format { kMessages, kPromptCompletion, kAlpaca, kShareGpt, kText };
/// "messages", "prompt", "alpaca", "sharegpt", "text".
const char* format_name(Format format);

/// What to do with a row that has more than max_length tokens.
enum class OverLength { kRaise, kDrop, kTruncate };

struct DatasetOptions {
  std::int64_t max_length = 2048;  ///< tokens of one row
  OverLength over_length = OverLength::kRaise;
  /// A row without a single trained token: an error when true, else counted and left out.
  bool refuse_untrained_rows = true;
};

/// One row. labels[i] is the token that should follow tokens[i], or kIgnore; the last is kIgnore.
struct Example {
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> labels;  ///< as long as tokens
  std::int64_t line = 0;             ///< in the file, from 1
  [[nodiscard]] std::int64_t trained_tokens() const;
};

/// What happened to the rows; for reports.
struct DatasetReport {
  Format format = Format::kMessages;
  std::int64_t rows = 0;  ///< lines that are not blank; one trained turn by turn counts for each
  std::int64_t dropped_over_length = 0;
  std::int64_t truncated = 0;
  std::int64_t dropped_untrained = 0;
  std::int64_t longest_tokens = 0;  ///< before dropping or truncating
  std::int64_t longest_line = 0;
};

/// A data set in memory. Immutable after loading; any thread.
struct Dataset {
  std::vector<Example> examples;  ///< in the file's order
  DatasetReport report;
  [[nodiscard]] std::int64_t total_tokens() const;
  [[nodiscard]] std::int64_t trained_tokens() const;
};

/// Turns rows into examples: tokenizer, template and options in one place, shared with the doctor.
/// `chat_template` may be absent: rows that need one are then refused.
struct Encoder {
  text::Tokenizer tokenizer;
  std::optional<text::ChatTemplate> chat_template;
  /// Rows of the model's embedding; a tokenizer may have tokens beyond them (added, never trained),
  /// and a row with one of those is an error. 0: not checked.
  std::int64_t vocab = 0;
  /// Tokens and labels of one row, of any length: one example, or one per trained turn. `where`
  /// begins every error ("data.jsonl line 3").
  [[nodiscard]] Result<std::vector<Example>> encode(Format format,
                                                    const nlohmann::ordered_json& row,
                                                    const std::string& where) const;
};

/// Reads JSON lines from memory. `name` stands in messages. Byte-order mark, CRLF and blank lines
/// are taken in stride. Invalid: an empty data set, bad JSON or UTF-8 at a line, an unknown key or
/// format, formats mixed, no trained tokens, over-long rows under kRaise (the message counts them).
Result<Dataset> parse_dataset(std::string_view jsonl, const std::string& name,
                              const Encoder& encoder, const DatasetOptions& options);

/// The same from a file. Not found: no such file.
Result<Dataset> load_dataset(const std::string& path, const Encoder& encoder,
                             const DatasetOptions& options);

}  // namespace tandem::worker::data
