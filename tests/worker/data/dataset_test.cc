#include "worker/data/dataset.h"

#include "protocol/base/random.h"
#include "tests/worker/data/data_fixtures.h"
#include "worker/text/utf8.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

namespace tandem::worker::data {
namespace {

using Json = nlohmann::ordered_json;
using Texts = std::vector<std::string>;

constexpr const char* kChat =
    R"({"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello you"}]})";

Dataset parse_ok(const std::string& jsonl, const Encoder& encoder, DatasetOptions options = {}) {
  auto dataset = parse_dataset(jsonl, "data.jsonl", encoder, options);
  EXPECT_TRUE(dataset.ok()) << dataset.status().to_string();
  return dataset.ok() ? std::move(*dataset) : Dataset{};
}

void expect_error(const std::string& jsonl, const Texts& named, DatasetOptions options = {},
                  const Encoder& encoder = chatml_encoder()) {
  const auto dataset = parse_dataset(jsonl, "data.jsonl", encoder, options);
  ASSERT_FALSE(dataset.ok()) << jsonl.substr(0, 200);
  EXPECT_EQ(dataset.status().code(), StatusCode::kInvalid) << dataset.status().to_string();
  for (const std::string& part : named)
    EXPECT_NE(dataset.status().message().find(part), std::string::npos)
        << dataset.status().message() << " does not name " << part;
}

TEST(Dataset, TrainsTheAnswerOfEachFormat) {
  const Encoder chat = chatml_encoder(), plain = plain_encoder();
  struct Case {
    const Encoder& encoder;
    std::string row;
    Format format;
    Texts trained;
  };
  const std::vector<Case> cases{
      {chat, kChat, Format::kMessages, {"Hello you<|im_end|>"}},
      {chat, R"({"prompt":"2+2=","completion":" 4"})", Format::kPromptCompletion, {" 4<|end|>"}},
      {chat,
       R"({"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},)"
       R"({"role":"user","content":"c"}],"completion":[{"role":"assistant","content":"d"}]})",
       Format::kPromptCompletion,
       {"d<|im_end|>"}},
      {chat,
       R"({"instruction":"Add","input":"1 2","output":"3"})",
       Format::kAlpaca,
       {"3<|im_end|>"}},
      {plain, R"({"instruction":"Add","input":"","output":"3"})", Format::kAlpaca, {"3<|end|>"}},
      {chat,
       R"({"id":"7","conversations":[{"from":"human","value":"x"},{"from":"gpt","value":"y"}]})",
       Format::kShareGpt,
       {"y<|im_end|>"}},
      // The first token has nothing before it that could predict it.
      {plain, R"({"text":"a b c"})", Format::kText, {" b c<|end|>"}},
  };
  for (const Case& one : cases) {
    SCOPED_TRACE(one.row);
    const Dataset dataset = parse_ok(one.row, one.encoder);
    ASSERT_EQ(dataset.examples.size(), 1u);
    EXPECT_EQ(dataset.report.format, one.format);
    EXPECT_EQ(trained_texts(one.encoder, dataset.examples[0]), one.trained);
  }
}

/// A conversation whose earlier turns the template writes differently once later ones follow.
void expect_trained_turn_by_turn(const text::ChatTemplate& chat_template, const std::string& row,
                                 const std::vector<std::size_t>& turns, const Texts& trained) {
  const Encoder encoder{text::golden_tokenizer(), chat_template};
  const Dataset dataset = parse_ok(row, encoder);
  EXPECT_EQ(dataset.report.rows, static_cast<std::int64_t>(turns.size()));
  ASSERT_EQ(dataset.examples.size(), turns.size());
  const Json messages = Json::parse(row)["messages"];
  for (std::size_t i = 0; i < turns.size(); ++i) {
    const Example& example = dataset.examples[i];
    EXPECT_EQ(example.line, 1);
    const Json first(messages.begin(), messages.begin() + static_cast<std::ptrdiff_t>(turns[i]));
    const auto prompt = chat_template.render(first, {.add_generation_prompt = true});
    ASSERT_TRUE(prompt.ok());
    const std::string text = encoder.tokenizer.decode(example.tokens);
    EXPECT_TRUE(text.starts_with(*prompt + trained[i])) << text << "\nis not after\n" << *prompt;
    EXPECT_EQ(trained_texts(encoder, example), Texts{trained[i]});
  }
}

TEST(Dataset, TrainsTurnByTurnWhereLaterTurnsChangeEarlierOnes) {
  expect_trained_turn_by_turn(
      text::golden_template("qwen3"),
      R"({"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Yes?"},)"
      R"({"role":"user","content":"weather?"},{"role":"assistant","content":"","tool_calls":)"
      R"([{"type":"function","function":{"name":"w","arguments":{"at":"Rome"}}}]},)"
      R"({"role":"tool","content":"sun"},{"role":"assistant","content":"Sunny."}]})",
      {1, 3, 5},
      {"<think>\n\n</think>\n\nYes?<|im_end|>",
       "<think>\n\n</think>\n\n<tool_call>\n{\"name\": \"w\", \"arguments\": {\"at\": "
       "\"Rome\"}}\n</tool_call><|im_end|>",
       "<think>\n\n</think>\n\nSunny.<|im_end|>"});
  // What an earlier turn thought is left out once later ones follow.
  expect_trained_turn_by_turn(
      text::golden_template("qwen3"),
      R"({"messages":[{"role":"user","content":"a"},)"
      R"({"role":"assistant","content":"<think>\nhm\n</think>\n\nb"},)"
      R"({"role":"user","content":"c"},)"
      R"({"role":"assistant","reasoning_content":"so","content":"d"}]})",
      {1, 3}, {"<think>\nhm\n</think>\n\nb<|im_end|>", "<think>\nso\n</think>\n\nd<|im_end|>"});
  // Mistral's: the system message stands in the user's message that is to be answered.
  const auto mistral = text::ChatTemplate::parse(
      "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and "
      "messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]"
      "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}");
  ASSERT_TRUE(mistral.ok()) << mistral.status().to_string();
  // Whole where no trained turn is written otherwise.
  const Encoder qwen3{text::golden_tokenizer(), text::golden_template("qwen3")};
  EXPECT_EQ(parse_ok(R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":)"
                     R"("b","weight":0},{"role":"user","content":"c"},)"
                     R"({"role":"assistant","content":"d"}]})",
                     qwen3)
                .examples.size(),
            1u);
  expect_trained_turn_by_turn(
      *mistral,
      R"({"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"a"},)"
      R"({"role":"assistant","content":"b","weight":0},{"role":"user","content":"c"},)"
      R"({"role":"assistant","content":"d"},{"role":"user","content":"e"},)"
      R"({"role":"assistant","content":"f"}]})",
      {4, 6}, {" d<|im_end|>", " f<|im_end|>"});
}

TEST(Dataset, WordsAnAlpacaRowAsTheModelExpects) {
  const Encoder chat = chatml_encoder(), plain = plain_encoder();
  const std::string row = R"({"instruction":"Add","input":"1 2","output":"3"})";
  EXPECT_EQ(chat.tokenizer.decode(parse_ok(row, chat).examples[0].tokens),
            "<|im_start|>user\nAdd\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n");
  const std::string text = plain.tokenizer.decode(parse_ok(row, plain).examples[0].tokens);
  EXPECT_NE(text.find("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3<|end|>"),
            std::string::npos);
}

TEST(Dataset, AddsBosOnceWhereTheTokenizerWantsIt) {
  const Encoder encoder{text::golden_tokenizer("llama3"), std::nullopt};
  const std::int32_t bos = *encoder.tokenizer.bos_id();
  for (const std::string row : {R"({"text":"abc"})", R"({"text":"<|begin|>abc"})"}) {
    const auto tokens = parse_ok(row, encoder).examples[0].tokens;
    EXPECT_EQ(tokens[0], bos);
    EXPECT_EQ(std::count(tokens.begin(), tokens.end(), bos), 1);
  }
}

TEST(Dataset, JoinsTextPartsOfContent) {
  const Encoder encoder = chatml_encoder();
  const std::string row = R"({"messages":[{"role":"user","content":[{"type":"text","text":"Hi"}]},)"
                          R"({"role":"assistant","content":[{"type":"text","text":"Hello"},)"
                          R"({"type":"text","text":" you"}]}]})";
  EXPECT_EQ(parse_ok(row, encoder).examples[0].tokens, parse_ok(kChat, encoder).examples[0].tokens);
}

TEST(Dataset, RefusesTokensThatTheModelHasNoEmbeddingFor) {
  Encoder encoder = chatml_encoder();
  const auto tokens = parse_ok(kChat, encoder).examples[0].tokens;
  const std::int32_t largest = *std::max_element(tokens.begin(), tokens.end());
  encoder.vocab = largest + 1;
  EXPECT_EQ(parse_ok(kChat, encoder).examples[0].tokens, tokens);
  encoder.vocab = largest;
  expect_error(kChat, {"line 1", str(largest), str("[0, ", largest, ")")}, {}, encoder);
}

TEST(Dataset, LeavesTurnsOfWeightZeroOut) {
  const Encoder encoder = chatml_encoder();
  const std::string row = R"({"messages":[{"role":"user","content":"u"},)"
                          R"({"role":"assistant","content":"one","weight":0},)"
                          R"({"role":"user","content":"v","weight":0},)"
                          R"({"role":"assistant","content":"two","weight":1}]})";
  EXPECT_EQ(trained_texts(encoder, parse_ok(row, encoder).examples[0]), Texts{"two<|im_end|>"});
  expect_error(R"({"messages":[{"role":"user","content":"u","weight":1}]})", {"line 1", "weight"});
  expect_error(R"({"messages":[{"role":"assistant","content":"u","weight":0.5}]})", {"0 or 1"});
}

/// Random text of many scripts, white space at either end included.
std::string random_text(Random& random, const text::Tokenizer& tokenizer) {
  std::string out;
  for (std::uint64_t n = random.below(30); n > 0; --n) {
    switch (random.below(4)) {
      case 0:
        out += " \n\t"[random.below(3)];
        break;
      case 1:
        text::append_code_point(out, static_cast<char32_t>(0x20 + random.below(0x2FE0)));
        break;
      default:
        // Words of the vocabulary; no half character, and no added token that takes space with it.
        const auto id = static_cast<std::int32_t>(
            random.below(static_cast<std::uint64_t>(tokenizer.vocab_size())));
        const std::string word = tokenizer.decode(std::vector{id}, true);
        if (word.find("\uFFFD") == std::string::npos && !word.starts_with('<')) out += word;
    }
  }
  return out;
}

TEST(Dataset, ChatMlTrainsExactlyTheAssistantsContentsAndTheirEnds) {
  const Encoder encoder = chatml_encoder();
  Random random(17);
  for (int round = 0; round < 300; ++round) {
    Json messages = Json::array();
    Texts expected;
    for (std::uint64_t n = 1 + random.below(6); n > 0; --n) {
      const bool assistant = random.below(2) == 0;
      const std::string content = random_text(random, encoder.tokenizer);
      messages.push_back({{"role", assistant ? "assistant" : "user"}, {"content", content}});
      if (assistant) expected.push_back(content + "<|im_end|>");
    }
    if (expected.empty()) continue;
    const Json row{{"messages", messages}};
    const Dataset dataset = parse_ok(row.dump(), encoder);
    ASSERT_EQ(dataset.examples.size(), 1u);
    const Example& example = dataset.examples[0];
    EXPECT_EQ(trained_texts(encoder, example), expected) << row.dump();
    EXPECT_EQ(encoder.tokenizer.decode(example.tokens), *encoder.chat_template->render(messages));
    // What stands before the first answer is, token for token, the prompt that serving would make.
    const auto first = std::find_if(example.labels.begin(), example.labels.end(),
                                    [](std::int32_t label) { return label != kIgnore; });
    Json before = Json::array();
    for (const Json& message : messages) {
      if (message["role"] == "assistant") break;
      before.push_back(message);
    }
    const auto prompt = text::encode_ok(
        encoder.tokenizer, *encoder.chat_template->render(before, {.add_generation_prompt = true}));
    EXPECT_EQ(prompt, std::vector<std::int32_t>(
                          example.tokens.begin(),
                          example.tokens.begin() + (first - example.labels.begin()) + 1));
  }
}

TEST(Dataset, TakesByteOrderMarksCarriageReturnsAndBlankLines) {
  const Encoder encoder = chatml_encoder();
  const std::string jsonl = std::string("\xEF\xBB\xBF") + kChat + "\r\n\r\n   \n" + kChat;
  const Dataset dataset = parse_ok(jsonl, encoder);
  ASSERT_EQ(dataset.examples.size(), 2u);
  EXPECT_EQ(dataset.report.rows, 2);
  EXPECT_EQ(dataset.examples[1].line, 4);
}

TEST(Dataset, NamesTheLineAndTheProblem) {
  const std::string good = std::string(kChat) + "\n";
  expect_error("", {"data.jsonl", "empty"});
  expect_error("\n \r\n", {"empty"});
  expect_error(good + "{\"messages\": [", {"data.jsonl line 2", "not valid JSON"});
  expect_error(good + "\n{\"text\":\"\xff\"}", {"line 3", "UTF-8", "byte 9"});
  expect_error(good + R"({"message":[]})", {"line 2", "\"message\"", "no known format"});
  expect_error("[1]", {"line 1", "object"});
  expect_error(good + R"({"text":"abc"})", {"line 2", "text format", "line 1", "messages format"});
  expect_error(R"({"text":"a","tex":1})", {"line 1", "unknown key \"tex\"", "did you mean text"});
  expect_error(R"({"messages":[{"role":"user","contents":"x"}]})",
               {"message 1", "contents", "did you mean content"});
  expect_error(R"({"messages":[{"role":"user","content":5}]})", {"message 1", "content"});
  expect_error(R"({"messages":[{"role":"user","content":[{"type":"image_url"}]}]})",
               {"message 1", "part 1", "image_url"});
  expect_error(R"({"messages":[{"role":"user","content":["x"]}]})", {"message 1", "part 1"});
  expect_error(R"([{"text":"x"}])", {"line 1", "array"});
  expect_error(R"({"messages":[]})", {"line 1", "not empty"});
  expect_error(R"({"messages":[{"content":"x"}]})", {"role"});
  for (const char* role : {"Assistant", "gpt", "ASSISTANT", "User", "human", "System"})
    expect_error(str(R"({"messages":[{"role":"assistant","content":"x"},{"role":")", role,
                     R"(","content":"x"}]})"),
                 {"message 2", role, "did you mean "});
  EXPECT_TRUE(parse_dataset(R"({"messages":[{"role":"observation","content":"x"},)"
                            R"({"role":"assistant","content":"x"}]})",
                            "d.jsonl", chatml_encoder(), {})
                  .ok());
  expect_error(R"({"prompt":"x","completion":5})", {"completion", "number"});
  expect_error(R"({"conversations":[{"from":"alien","value":"x"}]})", {"turn 1", "alien"});
  expect_error(R"({"text":"a","text":"b"})", {"twice"});
  expect_error(R"({"messages":)" + std::string(200, '[') + std::string(200, ']') + "}", {"deep"});
  expect_error(kChat, {"chat template", "line 1"}, {}, plain_encoder());
}

TEST(Dataset, RefusesRowsWithoutTrainedTokens) {
  const std::string user_only = R"({"messages":[{"role":"user","content":"x"}]})";
  expect_error(std::string(kChat) + "\n" + user_only, {"line 2", "no trained tokens"});
  expect_error(R"({"text":""})", {"line 1", "no trained tokens"});
  expect_error(R"({"prompt":"x","completion":""})", {"line 1", "no trained tokens"});
  const Dataset kept = parse_ok(std::string(kChat) + "\n" + user_only, chatml_encoder(),
                                {.refuse_untrained_rows = false});
  EXPECT_EQ(kept.examples.size(), 1u);
  EXPECT_EQ(kept.report.dropped_untrained, 1);
  expect_error(user_only, {"none of its 1 rows is left"}, {.refuse_untrained_rows = false});
}

std::string text_row(std::size_t words) {
  std::string text;
  for (std::size_t i = 0; i < words; ++i) text += " 1";
  return Json{{"text", text}}.dump() + "\n";
}

TEST(Dataset, CountsOverLongRowsWhenItRaises) {
  const std::string jsonl = text_row(5) + text_row(30) + text_row(50) + text_row(9);
  expect_error(jsonl, {"2 of 4 rows", "max_length 20", "51", "line 3", "drop or truncate"},
               {.max_length = 20});
}

TEST(Dataset, DropsOrTruncatesOverLongRowsWhenAskedTo) {
  const Encoder encoder = plain_encoder();
  const std::string jsonl = text_row(5) + text_row(30) + text_row(50);
  const Dataset dropped =
      parse_ok(jsonl, encoder, {.max_length = 20, .over_length = OverLength::kDrop});
  EXPECT_EQ(dropped.examples.size(), 1u);
  EXPECT_EQ(dropped.report.dropped_over_length, 2);
  EXPECT_EQ(dropped.report.longest_tokens, 51);
  const Dataset cut =
      parse_ok(jsonl, encoder, {.max_length = 20, .over_length = OverLength::kTruncate});
  ASSERT_EQ(cut.examples.size(), 3u);
  EXPECT_EQ(cut.report.truncated, 2);
  EXPECT_EQ(cut.examples[1].tokens.size(), 20u);
  EXPECT_EQ(cut.examples[1].labels.back(), kIgnore);
  EXPECT_EQ(cut.examples[1].trained_tokens(), 19);
  expect_error(text_row(30), {"none of its 1 rows"},
               {.max_length = 20, .over_length = OverLength::kDrop}, encoder);
}

TEST(Dataset, DropsARowWhoseAnswerWasCutOff) {
  Json row{{"prompt", std::string(200, '1')}, {"completion", "x"}};
  const Dataset dataset =
      parse_ok(row.dump() + "\n" + R"({"prompt":"a","completion":"b"})", plain_encoder(),
               {.max_length = 20, .over_length = OverLength::kTruncate});
  EXPECT_EQ(dataset.examples.size(), 1u);
  EXPECT_EQ(dataset.report.dropped_untrained, 1);
}

TEST(Dataset, ReadsAFileAndSaysWhenThereIsNone) {
  const auto path = std::filesystem::temp_directory_path() /
                    ("tandem-dataset-" + std::to_string(entropy64()) + ".jsonl");
  EXPECT_EQ(load_dataset(path.string(), chatml_encoder(), {}).status().code(),
            StatusCode::kNotFound);
  std::ofstream(path) << kChat << "\n";
  const auto dataset = load_dataset(path.string(), chatml_encoder(), {});
  ASSERT_TRUE(dataset.ok()) << dataset.status().to_string();
  EXPECT_EQ(dataset->examples.size(), 1u);
  std::filesystem::remove(path);
}

TEST(DatasetRobustness, AnyMutatedFileEndsInADatasetOrAnError) {
  const Encoder encoder = chatml_encoder();
  const Texts rows{kChat, R"({"prompt":"2+2=","completion":" 4"})",
                   R"({"instruction":"Add","input":"1 2","output":"3"})",
                   R"({"conversations":[{"from":"human","value":"x"},{"from":"gpt","value":"y"}]})",
                   R"({"text":"a b c"})"};
  const Texts words{"{",
                    "}",
                    "[",
                    "]",
                    "null",
                    "\"",
                    ":",
                    ",",
                    "\\u00",
                    "\\ud800",
                    "\n",
                    "\r",
                    "1e999",
                    "\"role\"",
                    "\"weight\":0,",
                    "\xEF\xBB\xBF",
                    "\xC3",
                    "<|im_end|>"};
  Random random(4);
  int read = 0, refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string jsonl = rows[random.below(rows.size())] + "\n";
    jsonl += jsonl;
    for (std::uint64_t n = random.below(3); n > 0; --n) {
      const std::size_t at = random.below(jsonl.size());
      if (random.below(2) == 0)
        jsonl.insert(at, words[random.below(words.size())]);
      else
        jsonl[at] = static_cast<char>(random.below(256));
    }
    const auto dataset = parse_dataset(jsonl, "x", encoder, {});
    (dataset.ok() ? read : refused) += 1;
    if (!dataset.ok()) {
      EXPECT_FALSE(dataset.status().message().empty());
    }
  }
  EXPECT_GT(read, 300);
  EXPECT_GT(refused, 300);
}

}  // namespace
}  // namespace tandem::worker::data
