#include "protocol/codec/record_codec.h"

#include "protocol/base/random.h"

#include <gtest/gtest.h>

namespace tandem::protocol {
namespace {

std::span<const std::byte> as_bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

JobRecord example_job() {
  JobRecord job;
  job.id = "job-1";
  job.name = "n";
  job.state = JobState::kPaused;
  job.priority = -3;
  job.kind = "train";
  job.spec_json = "{}";
  job.model = sha256("m");
  job.dataset = sha256("d");
  job.adapter = "a";
  job.epoch = ~0ull;
  job.attempts = 2;
  job.step = 3;
  job.total_steps = 4;
  job.error = "e";
  job.submitted_unix_ms = 5;
  job.started_unix_ms = 6;
  job.ended_unix_ms = 7;
  job.updated_unix_ms = 8;
  job.tenant = "t";
  job.idempotency_key = std::string("k\0k", 3);
  job.worker = "w/0";
  job.progress_seq = 9;
  job.published_version = 10;
  return job;
}

/// Encoded again after decoding: equal bytes mean that no field was lost, because encoding is
/// deterministic and (checked per record below) every field changes the bytes.
template <class Record>
void expect_round_trip(const Record& record) {
  const std::string bytes = encode_record(record);
  const auto decoded = decode_record<Record>(as_bytes(bytes));
  ASSERT_TRUE(decoded.ok()) << decoded.status().to_string();
  EXPECT_EQ(encode_record(*decoded), bytes);
  EXPECT_NE(bytes, encode_record(Record{}));
}

TEST(RecordCodec, RoundTripsEveryRecord) {
  expect_round_trip(
      ModelRecord{"m",
                  sha256("1"),
                  "/p",
                  true,
                  "llama",
                  5,
                  {{"f", 1, 2, 3, sha256("f"), {sha256("c"), sha256("d")}}, {"g", 4, 5, 6, {}, {}}},
                  7,
                  "{}",
                  "job-1",
                  sha256("base")});
  expect_round_trip(AdapterVersionRecord{"a", 3, sha256("1"), sha256("2"), "job", 4, "{}"});
  expect_round_trip(
      AliasRecord{"a", "b", 2, sha256("1"), true, 4, {{"b", 1, sha256("0"), 9, "publish"}}});
  expect_round_trip(ManifestRecord{sha256("1"), ManifestKind::kDataset, "text", sha256("2"), 3});
  expect_round_trip(CheckpointRecord{"j", 10, 2, sha256("1"), 3});
  expect_round_trip(example_job());
  expect_round_trip(JobEventRecord{"j", 1, 2, "info", "step", "m", "{}"});
  expect_round_trip(ResultRecord{sha256("k"), sha256("t"), 1, 2, 3, std::string("p\0p", 3), "t"});
  expect_round_trip(DatasetRecord{sha256("1"), "d", 2, 3, 4, "messages"});
  expect_round_trip(SettingRecord{"s", "v"});
  expect_round_trip(IdempotencyRecord{"t", "k", sha256("r"), "result", 5});
}

TEST(RecordCodec, KeepsEveryFieldOfAJob) {
  const auto job = decode_record<JobRecord>(as_bytes(encode_record(example_job()))).value();
  EXPECT_EQ(job.state, JobState::kPaused);
  EXPECT_EQ(job.priority, -3);
  EXPECT_EQ(job.epoch, ~0ull);
  EXPECT_EQ(job.model, sha256("m"));
  EXPECT_EQ(job.idempotency_key.size(), 3u);
  EXPECT_EQ(job.total_steps, 4);
  EXPECT_EQ(job.worker, "w/0");
  EXPECT_EQ(job.published_version, 10u);
  EXPECT_EQ(job.error, "e");
}

TEST(RecordCodec, RefusesTruncationAndTrailingBytes) {
  const std::string bytes = encode_record(example_job());
  for (std::size_t n = 0; n < bytes.size(); ++n)
    ASSERT_EQ(decode_record<JobRecord>(as_bytes(bytes.substr(0, n))).status().code(),
              StatusCode::kCorrupt)
        << n;
  EXPECT_EQ(decode_record<JobRecord>(as_bytes(bytes + std::string(8, '\0'))).status().code(),
            StatusCode::kCorrupt);
}

TEST(RecordCodec, RefusesUnknownStates) {
  JobRecord job;
  job.state = static_cast<JobState>(200);
  EXPECT_EQ(decode_record<JobRecord>(as_bytes(encode_record(job))).status().code(),
            StatusCode::kCorrupt);
}

TEST(RecordCodec, MutationsNeverCrash) {
  const std::string bytes = encode_record(example_job());
  Random random(4);
  int decoded = 0;
  for (int round = 0; round < 50000; ++round) {
    std::string mutated = bytes;
    for (std::uint64_t n = random.below(4) + 1; n > 0; --n)
      mutated[random.below(mutated.size())] = static_cast<char>(random.next());
    decoded += decode_record<JobRecord>(as_bytes(mutated)).ok();
  }
  EXPECT_GT(decoded, 0);
  EXPECT_LT(decoded, 50000);
}

}  // namespace
}  // namespace tandem::protocol
