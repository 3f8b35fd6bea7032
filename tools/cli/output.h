// What verbs print: tables and progress for people, one JSON value (or JSON lines) for scripts.
#pragma once

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

namespace tandem::tools {

using Json = nlohmann::ordered_json;

/// A table with a header line, columns as wide as their cells. Numbers right, text left.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : header_(std::move(header)) {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  [[nodiscard]] std::string to_string() const;

 private:
  std::vector<std::string> header_;
  std::vector<std::vector<std::string>> rows_;
};

/// A field as text for people: strings as they are, null, missing and empty ones as "-", lists as
/// "a, b", flat objects as "name 1, other 2", the rest as JSON. What decides something reads
/// object.value(name, "") instead.
std::string field(const Json& object, const std::string& name);
/// A field in bytes, seconds ago, or a digest's first digits.
std::string bytes_field(const Json& object, const std::string& name);
std::string age_field(const Json& object, const std::string& unix_ms_name);
std::string digest_field(const Json& object, const std::string& name);

/// "2026-01-31 09:00:00 +0100", in this machine's zone; "" for 0.
std::string local_time(std::int64_t unix_ms);

/// "name:  value" lines of an object, its times as local_time().
std::string describe(const Json& object);

/// Whether text for this file may have colours: a terminal, and neither NO_COLOR nor TERM=dumb.
bool colors(int fd);

/// One line that is redrawn in place on a terminal, or printed now and then elsewhere. Writes to
/// stderr.
class ProgressBar {
 public:
  ProgressBar();
  ~ProgressBar();
  /// `done` of `total` (0: unknown), and what to say beside the bar.
  void update(std::int64_t done, std::int64_t total, const std::string& text);
  /// Ends the line; later output starts below it.
  void finish();

 private:
  const bool terminal_;
  bool drawn_ = false;
  std::int64_t printed_ms_ = -1;
};

/// A sparkline of values, oldest first, at most `width` characters.
std::string sparkline(const std::vector<double>& values, std::size_t width);

}  // namespace tandem::tools
