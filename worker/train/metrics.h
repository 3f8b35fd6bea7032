// A run's numbers on disk, for people and dashboards: DIR/metrics.jsonl (one JSON object per call)
// and DIR/tensorboard/events.out.tfevents.* (scalars). Written as they come, appended after a
// resume. One thread.
//
// Formats: TFRecord framing (length, masked CRC-32C, data, masked CRC-32C) around tensorflow.Event
// messages, of which only wall_time, step, file_version and summary.value{tag, simple_value} are
// written.
#pragma once

#include "protocol/base/result.h"

#include <cstdint>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace tandem::worker::train {

class MetricsWriter {
 public:
  /// Makes the folders. internal_error when they cannot be written.
  static Result<std::unique_ptr<MetricsWriter>> open(const std::string& directory);

  /// Scalars of one step; flushed before returning. A full disk loses metrics, never the job.
  void scalars(std::int64_t step, const std::vector<std::pair<std::string, double>>& values);

 private:
  MetricsWriter() = default;
  void write_record(const std::string& data);
  std::ofstream lines_, events_;
};

/// CRC-32C (Castagnoli) of bytes, as TFRecord masks it: ((crc >> 15) | (crc << 17)) + 0xa282ead8.
std::uint32_t masked_crc32c(const std::string& bytes);

}  // namespace tandem::worker::train
