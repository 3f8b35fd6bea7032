#include "worker/data/doctor.h"

#include "protocol/base/digest.h"
#include "worker/data/row_parts.h"
#include "worker/data/row_reader.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace tandem::worker::data {
namespace {

Digest digest_of(const Example& example) {
  Hasher hasher;
  hasher.update(std::as_bytes(std::span(example.tokens)));
  hasher.update(std::as_bytes(std::span(example.labels)));
  return hasher.finish();
}

class Examiner {
 public:
  Examiner(const Encoder& encoder, const DoctorOptions& options, DoctorReport& report)
      : encoder_(encoder), options_(options), report_(report) {}

  void add(const Result<Row>& row) {
    if (!row.ok()) return add_bad(row.status());
    const bool chat = encoder_.chat_template.has_value();
    const auto parts = take_apart(row->format, row->json, chat, row->where);
    if (!parts.ok()) return add_bad(parts.status());
    auto examples = encoder_.encode(row->format, row->json, row->where);
    if (!examples.ok()) return add_bad(examples.status());
    report_.empty_answers += count_empty_answers(*parts);
    lines_by_turns_ += examples->size() > 1;
    for (Example& example : *examples) {
      example.line = row->line;
      add_example(std::move(example), row->where);
    }
  }

  void finish() {
    add_lengths();
    add_over_length_problem();
    add_warnings();
    add_samples();
  }

 private:
  void add_problem(std::string problem) {
    if (report_.problems.size() < kDoctorProblemsMax)
      report_.problems.push_back(std::move(problem));
  }
  void add_bad(const Status& status) {
    ++report_.rows;
    ++report_.bad_rows;
    add_problem(status.message());
  }
  void add_example(Example example, const std::string& where) {
    const auto length = static_cast<std::int64_t>(example.tokens.size());
    const std::int64_t trained = example.trained_tokens();
    ++report_.rows;
    report_.tokens += length;
    report_.trained_tokens += trained;
    if (!seen_.insert(digest_of(example)).second) ++report_.duplicate_rows;
    const bool over = length > options_.dataset.max_length;
    report_.over_length_rows += over;
    if (trained == 0) {
      ++report_.untrained_rows;
      if (options_.dataset.refuse_untrained_rows) {
        ++report_.bad_rows;
        add_problem(str(where, ": the row has no trained tokens"));
      }
    } else {
      report_.usable_rows += !over || options_.dataset.over_length == OverLength::kTruncate;
      report_.rows_without_end += !ends(example);
    }
    examples_.push_back(std::move(example));
  }
  /// Whether the last trained token tells the model to stop.
  [[nodiscard]] bool ends(const Example& example) const {
    const auto last = std::find_if(example.labels.rbegin(), example.labels.rend(),
                                   [](std::int32_t label) { return label != kIgnore; });
    return encoder_.tokenizer.is_special(*last) || encoder_.tokenizer.eos_id() == *last;
  }
  void add_lengths();
  void add_over_length_problem();
  void add_warnings();
  void add_samples();
  [[nodiscard]] DoctorSample sample_of(const Example& example) const;

  const Encoder& encoder_;
  const DoctorOptions& options_;
  DoctorReport& report_;
  std::vector<Example> examples_;
  std::set<Digest> seen_;
  std::int64_t lines_by_turns_ = 0;
};

void Examiner::add_lengths() {
  if (examples_.empty()) return;
  std::vector<std::int64_t> lengths;
  for (const Example& example : examples_)
    lengths.push_back(static_cast<std::int64_t>(example.tokens.size()));
  std::sort(lengths.begin(), lengths.end());
  const auto nearest_rank = [&](double share) {
    const auto rank = static_cast<std::size_t>(std::ceil(share * double(lengths.size())));
    return lengths[std::clamp<std::size_t>(rank, 1, lengths.size()) - 1];
  };
  report_.length_min = lengths.front();
  report_.length_p50 = nearest_rank(0.50);
  report_.length_p90 = nearest_rank(0.90);
  report_.length_p99 = nearest_rank(0.99);
  report_.length_max = lengths.back();
}

void Examiner::add_over_length_problem() {
  if (report_.over_length_rows == 0 || options_.dataset.over_length != OverLength::kRaise) return;
  add_problem(str(report_.over_length_rows, " rows have more than max_length ", report_.max_length,
                  " tokens (the longest has ", report_.length_max,
                  "); raise max_length, or set over_length to drop or truncate"));
}

void Examiner::add_warnings() {
  const auto warn = [&](std::int64_t count, const char* what) {
    if (count > 0) report_.warnings.push_back(str(count, " ", what));
  };
  warn(report_.duplicate_rows, "rows repeat an earlier row");
  warn(lines_by_turns_,
       "conversations are trained as one row per turn, each with what stands before it: the chat "
       "template writes earlier turns differently once later ones follow");
  warn(report_.empty_answers, "answers are empty: the model learns to say nothing");
  warn(report_.rows_without_end,
       "rows do not end with a trained end token: the model may not learn to stop");
  if (report_.over_length_rows > 0 && options_.dataset.over_length == OverLength::kDrop)
    warn(report_.over_length_rows, "rows are longer than max_length and will be dropped");
  if (report_.over_length_rows > 0 && options_.dataset.over_length == OverLength::kTruncate)
    warn(report_.over_length_rows, "rows are longer than max_length and will be cut");
}

DoctorSample Examiner::sample_of(const Example& example) const {
  DoctorSample sample;
  sample.line = example.line;
  sample.tokens = static_cast<std::int64_t>(example.tokens.size());
  sample.trained_tokens = example.trained_tokens();
  std::size_t begin = 0, bytes = 0;
  const auto is_trained = [&](std::size_t i) { return i > 0 && example.labels[i - 1] != kIgnore; };
  while (begin < example.tokens.size()) {
    std::size_t end = begin + 1;
    while (end < example.tokens.size() && is_trained(end) == is_trained(begin)) ++end;
    std::string text =
        encoder_.tokenizer.decode(std::span(example.tokens).subspan(begin, end - begin));
    const std::size_t left = kDoctorSampleBytesMax - std::min(kDoctorSampleBytesMax, bytes);
    if (text.size() > left) {
      std::size_t cut = left;
      while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) --cut;
      sample.segments.push_back({text.substr(0, cut) + " ...", is_trained(begin)});
      break;
    }
    bytes += text.size();
    sample.segments.push_back({std::move(text), is_trained(begin)});
    begin = end;
  }
  return sample;
}

void Examiner::add_samples() {
  const std::size_t count = std::min({options_.samples, kDoctorSamplesMax, examples_.size()});
  for (std::size_t i = 0; i < count; ++i)
    report_.samples.push_back(sample_of(examples_[i * examples_.size() / count]));
}

}  // namespace

Result<DoctorReport> examine(std::string_view jsonl, const std::string& name,
                             const Encoder& encoder, const DoctorOptions& options) {
  if (jsonl.size() > kDatasetBytesMax)
    return refused_error(str("data set ", name, " has ", jsonl.size(), " bytes; at most ",
                             kDatasetBytesMax, " are supported"));
  DoctorReport report;
  report.name = name;
  report.max_length = options.dataset.max_length;
  RowReader reader(jsonl, name);
  Examiner examiner(encoder, options, report);
  while (const auto row = reader.next()) examiner.add(*row);
  if (report.rows == 0) return invalid_error(str("data set ", name, " is empty: it has no rows"));
  report.format = reader.format();
  examiner.finish();
  return report;
}

Result<DoctorReport> examine_file(const std::string& path, const Encoder& encoder,
                                  const DoctorOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const std::string content, read_data_file(path));
  return examine(content, file_name(path), encoder, options);
}

}  // namespace tandem::worker::data
