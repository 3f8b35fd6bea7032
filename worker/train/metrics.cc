#include "worker/train/metrics.h"

#include "protocol/base/clock.h"
#include "protocol/base/log.h"

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>

namespace tandem::worker::train {
namespace {

namespace fs = std::filesystem;

std::array<std::uint32_t, 256> make_crc_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0u);
    table[i] = crc;
  }
  return table;
}

template <class T>
std::string little_endian(T value) {
  std::string bytes(sizeof(T), '\0');
  for (std::size_t i = 0; i < sizeof(T); ++i) bytes[i] = static_cast<char>(value >> (8 * i));
  return bytes;
}

// Protocol buffers' wire format: a field is (number << 3 | type), then a varint (0), eight bytes
// (1), length and bytes (2) or four bytes (5).
std::string varint(std::uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes.push_back(static_cast<char>(value | 0x80));
  bytes.push_back(static_cast<char>(value));
  return bytes;
}
std::string bytes_field(int number, const std::string& bytes) {
  return varint(static_cast<std::uint64_t>(number) << 3 | 2) + varint(bytes.size()) + bytes;
}
std::string double_field(int number, double value) {
  return varint(static_cast<std::uint64_t>(number) << 3 | 1) +
         little_endian(std::bit_cast<std::uint64_t>(value));
}
std::string float_field(int number, float value) {
  return varint(static_cast<std::uint64_t>(number) << 3 | 5) +
         little_endian(std::bit_cast<std::uint32_t>(value));
}

double wall_time_s() {
  return static_cast<double>(SystemClock().unix_ms()) / 1000;
}

}  // namespace

std::uint32_t masked_crc32c(const std::string& bytes) {
  static const auto table = make_crc_table();
  std::uint32_t crc = 0xffffffffu;
  for (char c : bytes) crc = (crc >> 8) ^ table[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  crc ^= 0xffffffffu;
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

MetricsWriter::Records::Records(std::string path)
    : path_(std::move(path)),
      file_(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) {}

MetricsWriter::Records::~Records() {
  if (file_ < 0) return;
  write_waiting();
  ::close(file_);
}

void MetricsWriter::Records::append(std::string record) {
  waiting_.push_back(std::move(record));
  write_waiting();
  if (waiting_.size() > kMetricsWaitingMax) waiting_.pop_front();
}

void MetricsWriter::Records::write_waiting() {
  while (!waiting_.empty() && write_whole(waiting_.front())) waiting_.pop_front();
}

bool MetricsWriter::Records::write_whole(const std::string& record) {
  struct stat before {};
  if (::fstat(file_, &before) != 0) return false;
  std::size_t done = 0;
  while (done < record.size()) {
    const ssize_t wrote = ::write(file_, record.data() + done, record.size() - done);
    if (wrote > 0) {
      done += static_cast<std::size_t>(wrote);
    } else if (wrote == 0 || errno != EINTR) {
      if (!warned_)
        log_warn("metrics wait, for ", path_, " cannot be written: ", std::strerror(errno));
      warned_ = true;
      if (done > 0) (void)!::ftruncate(file_, before.st_size);
      return false;
    }
  }
  return true;
}

Result<std::unique_ptr<MetricsWriter>> MetricsWriter::open(const std::string& directory) {
  std::error_code error;
  fs::create_directories(directory + "/tensorboard", error);
  if (error)
    return internal_error(str("cannot create ", directory, "/tensorboard: ", error.message()));
  std::unique_ptr<MetricsWriter> writer(new MetricsWriter(
      directory + "/metrics.jsonl", str(directory, "/tensorboard/events.out.tfevents.",
                                        SystemClock().unix_ms() / 1000, ".tandem")));
  if (!writer->lines_.is_open() || !writer->events_.is_open())
    return internal_error(str("cannot write metrics in ", directory));
  writer->write_record(double_field(1, wall_time_s()) + bytes_field(3, "brain.Event:2"));
  return writer;
}

void MetricsWriter::scalars(std::int64_t step,
                            const std::vector<std::pair<std::string, double>>& values) {
  nlohmann::ordered_json line{{"time", wall_time_s()}, {"step", step}};
  std::string summary;
  for (const auto& [tag, value] : values) {
    line[tag] =
        std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json(nullptr);
    summary += bytes_field(1, bytes_field(1, tag) + float_field(2, static_cast<float>(value)));
  }
  lines_.append(line.dump() + "\n");
  write_record(double_field(1, wall_time_s()) + varint(2 << 3) +
               varint(static_cast<std::uint64_t>(step)) + bytes_field(5, summary));
}

void MetricsWriter::write_record(const std::string& data) {
  const std::string length = little_endian(static_cast<std::uint64_t>(data.size()));
  events_.append(length + little_endian(masked_crc32c(length)) + data +
                 little_endian(masked_crc32c(data)));
}

}  // namespace tandem::worker::train
