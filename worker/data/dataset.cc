#include "worker/data/dataset.h"

#include "worker/data/row_reader.h"

namespace tandem::worker::data {
namespace {

/// Collects examples and what became of the rows.
class Collector {
 public:
  Collector(const std::string& name, const DatasetOptions& options)
      : name_(name), options_(options) {}
  Status add(Example example, const std::string& where);
  Result<Dataset> finish(const RowReader& reader);

 private:
  void truncate(Example& example) {
    example.tokens.resize(static_cast<std::size_t>(options_.max_length));
    example.labels.resize(static_cast<std::size_t>(options_.max_length));
    if (!example.labels.empty()) example.labels.back() = kIgnore;
    ++dataset_.report.truncated;
  }

  const std::string& name_;
  const DatasetOptions& options_;
  Dataset dataset_;
  std::int64_t over_length_ = 0;
};

Status Collector::add(Example example, const std::string& where) {
  const auto length = static_cast<std::int64_t>(example.tokens.size());
  DatasetReport& report = dataset_.report;
  ++report.rows;
  if (length > report.longest_tokens) {
    report.longest_tokens = length;
    report.longest_line = example.line;
  }
  if (example.trained_tokens() == 0) {
    if (options_.refuse_untrained_rows)
      return invalid_error(
          str(where, ": the row has no trained tokens (", length,
              " tokens); it needs an assistant's turn of weight 1, or a text that is not empty"));
    ++report.dropped_untrained;
    return Status::ok_status();
  }
  if (length > options_.max_length) {
    ++over_length_;
    if (options_.over_length == OverLength::kDrop) ++report.dropped_over_length;
    if (options_.over_length != OverLength::kTruncate) return Status::ok_status();
    truncate(example);
    if (example.trained_tokens() == 0) {  // the answer was cut off
      ++report.dropped_untrained;
      return Status::ok_status();
    }
  }
  dataset_.examples.push_back(std::move(example));
  return Status::ok_status();
}

Result<Dataset> Collector::finish(const RowReader& reader) {
  DatasetReport& report = dataset_.report;
  if (report.rows == 0) return invalid_error(str("data set ", name_, " is empty: it has no rows"));
  report.format = *reader.format();
  if (over_length_ > 0 && options_.over_length == OverLength::kRaise)
    return invalid_error(str("data set ", name_, ": ", over_length_, " of ", report.rows,
                             " rows have more than max_length ", options_.max_length,
                             " tokens; the longest has ", report.longest_tokens, " (line ",
                             report.longest_line,
                             "); raise max_length, or set over_length to drop or truncate"));
  if (dataset_.examples.empty())
    return invalid_error(str("data set ", name_, ": none of its ", report.rows, " rows is left (",
                             report.dropped_over_length, " dropped as longer than max_length ",
                             options_.max_length, ", ", report.dropped_untrained,
                             " without trained tokens)"));
  return std::move(dataset_);
}

}  // namespace

std::int64_t Dataset::total_tokens() const {
  std::int64_t total = 0;
  for (const Example& example : examples) total += static_cast<std::int64_t>(example.tokens.size());
  return total;
}

std::int64_t Dataset::trained_tokens() const {
  std::int64_t total = 0;
  for (const Example& example : examples) total += example.trained_tokens();
  return total;
}

Result<Dataset> parse_dataset(std::string_view jsonl, const std::string& name,
                              const Encoder& encoder, const DatasetOptions& options) {
  if (options.max_length < 2)
    return invalid_error(str("max_length is ", options.max_length, "; at least 2 is needed"));
  if (jsonl.size() > kDatasetBytesMax)
    return refused_error(str("data set ", name, " has ", jsonl.size(), " bytes; at most ",
                             kDatasetBytesMax, " are supported"));
  RowReader reader(jsonl, name);
  Collector collector(name, options);
  while (auto next = reader.next()) {
    if (!next->ok()) return next->status();
    const Row& row = **next;
    TANDEM_ASSIGN_OR_RETURN(auto examples, encoder.encode(row.format, row.json, row.where));
    for (Example& example : examples) {
      example.line = row.line;
      TANDEM_RETURN_IF_ERROR(collector.add(std::move(example), row.where));
    }
  }
  return collector.finish(reader);
}

Result<Dataset> load_dataset(const std::string& path, const Encoder& encoder,
                             const DatasetOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const std::string content, read_data_file(path));
  return parse_dataset(content, file_name(path), encoder, options);
}

}  // namespace tandem::worker::data
