#include "worker/train/metrics.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace tandem::worker::train {
namespace {

namespace fs = std::filesystem;

std::string read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

class Metrics : public testing::Test {
 protected:
  Metrics() : folder(fs::path(testing::TempDir()) / str("metrics-", ::getpid())) {
    fs::remove_all(folder);
  }
  ~Metrics() override { fs::remove_all(folder); }
  fs::path folder;
};

TEST(MaskedCrc, IsThatOfTfRecord) {
  // CRC-32C("123456789") = 0xe3069283 (RFC 3720, appendix B.4), masked as TFRecord masks.
  const std::uint32_t crc = 0xe3069283u;
  EXPECT_EQ(masked_crc32c("123456789"), ((crc >> 15) | (crc << 17)) + 0xa282ead8u);
}

TEST_F(Metrics, LinesAreJsonAndANumberThatIsNoneIsNull) {
  auto writer = MetricsWriter::open(folder).value();
  writer->scalars(1, {{"train/loss", 2.5}, {"train/grad_norm", 0.25}});
  writer->scalars(2, {{"train/loss", std::nan("")}});
  std::ifstream lines(folder / "metrics.jsonl");
  std::string line;
  std::getline(lines, line);
  const auto first = nlohmann::json::parse(line);
  EXPECT_EQ(first["step"], 1);
  EXPECT_EQ(first["train/loss"], 2.5);
  std::getline(lines, line);
  EXPECT_TRUE(nlohmann::json::parse(line)["train/loss"].is_null());
}

TEST_F(Metrics, WhatAFullDiskDoesNotTakeIsWrittenWholeLater) {
  auto writer = MetricsWriter::open(folder).value();
  writer->scalars(1, {{"train/loss", 1.5}});
  const std::string before = read(folder / "metrics.jsonl");
  // A limit on the file's size stands for the disk: the first bytes of the next line still fit.
  rlimit old{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit full{before.size() + 10, old.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &full), 0);
  writer->scalars(2, {{"train/loss", 2.5}});
  writer->scalars(3, {{"train/loss", 3.5}});
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(read(folder / "metrics.jsonl"), before) << "no torn line";
  writer->scalars(4, {{"train/loss", 4.5}});
  std::istringstream lines(read(folder / "metrics.jsonl"));
  int step = 0;
  for (std::string line; std::getline(lines, line);)
    EXPECT_EQ(nlohmann::json::parse(line)["step"], ++step);
  EXPECT_EQ(step, 4);
}

TEST_F(Metrics, EventsAreFramedRecordsWithTheTagAndTheValue) {
  auto writer = MetricsWriter::open(folder).value();
  writer->scalars(300, {{"train/loss", 1.5}});
  std::string file;
  for (const auto& entry : fs::directory_iterator(folder / "tensorboard"))
    file = read(entry.path());
  std::vector<std::string> records;
  for (std::size_t at = 0; at < file.size();) {
    std::uint64_t length = 0;
    std::uint32_t length_crc = 0, data_crc = 0;
    ASSERT_LE(at + 12, file.size());
    std::memcpy(&length, file.data() + at, 8);
    std::memcpy(&length_crc, file.data() + at + 8, 4);
    EXPECT_EQ(length_crc, masked_crc32c(file.substr(at, 8)));
    ASSERT_LE(at + 16 + length, file.size());
    records.push_back(file.substr(at + 12, length));
    std::memcpy(&data_crc, file.data() + at + 12 + length, 4);
    EXPECT_EQ(data_crc, masked_crc32c(records.back()));
    at += 16 + length;
  }
  ASSERT_EQ(records.size(), 2u);
  EXPECT_NE(records[0].find("brain.Event:2"), std::string::npos);
  EXPECT_NE(records[1].find("train/loss"), std::string::npos);
  EXPECT_NE(records[1].find(std::string("\x10\xac\x02", 3)), std::string::npos);      // step 300
  EXPECT_NE(records[1].find(std::string("\x15\0\0\xc0\x3f", 5)), std::string::npos);  // 1.5f
}

TEST_F(Metrics, AResumedRunAppends) {
  MetricsWriter::open(folder).value()->scalars(1, {{"a", 1.0}});
  MetricsWriter::open(folder).value()->scalars(2, {{"a", 2.0}});
  const std::string lines = read(folder / "metrics.jsonl");
  EXPECT_EQ(std::count(lines.begin(), lines.end(), '\n'), 2);
}

TEST(MetricsWriter, AFolderThatCannotBeMadeIsAnErrorThatNamesIt) {
  const auto writer = MetricsWriter::open("/proc/no-such-folder");
  EXPECT_EQ(writer.status().code(), StatusCode::kInternal);
  EXPECT_NE(writer.status().message().find("/proc/no-such-folder"), std::string::npos);
}

}  // namespace
}  // namespace tandem::worker::train
