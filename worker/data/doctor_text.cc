// The doctor's report as JSON and for a terminal.
#include "worker/data/doctor.h"

#include <sstream>

namespace tandem::worker::data {
namespace {

using Json = nlohmann::ordered_json;

std::string percent(std::int64_t part, std::int64_t whole) {
  if (whole == 0) return "0 %";
  return str(part * 1000 / whole / 10, ".", part * 1000 / whole % 10, " %");
}

/// A sample's text may hold anything; control characters would reach the terminal.
std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    out += byte == '\n' || byte == '\t' || (byte >= 0x20 && byte != 0x7F) ? c : '?';
  }
  return out;
}

void write_sample(std::ostream& out, const DoctorSample& sample, bool color) {
  out << "\nline " << sample.line << ": " << sample.tokens << " tokens, " << sample.trained_tokens
      << " trained\n";
  for (const SampleSegment& segment : sample.segments) {
    if (segment.trained) out << (color ? "\x1b[32m" : "[[");
    out << printable(segment.text);
    if (segment.trained) out << (color ? "\x1b[0m" : "]]");
  }
  out << "\n";
}

}  // namespace

Json to_json(const DoctorReport& report) {
  Json samples = Json::array();
  for (const DoctorSample& sample : report.samples) {
    Json segments = Json::array();
    for (const SampleSegment& segment : sample.segments)
      segments.push_back({{"text", segment.text}, {"trained", segment.trained}});
    samples.push_back({{"line", sample.line},
                       {"tokens", sample.tokens},
                       {"trained_tokens", sample.trained_tokens},
                       {"segments", std::move(segments)}});
  }
  return {{"name", report.name},
          {"ok", report.ok()},
          {"format", report.format ? Json(format_name(*report.format)) : Json()},
          {"rows", report.rows},
          {"usable_rows", report.usable_rows},
          {"bad_rows", report.bad_rows},
          {"tokens", report.tokens},
          {"trained_tokens", report.trained_tokens},
          {"max_length", report.max_length},
          {"length",
           {{"min", report.length_min},
            {"p50", report.length_p50},
            {"p90", report.length_p90},
            {"p99", report.length_p99},
            {"max", report.length_max}}},
          {"over_length_rows", report.over_length_rows},
          {"duplicate_rows", report.duplicate_rows},
          {"empty_answers", report.empty_answers},
          {"untrained_rows", report.untrained_rows},
          {"rows_without_end", report.rows_without_end},
          {"problems", report.problems},
          {"warnings", report.warnings},
          {"samples", std::move(samples)}};
}

std::string to_text(const DoctorReport& report, bool color) {
  std::ostringstream out;
  out << report.name << ": " << (report.ok() ? "ok" : "has problems") << "\n"
      << "  format          "
      << (report.format ? format_name(*report.format) : "none (no row is readable)") << "\n"
      << "  rows            " << report.rows << " (" << report.usable_rows << " usable, "
      << report.bad_rows << " bad)\n"
      << "  tokens          " << report.tokens << " (" << report.trained_tokens << " trained, "
      << percent(report.trained_tokens, report.tokens) << ")\n"
      << "  length          min " << report.length_min << ", p50 " << report.length_p50 << ", p90 "
      << report.length_p90 << ", p99 " << report.length_p99 << ", max " << report.length_max
      << " (max_length " << report.max_length << ", " << report.over_length_rows << " over)\n"
      << "  duplicates      " << report.duplicate_rows << "\n"
      << "  empty answers   " << report.empty_answers << "\n";
  for (const std::string& problem : report.problems)
    out << "  problem: " << printable(problem) << "\n";
  for (const std::string& warning : report.warnings) out << "  warning: " << warning << "\n";
  if (!report.samples.empty())
    out << "\nSamples, as the model reads them; what it learns to write stands "
        << (color ? "in green" : "in [[ ]]") << ":\n";
  for (const DoctorSample& sample : report.samples) write_sample(out, sample, color);
  return out.str();
}

}  // namespace tandem::worker::data
