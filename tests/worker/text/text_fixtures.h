// Tokenizers and templates of tests/golden/text, for tests.
#pragma once

#include "worker/text/chat_template.h"
#include "worker/text/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>

namespace tandem::worker::text {

inline std::string read_golden(const std::string& name) {
  std::ifstream in(std::string(TANDEM_SOURCE_DIR "/tests/golden/text/") + name, std::ios::binary);
  EXPECT_TRUE(in) << name;
  return {std::istreambuf_iterator<char>(in), {}};
}

/// A small byte-level BPE with "<|im_start|>" and "<|im_end|>"; EOS is "<|end|>".
inline Tokenizer golden_tokenizer(
    const std::string& kind = "gpt2",
    std::string_view config = R"({"bos_token":"<|begin|>","eos_token":{"content":"<|end|>"}})") {
  auto tokenizer = Tokenizer::from_json(read_golden("tokenizer_" + kind + ".json"), config);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().to_string();
  return std::move(*tokenizer);
}

inline ChatTemplate golden_template(const std::string& name = "chatml") {
  auto parsed = ChatTemplate::parse(read_golden("templates/" + name + ".jinja"));
  EXPECT_TRUE(parsed.ok()) << parsed.status().to_string();
  return std::move(*parsed);
}

inline std::vector<std::int32_t> encode_ok(const Tokenizer& tokenizer, std::string_view text,
                                           EncodeOptions options = {.add_special_tokens = false}) {
  auto ids = tokenizer.encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status().to_string();
  return std::move(*ids);
}

}  // namespace tandem::worker::text
