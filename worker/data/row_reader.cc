#include "worker/data/row_reader.h"

#include "worker/text/utf8.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <set>
#include <vector>

namespace tandem::worker::data {
namespace {

using Json = nlohmann::ordered_json;

struct FormatKeys {
  Format format;
  std::vector<std::string_view> required, optional;
};

/// "id" says where a row came from and changes nothing, so every format may have it.
const std::array<FormatKeys, 5>& format_keys() {
  static const std::array<FormatKeys, 5> kKeys{{
      {Format::kMessages, {"messages"}, {"tools", "id"}},
      {Format::kPromptCompletion, {"prompt", "completion"}, {"tools", "id"}},
      {Format::kAlpaca, {"instruction", "output"}, {"input", "system", "id"}},
      {Format::kShareGpt, {"conversations"}, {"system", "tools", "id"}},
      {Format::kText, {"text"}, {"id"}},
  }};
  return kKeys;
}

constexpr const char* kFormatsShown =
    "{\"messages\":[...]}, {\"prompt\",\"completion\"}, {\"instruction\",\"input\",\"output\"}, "
    "{\"conversations\":[...]} or {\"text\"}";

std::string shown_keys(const Json& row) {
  constexpr std::size_t kShown = 6;
  std::string out;
  std::size_t count = 0;
  for (const auto& [key, value] : row.items()) {
    if (++count > kShown) return out + ", ...";
    out += str(count == 1 ? "" : ", ", "\"", key.substr(0, 40), "\"");
  }
  return out.empty() ? "none" : out;
}

struct JsonProblem {
  std::string what;
};

/// Parses one line; nested too deep, a key twice or too many keys end in JsonProblem.
Json parse_line(std::string_view text) {
  std::vector<std::set<std::string>> keys;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kJsonNestingMax)
      throw JsonProblem{str("nested more than ", kJsonNestingMax, " deep")};
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second)
        throw JsonProblem{str("the key \"", key.substr(0, 40), "\" stands twice in one object")};
      if (keys.back().size() > kJsonKeysMax)
        throw JsonProblem{str("an object has more than ", kJsonKeysMax, " keys")};
    }
    return true;
  };
  return Json::parse(text.begin(), text.end(), watch);
}

/// What nlohmann says, without its prefix and its own line number.
std::string parse_problem(const std::string& what) {
  const std::size_t column = what.find("column ");
  return column == std::string::npos ? what : "at " + what.substr(column);
}

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\v\f") == std::string_view::npos;
}

}  // namespace

const char* format_name(Format format) {
  switch (format) {
    case Format::kMessages:
      return "messages";
    case Format::kPromptCompletion:
      return "prompt";
    case Format::kAlpaca:
      return "alpaca";
    case Format::kShareGpt:
      return "sharegpt";
    case Format::kText:
      return "text";
  }
  return "unknown";
}

Result<Format> detect_format(const Json& row, const std::string& where) {
  if (!row.is_object())
    return invalid_error(str(where,
                             ": a row has to be a JSON object on a line of its own, not of type ",
                             row.type_name()));
  const auto has = [&](std::string_view key) { return row.contains(std::string(key)); };
  for (const FormatKeys& keys : format_keys()) {
    if (!std::all_of(keys.required.begin(), keys.required.end(), has)) continue;
    std::vector<std::string_view> known = keys.required;
    known.insert(known.end(), keys.optional.begin(), keys.optional.end());
    for (const auto& [key, value] : row.items()) {
      if (std::find(known.begin(), known.end(), key) != known.end()) continue;
      const std::string nearest = nearest_name(std::string_view(key).substr(0, 40), known);
      return invalid_error(str(where, ": unknown key \"", key.substr(0, 40), "\" in a row of the ",
                               format_name(keys.format), " format",
                               nearest.empty() ? "; remove it" : "; did you mean ", nearest));
    }
    return keys.format;
  }
  return invalid_error(str(where, ": the keys ", shown_keys(row),
                           " belong to no known format; a row is ", kFormatsShown));
}

RowReader::RowReader(std::string_view jsonl, std::string name)
    : rest_(jsonl), name_(std::move(name)) {
  constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
  if (rest_.starts_with(kByteOrderMark)) rest_.remove_prefix(kByteOrderMark.size());
}

std::optional<Result<Row>> RowReader::next() {
  while (!rest_.empty()) {
    const std::size_t end = rest_.find('\n');
    std::string_view text = rest_.substr(0, end);
    rest_ = end == std::string_view::npos ? std::string_view() : rest_.substr(end + 1);
    ++line_;
    if (text.ends_with('\r')) text.remove_suffix(1);
    if (is_blank(text)) continue;
    if (static_cast<std::size_t>(++rows_) > kRowsMax) {
      rest_ = {};
      return Result<Row>(refused_error(str(name_, " has more than ", kRowsMax, " rows")));
    }
    return parse(text);
  }
  return std::nullopt;
}

Result<Row> RowReader::parse(std::string_view text) {
  Row row;
  row.line = line_;
  row.where = str(name_, " line ", line_);
  if (text.size() > kLineBytesMax)
    return invalid_error(
        str(row.where, " has ", text.size(), " bytes; a line may have at most ", kLineBytesMax));
  if (const std::size_t bad = text::find_invalid_utf8(text); bad != std::string_view::npos)
    return invalid_error(str(row.where, ": not valid UTF-8 at byte ", bad, " of the line"));
  try {
    row.json = parse_line(text);
  } catch (const JsonProblem& problem) {
    return invalid_error(str(row.where, ": ", problem.what));
  } catch (const Json::exception& e) {
    return invalid_error(str(row.where, ": not valid JSON ", parse_problem(e.what())));
  }
  TANDEM_ASSIGN_OR_RETURN(row.format, detect_format(row.json, row.where));
  if (!format_) {
    format_ = row.format;
    format_line_ = line_;
  } else if (*format_ != row.format) {
    return invalid_error(str(row.where, " has the ", format_name(row.format), " format, line ",
                             format_line_, " the ", format_name(*format_),
                             " format; a data set has one"));
  }
  return row;
}

Result<std::string> read_data_file(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error))
    return not_found_error(str("no data file ", path));
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) return internal_error(str(path, " cannot be read: ", error.message()));
  if (size > kDatasetBytesMax)
    return refused_error(
        str(path, " has ", size, " bytes; a data set may have at most ", kDatasetBytesMax));
  std::ifstream in(path, std::ios::binary);
  std::string content(size, '\0');
  in.read(content.data(), static_cast<std::streamsize>(size));
  if (!in) return internal_error(str(path, " cannot be read"));
  return content;
}

std::string file_name(const std::string& path) {
  return std::filesystem::path(path).filename().string();
}

}  // namespace tandem::worker::data
