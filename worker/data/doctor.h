// The data doctor: reads a data set as training would and says what training would see. It goes on
// after a bad row and lists the first problems, so that a file can be mended in one pass.
#pragma once

#include "worker/data/dataset.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tandem::worker::data {

/// Problems and samples that one report holds at most.
inline constexpr std::size_t kDoctorProblemsMax = 20;
inline constexpr std::size_t kDoctorSamplesMax = 16;
/// Text of one sample, in bytes; longer samples are cut in the middle.
inline constexpr std::size_t kDoctorSampleBytesMax = 4000;

struct DoctorOptions {
  DatasetOptions dataset{};
  std::size_t samples = 3;  ///< decoded rows to show, spread evenly over the file
};

/// A stretch of a decoded sample.
struct SampleSegment {
  std::string text;
  bool trained = false;
};

struct DoctorSample {
  std::int64_t line = 0;
  std::int64_t tokens = 0;
  std::int64_t trained_tokens = 0;
  std::vector<SampleSegment> segments;
};

struct DoctorReport {
  std::string name;
  std::optional<Format> format;  ///< absent: no row was readable
  std::int64_t rows = 0;         ///< as DatasetReport counts them
  std::int64_t usable_rows = 0;  ///< what training would keep
  std::int64_t tokens = 0;       ///< of all rows that could be read
  std::int64_t trained_tokens = 0;
  std::int64_t length_min = 0, length_p50 = 0, length_p90 = 0, length_p99 = 0, length_max = 0;
  std::int64_t max_length = 0;
  std::int64_t over_length_rows = 0;
  std::int64_t duplicate_rows = 0;    ///< rows whose tokens and labels an earlier row has
  std::int64_t empty_answers = 0;     ///< assistant turns, completions or outputs of blank text
  std::int64_t untrained_rows = 0;    ///< rows without a trained token
  std::int64_t rows_without_end = 0;  ///< rows whose last trained token is no special token
  std::int64_t bad_rows = 0;          ///< rows that training would refuse
  std::vector<std::string> problems;  ///< the first kDoctorProblemsMax errors
  std::vector<std::string> warnings;
  std::vector<DoctorSample> samples;
  /// Whether training would take the file as it is, under the given options.
  [[nodiscard]] bool ok() const { return problems.empty(); }
};

/// Examines JSON lines in memory. Only an empty file or a file over the limits is an error here;
/// everything else is in the report.
Result<DoctorReport> examine(std::string_view jsonl, const std::string& name,
                             const Encoder& encoder, const DoctorOptions& options = {});
/// The same from a file. Not found: no such file.
Result<DoctorReport> examine_file(const std::string& path, const Encoder& encoder,
                                  const DoctorOptions& options = {});

/// The report as one JSON object.
nlohmann::ordered_json to_json(const DoctorReport& report);
/// The report for a terminal. Trained text stands in green where `color`, else in [[ ]].
std::string to_text(const DoctorReport& report, bool color);

}  // namespace tandem::worker::data
