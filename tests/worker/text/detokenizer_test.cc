#include "worker/text/detokenizer.h"

#include "protocol/base/random.h"
#include "tests/worker/text/text_fixtures.h"
#include "worker/text/utf8.h"

#include <gtest/gtest.h>

namespace tandem::worker::text {
namespace {

struct Streamed {
  std::string text;
  bool stopped = false;
  std::string stop_string;
  std::size_t tokens = 0;
};

Streamed stream(const Tokenizer& tokenizer, const std::vector<std::int32_t>& ids,
                DetokenizerOptions options) {
  auto detokenizer = Detokenizer::create(tokenizer, std::move(options));
  EXPECT_TRUE(detokenizer.ok()) << detokenizer.status().to_string();
  Streamed all;
  const auto take = [&](const Detokenizer::Update& update) {
    EXPECT_EQ(find_invalid_utf8(update.text), std::string::npos) << "half a character";
    all.text += update.text;
    if (update.stopped) {
      all.stopped = true;
      all.stop_string = update.stop_string;
    }
  };
  for (const std::int32_t id : ids) {
    take(detokenizer->append(id));
    ++all.tokens;
    if (all.stopped) break;
  }
  take(detokenizer->finish());
  return all;
}

/// One id per byte: the hardest way to cut a text.
std::vector<std::int32_t> byte_ids(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<std::int32_t> of_byte(256, -1);
  for (std::int32_t id = 0; id < tokenizer.vocab_size(); ++id)
    if (tokenizer.token_bytes(id).size() == 1)
      of_byte[static_cast<unsigned char>(tokenizer.token_bytes(id)[0])] = id;
  std::vector<std::int32_t> ids;
  for (const char c : text) ids.push_back(of_byte[static_cast<unsigned char>(c)]);
  return ids;
}

TEST(Detokenizer, NeverEmitsHalfACharacterAndLosesNone) {
  const Tokenizer tokenizer = golden_tokenizer();
  const std::string text = "naïve 👩‍👩‍👧 日本語 🇩🇪 é x";
  EXPECT_EQ(stream(tokenizer, byte_ids(tokenizer, text), {}).text, text);
  EXPECT_EQ(stream(tokenizer, encode_ok(tokenizer, text), {}).text, text);
}

TEST(Detokenizer, StreamsWhatDecodeGivesForAnyIds) {
  Random random(9);
  for (int round = 0; round < 600; ++round) {
    const Tokenizer tokenizer = round % 3 == 0   ? golden_tokenizer()
                                : round % 3 == 1 ? golden_tokenizer("llama2", "{}")
                                                 : golden_tokenizer("metaspace", "{}");
    std::vector<std::int32_t> ids;
    for (std::uint64_t n = random.below(20); n > 0; --n)
      ids.push_back(static_cast<std::int32_t>(
          random.below(static_cast<std::uint64_t>(tokenizer.vocab_size()))));
    EXPECT_EQ(stream(tokenizer, ids, {}).text, tokenizer.decode(ids, true));
    EXPECT_EQ(stream(tokenizer, ids, {.skip_special = false}).text, tokenizer.decode(ids, false));
  }
}

TEST(Detokenizer, ReleasesAnUnfinishedCharacterOnlyAtTheEnd) {
  const Tokenizer tokenizer = golden_tokenizer();
  auto detokenizer = Detokenizer::create(tokenizer, {});
  const auto ids = byte_ids(tokenizer, "é");
  EXPECT_EQ(detokenizer->append(ids[0]).text, "");
  EXPECT_EQ(detokenizer->finish().text, "\uFFFD");
}

TEST(Detokenizer, CutsAtAStopStringThatSpansTokens) {
  const Tokenizer tokenizer = golden_tokenizer();
  for (const bool bytewise : {true, false}) {
    const std::string text = "Hello\nUser: more";
    const auto ids = bytewise ? byte_ids(tokenizer, text) : encode_ok(tokenizer, text);
    const Streamed out = stream(tokenizer, ids, {.stop_strings = {"\nUser:"}});
    EXPECT_EQ(out.text, "Hello");
    EXPECT_TRUE(out.stopped);
    EXPECT_EQ(out.stop_string, "\nUser:");
    EXPECT_LT(out.tokens, ids.size()) << "generation has to end at the match";
    EXPECT_EQ(
        stream(tokenizer, ids, {.stop_strings = {"\nUser:"}, .include_stop_string = true}).text,
        "Hello\nUser:");
  }
}

TEST(Detokenizer, HoldsAPossiblePrefixBackAndReleasesItWhenItFails) {
  const Tokenizer tokenizer = golden_tokenizer();
  auto detokenizer = Detokenizer::create(tokenizer, {.stop_strings = {"abab!"}});
  std::string shown;
  for (const std::int32_t id : byte_ids(tokenizer, "xaba")) shown += detokenizer->append(id).text;
  EXPECT_EQ(shown, "x");
  shown += detokenizer->append(byte_ids(tokenizer, "c")[0]).text;
  EXPECT_EQ(shown, "xabac");
  // A prefix inside a failed match counts: "ababab!" holds the stop string from its third letter.
  EXPECT_EQ(stream(tokenizer, byte_ids(tokenizer, "ababab!z"), {.stop_strings = {"abab!"}}).text,
            "ab");
}

TEST(Detokenizer, HoldsWholeCharactersOfAStopStringsPrefix) {
  const Tokenizer tokenizer = golden_tokenizer();
  // "日" and "旦" share their first two bytes.
  EXPECT_EQ(stream(tokenizer, byte_ids(tokenizer, "a旦b"), {.stop_strings = {"日"}}).text, "a旦b");
  EXPECT_EQ(stream(tokenizer, byte_ids(tokenizer, "a日b"), {.stop_strings = {"日"}}).text, "a");
}

TEST(Detokenizer, StopsAtTheSamePlaceHoweverTheTextIsCut) {
  const Tokenizer tokenizer = golden_tokenizer();
  Random random(21);
  for (int round = 0; round < 500; ++round) {
    const auto word = [&](std::uint64_t most) {
      std::string out;
      for (std::uint64_t n = 1 + random.below(most); n > 0; --n)
        out += static_cast<char>('a' + random.below(3));
      return out;
    };
    const std::string text = word(24);
    DetokenizerOptions options;
    for (std::uint64_t n = 1 + random.below(3); n > 0; --n) options.stop_strings.push_back(word(4));
    std::size_t end = std::string::npos, begin = text.size();
    for (const std::string& stop : options.stop_strings) {
      const std::size_t at = text.find(stop);
      if (at == std::string::npos) continue;
      if (at + stop.size() < end || (at + stop.size() == end && at < begin)) {
        end = at + stop.size();
        begin = at;
      }
    }
    const std::string expected = text.substr(0, begin);
    EXPECT_EQ(stream(tokenizer, byte_ids(tokenizer, text), options).text, expected);
    EXPECT_EQ(stream(tokenizer, encode_ok(tokenizer, text), options).text, expected);
  }
}

TEST(Detokenizer, AddsNothingAfterItStopped) {
  const Tokenizer tokenizer = golden_tokenizer();
  auto detokenizer = Detokenizer::create(tokenizer, {.stop_strings = {"b"}});
  for (const std::int32_t id : byte_ids(tokenizer, "ab")) (void)detokenizer->append(id);
  EXPECT_EQ(detokenizer->append(byte_ids(tokenizer, "c")[0]).text, "");
  EXPECT_EQ(detokenizer->finish().text, "");
}

TEST(Detokenizer, RefusesStopStringsOverTheLimits) {
  const Tokenizer tokenizer = golden_tokenizer();
  const auto code = [&](std::vector<std::string> stops) {
    return Detokenizer::create(tokenizer, {.stop_strings = std::move(stops)}).status().code();
  };
  EXPECT_EQ(code({""}), StatusCode::kInvalid);
  EXPECT_EQ(code({"\xff"}), StatusCode::kInvalid);
  EXPECT_EQ(code({std::string(kStopStringBytesMax + 1, 'a')}), StatusCode::kInvalid);
  EXPECT_EQ(code(std::vector<std::string>(kStopStringsMax + 1, "a")), StatusCode::kInvalid);
}

}  // namespace
}  // namespace tandem::worker::text
