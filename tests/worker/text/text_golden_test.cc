// Against jinja2 and Hugging Face tokenizers, through the files of tests/golden/text_goldens.py.
#include "worker/text/chat_template.h"
#include "worker/text/tokenizer.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <fstream>
#include <iterator>
#include <string>

namespace tandem::worker::text {
namespace {

using Json = nlohmann::ordered_json;

std::string read_file(const std::string& name) {
  std::ifstream in(std::string(TANDEM_SOURCE_DIR "/tests/golden/text/") + name, std::ios::binary);
  EXPECT_TRUE(in) << name;
  return {std::istreambuf_iterator<char>(in), {}};
}

RenderOptions options_of(const Json& variables, std::int64_t now) {
  RenderOptions options;
  options.now_unix_s = now;
  options.extra = Json::object();
  for (const auto& [name, value] : variables.items()) {
    if (name == "bos_token")
      options.bos_token = value;
    else if (name == "eos_token")
      options.eos_token = value;
    else if (name == "tools")
      options.tools = value;
    else if (name == "add_generation_prompt")
      options.add_generation_prompt = value;
    else
      options.extra[name] = value;
  }
  return options;
}

TEST(ChatTemplate, WritesWhatJinja2WritesForEveryGolden) {
  const Json golden = Json::parse(read_file("chat_templates.json"));
  ASSERT_GE(golden["cases"].size(), 200u);
  for (const Json& example : golden["cases"]) {
    const std::string name = example["template"];
    const std::string conversation = example["conversation"];
    SCOPED_TRACE(name + " " + conversation + " " + example["variables"].dump());
    const auto chat_template = ChatTemplate::parse(read_file("templates/" + name));
    ASSERT_TRUE(chat_template.ok()) << chat_template.status().to_string();
    const auto text = chat_template->render(
        golden["conversations"][conversation],
        options_of(golden["variables"][example["variables"].get<std::size_t>()], golden["now"]));
    if (example.contains("error")) {
      EXPECT_FALSE(text.ok());
      EXPECT_EQ(text.status().code(), StatusCode::kInvalid);
      continue;
    }
    ASSERT_TRUE(text.ok()) << text.status().to_string();
    EXPECT_EQ(*text, example["text"].get<std::string>());
  }
}

TEST(Tokenizer, GivesTheIdsOfTheReferenceForEveryGolden) {
  const Json golden = Json::parse(read_file("tokenizers.json"));
  const auto texts = golden["texts"].get<std::vector<std::string>>();
  ASSERT_GE(texts.size(), 60u);
  for (const Json& expected : golden["tokenizers"]) {
    SCOPED_TRACE(expected["file"].get<std::string>());
    const auto tokenizer = Tokenizer::from_json(read_file(expected["file"]));
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().to_string();
    for (std::size_t i = 0; i < texts.size(); ++i) {
      const auto ids = tokenizer->encode(texts[i], {.add_special_tokens = false});
      ASSERT_TRUE(ids.ok()) << ids.status().to_string();
      EXPECT_EQ(*ids, expected["ids"][i].get<std::vector<std::int32_t>>()) << texts[i];
      const auto special = tokenizer->encode(texts[i]);
      if (i < expected["special_ids"].size()) {
        EXPECT_EQ(*special, expected["special_ids"][i].get<std::vector<std::int32_t>>());
      }
      const Json& decoded = expected["decoded"][i];
      EXPECT_EQ(tokenizer->decode(*special, true),
                decoded.is_null() ? texts[i] : decoded.get<std::string>());
    }
  }
}

}  // namespace
}  // namespace tandem::worker::text
