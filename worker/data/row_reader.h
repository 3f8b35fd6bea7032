// Lines of a JSON-lines file, one at a time, with their numbers and the problem of each. Internal
// to worker/data: the data set and the doctor read through it.
#pragma once

#include "worker/data/dataset.h"

#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <string_view>

namespace tandem::worker::data {

/// Most keys of one JSON object in a row.
inline constexpr std::size_t kJsonKeysMax = 1024;

struct Row {
  std::int64_t line = 0;
  std::string where;  ///< "data.jsonl line 3", for messages
  Format format = Format::kMessages;
  nlohmann::ordered_json json;
};

/// The format that a row's keys say. Invalid: none, naming the keys; or a key that the format does
/// not have.
Result<Format> detect_format(const nlohmann::ordered_json& row, const std::string& where);

class RowReader {
 public:
  /// `jsonl` has to outlive the reader.
  RowReader(std::string_view jsonl, std::string name);

  /// The next row, or nothing at the end. Invalid: a line that is no row; reading may go on after
  /// it. Refused: more than kRowsMax rows, after which nothing follows.
  std::optional<Result<Row>> next();
  /// The format of the first good row.
  [[nodiscard]] std::optional<Format> format() const { return format_; }

 private:
  Result<Row> parse(std::string_view text);

  std::string_view rest_;
  std::string name_;
  std::int64_t line_ = 0, rows_ = 0, format_line_ = 0;
  std::optional<Format> format_;
};

/// A whole file. Not found: no such file. Refused: over kDatasetBytesMax.
Result<std::string> read_data_file(const std::string& path);
/// The last part of a path.
std::string file_name(const std::string& path);

}  // namespace tandem::worker::data
