#include "worker/text/chat_template.h"

#include "protocol/base/str.h"
#include "tests/worker/text/text_fixtures.h"

#include <gtest/gtest.h>

namespace tandem::worker::text {
namespace {

using Json = nlohmann::ordered_json;

const Json kMessages =
    Json::parse(R"([{"role":"system","content":"S"},{"role":"user","content":"U1"},)"
                R"({"role":"assistant","content":"A1"},{"role":"user","content":"U2"},)"
                R"({"role":"assistant","content":"A2"}])");

Result<std::string> render(const std::string& source, const RenderOptions& options = {}) {
  const auto parsed = ChatTemplate::parse(source);
  if (!parsed.ok()) return parsed.status();
  return parsed->render(kMessages, options);
}

void expect_error(const std::string& source, StatusCode code, const std::string& named) {
  const auto text = render(source);
  ASSERT_FALSE(text.ok()) << source << " gave " << *text;
  EXPECT_EQ(text.status().code(), code) << source << ": " << text.status().to_string();
  EXPECT_NE(text.status().message().find(named), std::string::npos)
      << source << ": " << text.status().message();
}

TEST(ChatTemplate, NamesTheConstructAndTheLineThatItDoesNotSupport) {
  expect_error("a\nb\n{% include 'x' %}", StatusCode::kRefused, "line 3");
  expect_error("{% include 'x' %}", StatusCode::kRefused, "include");
  expect_error("{% extends 'x' %}", StatusCode::kRefused, "extends");
  expect_error("{{ 1 | frobnicate }}", StatusCode::kRefused, "frobnicate");
  expect_error("{{ 'a' | uper }}", StatusCode::kRefused, "did you mean upper");
  expect_error("{{ 1 is frobnicated }}", StatusCode::kRefused, "frobnicated");
  expect_error("\n{{ 'a'.center(9) }}", StatusCode::kRefused, "center");
  expect_error("\n{{ 'a'.center(9) }}", StatusCode::kRefused, "line 2");
  expect_error("{{ '%s' % 1 }}", StatusCode::kRefused, "%");
  expect_error("{{ f(*a) }}", StatusCode::kRefused, "unpacking");
  expect_error("{% for x in [] recursive %}{% endfor %}", StatusCode::kRefused, "recursive");
  expect_error("{{ 'ß'.upper() }}", StatusCode::kRefused, "ß");
  expect_error("{{ messages[0].get }}", StatusCode::kRefused, "get");
  expect_error("{{ [1].append(2) }}", StatusCode::kRefused, "append");
  expect_error("{{ 99999999999999999999 }}", StatusCode::kRefused, "99999999999999999999");
  expect_error("{{ 9223372036854775807 + 1 }}", StatusCode::kRefused, "64 bits");
}

TEST(ChatTemplate, RefusesWhatJinjaRefuses) {
  expect_error("{{ }}", StatusCode::kInvalid, "line 1");
  expect_error("{% if 1 %}", StatusCode::kInvalid, "endif");
  expect_error("{% endfor %}", StatusCode::kInvalid, "endfor");
  expect_error("{{ 1 + }}", StatusCode::kInvalid, "expression");
  expect_error("{{ (1 }}", StatusCode::kInvalid, "");
  expect_error("{{ 'abc }}", StatusCode::kInvalid, "not closed");
  expect_error("{{ x", StatusCode::kInvalid, "not closed");
  expect_error("{# x", StatusCode::kInvalid, "comment");
  expect_error("{{ 'a' + 1 }}", StatusCode::kInvalid, "operator +");
  expect_error("{{ missing.x }}", StatusCode::kInvalid, "missing");
  expect_error("{{ missing() }}", StatusCode::kInvalid, "missing");
  expect_error("{{ none.strip() }}", StatusCode::kInvalid, "strip");
  expect_error("{{ 1 / 0 }}", StatusCode::kInvalid, "zero");
  expect_error("{{ 1 < 'a' }}", StatusCode::kInvalid, "order");
  expect_error("{% for x in 5 %}{% endfor %}", StatusCode::kInvalid, "iterated");
  expect_error("{{ raise_exception('no ' ~ 'way') }}", StatusCode::kInvalid, "no way");
  expect_error("{% break %}", StatusCode::kInvalid, "outside a loop");
  expect_error("{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}", StatusCode::kInvalid, "macro m");
  expect_error("{{ range | tojson }}", StatusCode::kInvalid, "JSON");
}

TEST(ChatTemplate, EndsRunawayTemplatesAtItsLimits) {
  expect_error("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
               StatusCode::kRefused, "steps");
  expect_error("{% for a in range(100000) %}{{ 'x' * 10000 }}{% endfor %}", StatusCode::kRefused,
               "");
  expect_error("{{ range(1000000) }}", StatusCode::kRefused, "range");
  expect_error("{{ 'x' * 99999999999 }}", StatusCode::kRefused, "longer");
  expect_error("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", StatusCode::kRefused, "deep");
  expect_error("{{ " + std::string(5000, '(') + "1" + std::string(5000, ')') + " }}",
               StatusCode::kRefused, "deep");
  expect_error("{{ " + std::string(5000, '-') + "1 }}", StatusCode::kRefused, "deep");
  std::string chain = "{{ 1", nots = "{{ ", blocks, filters = "{{ 1";
  for (int i = 0; i < 5000; ++i) {
    chain += " + 1";
    nots += "not ";
    blocks += "{% if 1 %}";
    filters += "|int";
  }
  expect_error(chain + " }}", StatusCode::kRefused, "deep");
  expect_error(nots + "1 }}", StatusCode::kRefused, "deep");
  expect_error(blocks, StatusCode::kRefused, "deep");
  expect_error(filters + " }}", StatusCode::kRefused, "deep");
  // A list of itself, doubled: small to write, huge to print.
  expect_error(
      "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}"
      "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
      StatusCode::kRefused, "parts");
  expect_error(
      "{% set ns = namespace(l=[1]) %}{% for i in range(90000) %}"
      "{% set ns.l = [ns.l] %}{% endfor %}",
      StatusCode::kRefused, "deep");
  expect_error("{% set ns = namespace() %}{% set ns.self = ns %}", StatusCode::kRefused,
               "namespace");
  EXPECT_EQ(ChatTemplate::parse(std::string(kTemplateBytesMax + 1, 'a')).status().code(),
            StatusCode::kRefused);
  EXPECT_EQ(ChatTemplate::parse("\xff").status().code(), StatusCode::kInvalid);
}

TEST(ChatTemplate, ChecksTheShapeOfMessages) {
  const ChatTemplate chatml = golden_template();
  EXPECT_EQ(chatml.render(Json::object()).status().code(), StatusCode::kInvalid);
  EXPECT_EQ(chatml.render(Json::parse("[1]")).status().code(), StatusCode::kInvalid);
  EXPECT_EQ(chatml.render(Json::parse(R"([{"content":"x"}])")).status().code(),
            StatusCode::kInvalid);
  // ChatML concatenates: a content that is null is Python's TypeError.
  EXPECT_EQ(chatml.render(Json::parse(R"([{"role":"user","content":null}])")).status().code(),
            StatusCode::kInvalid);
  EXPECT_EQ(*chatml.render(Json::array()), "");
}

TEST(ChatTemplate, HasNoDateUnlessItIsGivenOne) {
  EXPECT_EQ(*render("{{ strftime_now is defined }}"), "False");
  EXPECT_EQ(*render("{{ strftime_now('%d %b %Y') }}", {.now_unix_s = 1'700'000'000}),
            "14 Nov 2023");
}

/// The trained texts of a conversation.
std::vector<std::string> spans_of(const ChatTemplate& chat_template, const Json& messages,
                                  const RenderOptions& options = {}) {
  const auto rendered = chat_template.render_with_spans(messages, options);
  EXPECT_TRUE(rendered.ok()) << rendered.status().to_string();
  if (!rendered.ok()) return {};
  EXPECT_EQ(rendered->text, *chat_template.render(messages, options));
  std::vector<std::string> spans;
  for (const AssistantSpan& span : rendered->assistant) {
    EXPECT_EQ(messages[span.message]["role"], "assistant");
    spans.push_back(rendered->text.substr(span.begin, span.end - span.begin));
  }
  return spans;
}

TEST(ChatTemplateSpans, AreContentAndEndOfTurnInEveryCommonTemplate) {
  using Texts = std::vector<std::string>;
  const RenderOptions options{.bos_token = "<s>", .eos_token = "</s>"};
  const Json& m = kMessages;
  Json without = kMessages;
  without.erase(0);
  EXPECT_EQ(spans_of(golden_template("chatml"), m, options),
            (Texts{"A1<|im_end|>", "A2<|im_end|>"}));
  EXPECT_EQ(spans_of(golden_template("smollm2"), m, options),
            (Texts{"A1<|im_end|>", "A2<|im_end|>"}));
  EXPECT_EQ(spans_of(golden_template("smollm2"), without, options),
            (Texts{"A1<|im_end|>", "A2<|im_end|>"}));
  EXPECT_EQ(spans_of(golden_template("llama2"), m, options), (Texts{" A1 </s>", " A2 </s>"}));
  EXPECT_EQ(spans_of(golden_template("llama3"), m, options),
            (Texts{"A1<|eot_id|>", "A2<|eot_id|>"}));
  EXPECT_EQ(spans_of(golden_template("llama31"), m, options),
            (Texts{"A1<|eot_id|>", "A2<|eot_id|>"}));
  EXPECT_EQ(spans_of(golden_template("gemma"), without, options),
            (Texts{"A1<end_of_turn>", "A2<end_of_turn>"}));
  EXPECT_EQ(spans_of(golden_template("qwen25"), m, options),
            (Texts{"A1<|im_end|>", "A2<|im_end|>"}));
  EXPECT_EQ(spans_of(golden_template("generation"), m, options),
            (Texts{"A1<|im_end|>", "A2<|im_end|>"}));
}

TEST(ChatTemplateSpans, FollowATemplateThatRewritesEarlierTurns) {
  // Qwen3 wraps only the last turn in <think>; earlier turns lose theirs.
  EXPECT_EQ(spans_of(golden_template("qwen3"), kMessages),
            (std::vector<std::string>{"A1<|im_end|>", "<think>\n\n</think>\n\nA2<|im_end|>"}));
}

TEST(ChatTemplateSpans, AreFoundInAConversationThatBeginsWithTheAssistant) {
  using Texts = std::vector<std::string>;
  const RenderOptions options{.bos_token = "<s>", .eos_token = "</s>"};
  const Json messages = Json::parse(R"([{"role":"assistant","content":"Hello"},)"
                                    R"({"role":"user","content":"hi"},)"
                                    R"({"role":"assistant","content":"yo"}])");
  for (const char* name : {"chatml", "smollm2", "qwen25", "generation"})
    EXPECT_EQ(spans_of(golden_template(name), messages, options),
              (Texts{"Hello<|im_end|>", "yo<|im_end|>"}))
        << name;
  EXPECT_EQ(spans_of(golden_template("llama31"), messages, options),
            (Texts{"Hello<|eot_id|>", "yo<|eot_id|>"}));
  EXPECT_EQ(spans_of(golden_template("qwen3"), messages, options),
            (Texts{"Hello<|im_end|>", "<think>\n\n</think>\n\nyo<|im_end|>"}));
  const auto refused = golden_template("gemma").render_with_spans(messages, options);
  EXPECT_NE(refused.status().message().find("must alternate"), std::string::npos)
      << refused.status().to_string();
}

/// Alternating turns, among them contents that templates trim, that look like their own texts or
/// that are empty.
Json long_conversation(std::size_t count) {
  Json messages = Json::array();
  for (std::size_t i = 0; i < count; ++i) {
    const char* content = i % 7 == 0   ? " spaced \n"
                          : i % 7 == 1 ? "a <|im_end|>\n<|im_start|>assistant\nb"
                          : i % 7 == 2 ? ""
                                       : "text ";
    messages.push_back({{"role", i % 2 == 0 ? "user" : "assistant"},
                        {"content", i % 7 > 2 ? str(content, i) : content}});
  }
  return messages;
}

TEST(ChatTemplateSpans, OfALongConversationAreThoseOfItsBeginning) {
  const RenderOptions options{.bos_token = "<s>", .eos_token = "</s>"};
  for (const char* name : {"chatml", "gemma", "llama2", "llama3", "llama31", "qwen25", "qwen3",
                           "smollm2", "smollm2_gguf", "zephyr"}) {
    SCOPED_TRACE(name);
    const ChatTemplate chat_template = golden_template(name);
    const Json messages = long_conversation(60);
    const std::vector<std::string> all = spans_of(chat_template, messages, options);
    ASSERT_EQ(all.size(), 30u);
    // Up to 8 turns are placed one by one. The last one may be written differently.
    Json start = Json::array();
    for (std::size_t i = 0; i < 16; ++i) start.push_back(messages[i]);
    const std::vector<std::string> first = spans_of(chat_template, start, options);
    ASSERT_EQ(first.size(), 8u);
    EXPECT_EQ(std::vector(all.begin(), all.begin() + 7),
              std::vector(first.begin(), first.end() - 1));
    for (std::size_t i = 0; i + 15 < all.size(); ++i)
      if ((2 * i + 1) % 7 <= 2) {
        EXPECT_EQ(all[i], all[i + 7]) << i;
      }
  }
}

TEST(ChatTemplateSpans, OfManyTurnsCostAFewRenderings) {
  const ChatTemplate chat_template = golden_template("qwen25");
  const Json messages = long_conversation(2'048);
  const auto rendered = chat_template.render_with_spans(messages);
  ASSERT_TRUE(rendered.ok());
  // Each turn by renderings of what comes before it: more than 1,000 times the conversation.
  EXPECT_LT(rendered->messages_rendered, 10 * messages.size());
}

TEST(ChatTemplateSpans, RefuseATemplateWhoseTurnsCannotBePlaced) {
  const auto parsed = ChatTemplate::parse(
      "{{ messages|length }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}");
  ASSERT_TRUE(parsed.ok());
  const auto spans = parsed->render_with_spans(kMessages);
  ASSERT_FALSE(spans.ok());
  EXPECT_EQ(spans.status().code(), StatusCode::kRefused);
  EXPECT_NE(spans.status().message().find("message 2"), std::string::npos);
}

}  // namespace
}  // namespace tandem::worker::text
