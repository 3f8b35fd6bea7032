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
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace tandem::worker::train {

/// Of each file, while its disk is full; then the oldest go.
inline constexpr std::size_t kMetricsWaitingMax = 4096;

class MetricsWriter {
 public:
  /// Makes the folders. internal_error when they cannot be written.
  static Result<std::unique_ptr<MetricsWriter>> open(const std::string& directory);

  /// Scalars of one step, in the files before returning. What a full disk does not take waits for
  /// the next call, up to kMetricsWaitingMax records of each file; the job goes on.
  void scalars(std::int64_t step, const std::vector<std::pair<std::string, double>>& values);

 private:
  /// A file to which whole records are appended, in order. What is written of one that does not fit
  /// is taken back.
  class Records {
   public:
    explicit Records(std::string path);
    ~Records();
    Records(const Records&) = delete;
    Records& operator=(const Records&) = delete;
    [[nodiscard]] bool is_open() const { return file_ >= 0; }
    void append(std::string record);

   private:
    void write_waiting();
    bool write_whole(const std::string& record);
    std::string path_;
    int file_ = -1;
    bool warned_ = false;
    std::deque<std::string> waiting_;
  };

  MetricsWriter(const std::string& lines, const std::string& events)
      : lines_(lines), events_(events) {}
  void write_record(const std::string& data);
  Records lines_, events_;
};

/// CRC-32C (Castagnoli) of bytes, as TFRecord masks it: ((crc >> 15) | (crc << 17)) + 0xa282ead8.
std::uint32_t masked_crc32c(const std::string& bytes);

}  // namespace tandem::worker::train
