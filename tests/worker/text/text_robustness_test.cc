// Mutated files of strangers: whatever happens to their bytes, loading ends in a value or a Status.
#include "protocol/base/random.h"
#include "tests/worker/text/text_fixtures.h"

#include <gtest/gtest.h>

#include <iterator>
#include <vector>

namespace tandem::worker::text {
namespace {

using Json = nlohmann::ordered_json;

/// `source` with a few bytes, stretches or words changed, dropped, repeated or put in.
std::string mutate(const std::string& source, const std::vector<std::string>& words,
                   Random& random) {
  std::string text = source;
  for (std::uint64_t n = 1 + random.below(5); n > 0 && !text.empty(); --n) {
    const std::size_t at = random.below(text.size());
    const std::size_t length = 1 + random.below(std::min<std::size_t>(text.size() - at, 24));
    switch (random.below(5)) {
      case 0:
        text[at] = static_cast<char>(random.below(256));
        break;
      case 1:
        text.erase(at, length);
        break;
      case 2:
        text.insert(at, text.substr(at, length));
        break;
      case 3:
        text.insert(at, words[random.below(words.size())]);
        break;
      default:
        text.resize(at);
    }
  }
  return text;
}

TEST(ChatTemplateRobustness, AnyMutatedTemplateEndsInTextOrAnError) {
  const std::vector<std::string> words{"{{",
                                       "}}",
                                       "{%",
                                       "%}",
                                       "{#",
                                       "#}",
                                       "-%}",
                                       "{%-",
                                       "'",
                                       "\"",
                                       "(",
                                       ")",
                                       "[",
                                       "]",
                                       "|",
                                       "~",
                                       "not ",
                                       " in ",
                                       " is ",
                                       " if ",
                                       "else",
                                       "endif",
                                       "endfor",
                                       "{% for x in messages %}",
                                       "{% set x = 1 %}",
                                       "{% macro m() %}",
                                       "namespace()",
                                       "range(99999999)",
                                       "* 99999999",
                                       "** 99999999",
                                       "loop",
                                       "loop.index",
                                       "messages",
                                       "[::-1]",
                                       ".strip()",
                                       "|tojson",
                                       "|sort",
                                       "|map('upper')",
                                       "\\",
                                       "\\u",
                                       "\n",
                                       "9223372036854775807",
                                       "-",
                                       "none",
                                       "m(",
                                       "ns.x"};
  const Json messages =
      Json::parse(R"([{"role":"user","content":"a b"},{"role":"assistant","content":"c",)"
                  R"("tool_calls":[{"function":{"name":"f","arguments":{"x":1}}}]}])");
  Random random(1);
  int rendered = 0, refused = 0;
  for (const char* name : {"smollm2", "llama2", "llama31", "qwen25", "qwen3", "generation",
                           "control", "expressions", "filters", "methods"}) {
    const std::string source = read_golden(std::string("templates/") + name + ".jinja");
    for (int i = 0; i < 200; ++i) {
      const auto parsed = ChatTemplate::parse(mutate(source, words, random));
      if (!parsed.ok()) {
        ++refused;
        EXPECT_FALSE(parsed.status().message().empty());
        continue;
      }
      const auto text = parsed->render(messages, {.bos_token = "<s>", .eos_token = "</s>"});
      (text.ok() ? rendered : refused) += 1;
      (void)parsed->render_with_spans(messages);
    }
  }
  EXPECT_GT(rendered, 100) << "mutations this harsh test nothing but the lexer";
  EXPECT_GT(refused, 100);
}

TEST(TokenizerRobustness, AnyMutatedFileEndsInATokenizerOrAnError) {
  const std::vector<std::string> words{"{",
                                       "}",
                                       "[",
                                       "]",
                                       ",",
                                       ":",
                                       "null",
                                       "-1",
                                       "1e99",
                                       "\"\"",
                                       "true",
                                       "\"id\"",
                                       "\\u0000",
                                       "{}",
                                       "[[[[",
                                       "\"type\":",
                                       "99999999999999999999",
                                       "\"Regex\":\"(\"",
                                       "\"vocab\""};
  Random random(2);
  int loaded = 0, refused = 0;
  for (const char* kind : {"gpt2", "llama3", "qwen2"}) {
    const std::string source = read_golden(std::string("tokenizer_") + kind + ".json");
    for (int i = 0; i < 250; ++i) {
      const auto tokenizer = Tokenizer::from_json(mutate(source, words, random));
      if (!tokenizer.ok()) {
        ++refused;
        continue;
      }
      ++loaded;
      const auto ids = tokenizer->encode("Hello <|im_start|> größer 123\n\n  x");
      if (ids.ok()) (void)tokenizer->decode(*ids);
    }
  }
  EXPECT_GT(loaded, 0);
  EXPECT_GT(refused, 100);
}

/// A random node of a JSON value, whole subtrees as often as leaves.
Json& random_node(Json& root, Random& random) {
  Json* node = &root;
  while (!node->empty() && node->is_structured() && random.below(5) != 0) {
    auto child = node->begin();
    std::advance(child, static_cast<std::ptrdiff_t>(random.below(node->size())));
    node = &*child;
  }
  return *node;
}

TEST(TokenizerRobustness, AnyValueInAnyPlaceEndsInATokenizerOrAnError) {
  const std::vector<Json> values{Json(),
                                 true,
                                 false,
                                 0,
                                 -1,
                                 1e300,
                                 5000000000,
                                 "",
                                 "a b",
                                 "Regex",
                                 "BPE",
                                 Json::array(),
                                 Json::object(),
                                 Json::array({1, "x"}),
                                 Json{{"type", "Sequence"}},
                                 Json{{"type", "ByteLevel"}},
                                 Json{{"Regex", "(a+)+$|\\s"}},
                                 Json{{"String", " "}},
                                 Json{{"type", "NFC"}}};
  Random random(3);
  int loaded = 0, refused = 0;
  for (const char* kind : {"gpt2", "llama3", "qwen2"}) {
    const Json source = Json::parse(read_golden(std::string("tokenizer_") + kind + ".json"));
    for (int i = 0; i < 300; ++i) {
      Json changed = source;
      random_node(changed, random) = values[random.below(values.size())];
      const auto tokenizer = Tokenizer::from_json(changed.dump(), R"({"eos_token":"<|end|>"})");
      if (!tokenizer.ok()) {
        ++refused;
        EXPECT_FALSE(tokenizer.status().message().empty());
        continue;
      }
      ++loaded;
      const auto ids = tokenizer->encode("Hello <|im_start|> größer 123\n\n  x");
      if (ids.ok()) (void)tokenizer->decode(*ids);
    }
  }
  EXPECT_GT(loaded, 50);
  EXPECT_GT(refused, 100);
}

TEST(TokenizerRobustness, SurvivesDeeplyNestedFiles) {
  EXPECT_FALSE(Tokenizer::from_json(std::string(1 << 20, '[')).ok());
  std::string nested;
  for (int i = 0; i < 5000; ++i) nested += R"({"type":"Sequence","normalizers":[)";
  for (int i = 0; i < 5000; ++i) nested += "]}";
  EXPECT_FALSE(Tokenizer::from_json(
                   R"({"model":{"type":"BPE","vocab":{},"merges":[]},"normalizer":)" + nested + "}")
                   .ok());
}

}  // namespace
}  // namespace tandem::worker::text
