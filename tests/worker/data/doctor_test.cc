#include "worker/data/doctor.h"

#include "tests/worker/data/data_fixtures.h"

#include <gtest/gtest.h>

namespace tandem::worker::data {
namespace {

using Json = nlohmann::ordered_json;

std::string chat_row(const std::string& question, const std::string& answer) {
  return Json{{"messages",
               {{{"role", "user"}, {"content", question}},
                {{"role", "assistant"}, {"content", answer}}}}}
             .dump() +
         "\n";
}

DoctorReport examine_ok(const std::string& jsonl, const Encoder& encoder,
                        const DoctorOptions& options = {}) {
  auto report = examine(jsonl, "d.jsonl", encoder, options);
  EXPECT_TRUE(report.ok()) << report.status().to_string();
  return report.ok() ? std::move(*report) : DoctorReport{};
}

TEST(Doctor, CountsWhatTrainingWouldSee) {
  const Encoder encoder = chatml_encoder();
  const std::string jsonl = chat_row("a", "b") + chat_row("c", "d") + chat_row("a", "b") +
                            chat_row("e", "  ") + "\n" + chat_row("long", std::string(300, '1'));
  DoctorOptions options;
  options.dataset.max_length = 100;
  const DoctorReport report = examine_ok(jsonl, encoder, options);
  EXPECT_EQ(report.format, Format::kMessages);
  EXPECT_EQ(report.rows, 5);
  EXPECT_EQ(report.usable_rows, 4);
  EXPECT_EQ(report.duplicate_rows, 1);
  EXPECT_EQ(report.empty_answers, 1);
  EXPECT_EQ(report.over_length_rows, 1);
  EXPECT_EQ(report.bad_rows, 0);
  EXPECT_EQ(report.rows_without_end, 0);
  EXPECT_GT(report.length_max, 100);
  EXPECT_LE(report.length_min, report.length_p50);
  EXPECT_LE(report.length_p50, report.length_p90);
  EXPECT_LE(report.length_p99, report.length_max);
  EXPECT_FALSE(report.ok()) << "over-long rows are refused unless asked otherwise";
  options.dataset.over_length = OverLength::kDrop;
  EXPECT_TRUE(examine_ok(jsonl, encoder, options).ok());
}

TEST(Doctor, AgreesWithTheDatasetThatTrainingReads) {
  const Encoder encoder = chatml_encoder();
  const std::string jsonl = chat_row("a", "b") + chat_row("c", "d e f");
  const DoctorReport report = examine_ok(jsonl, encoder);
  const auto dataset = parse_dataset(jsonl, "d.jsonl", encoder, {});
  ASSERT_TRUE(dataset.ok());
  EXPECT_TRUE(report.ok());
  EXPECT_EQ(report.tokens, dataset->total_tokens());
  EXPECT_EQ(report.trained_tokens, dataset->trained_tokens());
  EXPECT_EQ(report.length_max, dataset->report.longest_tokens);
}

TEST(Doctor, GoesOnAfterBadRowsAndListsThem) {
  const std::string jsonl = "{bad\n" + chat_row("a", "b") + "{\"text\":\"x\"}\n" +
                            R"({"messages":[{"role":"user","content":"x"}]})" + "\n" +
                            chat_row("c", "d");
  const DoctorReport report = examine_ok(jsonl, chatml_encoder());
  EXPECT_EQ(report.rows, 5);
  EXPECT_EQ(report.bad_rows, 3);
  EXPECT_EQ(report.usable_rows, 2);
  EXPECT_EQ(report.untrained_rows, 1);
  ASSERT_EQ(report.problems.size(), 3u);
  EXPECT_NE(report.problems[0].find("line 1"), std::string::npos);
  EXPECT_NE(report.problems[1].find("line 3"), std::string::npos);
  EXPECT_NE(report.problems[2].find("line 4"), std::string::npos);
}

TEST(Doctor, HoldsAtMostItsLimitOfProblems) {
  std::string jsonl;
  for (std::size_t i = 0; i < 5 * kDoctorProblemsMax; ++i) jsonl += "{\n";
  const DoctorReport report = examine_ok(jsonl, chatml_encoder());
  EXPECT_EQ(report.problems.size(), kDoctorProblemsMax);
  EXPECT_FALSE(report.format.has_value()) << "no row was readable";
  EXPECT_TRUE(to_json(report)["format"].is_null());
  EXPECT_NE(to_text(report, false).find("no row is readable"), std::string::npos);
  EXPECT_EQ(report.bad_rows, static_cast<std::int64_t>(5 * kDoctorProblemsMax));
}

TEST(Doctor, MarksTheTrainedTokensOfItsSamples) {
  const DoctorReport report =
      examine_ok(chat_row("a", "b") + chat_row("c", "d"), chatml_encoder(), {.samples = 2});
  ASSERT_EQ(report.samples.size(), 2u);
  ASSERT_EQ(report.samples[1].segments.size(), 3u);
  EXPECT_EQ(report.samples[1].segments[0].text,
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_FALSE(report.samples[1].segments[0].trained);
  EXPECT_EQ(report.samples[1].segments[1].text, "d<|im_end|>");
  EXPECT_TRUE(report.samples[1].segments[1].trained);
  EXPECT_EQ(report.samples[1].segments[2].text, "\n");
  EXPECT_NE(to_text(report, false).find("[[d<|im_end|>]]"), std::string::npos);
  EXPECT_NE(to_text(report, true).find("\x1b[32md<|im_end|>\x1b[0m"), std::string::npos);
  const Json json = to_json(report);
  EXPECT_EQ(json["samples"][1]["segments"][1]["trained"], true);
  EXPECT_EQ(json["rows"], 2);
}

TEST(Doctor, CutsLongSamplesAndNeutralisesControlCharacters) {
  const DoctorReport report =
      examine_ok(chat_row("\x1b[2Jx", std::string(3 * kDoctorSampleBytesMax, '1')),
                 chatml_encoder(), {.dataset = {.max_length = 100000}});
  std::size_t bytes = 0;
  for (const SampleSegment& segment : report.samples[0].segments) bytes += segment.text.size();
  EXPECT_LE(bytes, kDoctorSampleBytesMax + 8);
  EXPECT_EQ(to_text(report, false).find('\x1b'), std::string::npos);
}

TEST(Doctor, WarnsWhenTheModelWouldNotLearnToStop) {
  const auto no_end = text::ChatTemplate::parse(
      "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
      "{% if add_generation_prompt %}assistant: {% endif %}");
  ASSERT_TRUE(no_end.ok());
  const Encoder encoder{text::golden_tokenizer(), *no_end};
  const DoctorReport report = examine_ok(chat_row("a", "b"), encoder);
  EXPECT_EQ(report.rows_without_end, 1);
  ASSERT_FALSE(report.warnings.empty());
  EXPECT_NE(report.warnings[0].find("learn to stop"), std::string::npos);
}

TEST(Doctor, RefusesAnEmptyFile) {
  EXPECT_EQ(examine("\n\n", "d.jsonl", chatml_encoder()).status().code(), StatusCode::kInvalid);
}

}  // namespace
}  // namespace tandem::worker::data
