#include "tools/random_model.h"

#include <nlohmann/json.hpp>

#include <vector>

namespace tandem::tools {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kStart = 256, kEnd = 257;

/// The 256 characters that byte-level BPE spells bytes with (GPT-2's bytes_to_unicode).
std::vector<std::string> byte_characters() {
  std::vector<std::string> characters;
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    const int code = visible ? byte : next++;
    std::string utf8;
    if (code < 0x80)
      utf8 = std::string(1, static_cast<char>(code));
    else
      utf8 = {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
    characters.push_back(utf8);
  }
  return characters;
}

Json special_token(int id, const std::string& content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

}  // namespace

worker::model::TokenizerFiles byte_tokenizer() {
  Json vocab = Json::object();
  const auto characters = byte_characters();
  for (std::size_t i = 0; i < characters.size(); ++i) vocab[characters[i]] = i;
  const Json level{{"type", "ByteLevel"},
                   {"add_prefix_space", false},
                   {"trim_offsets", true},
                   {"use_regex", true}};
  const Json tokenizer{{"version", "1.0"},
                       {"truncation", nullptr},
                       {"padding", nullptr},
                       {"added_tokens", Json::array({special_token(kStart, "<|im_start|>"),
                                                     special_token(kEnd, "<|im_end|>")})},
                       {"normalizer", nullptr},
                       {"pre_tokenizer", level},
                       {"post_processor", nullptr},
                       {"decoder", level},
                       {"model",
                        {{"type", "BPE"},
                         {"dropout", nullptr},
                         {"unk_token", nullptr},
                         {"vocab", vocab},
                         {"merges", Json::array()}}}};
  worker::model::TokenizerFiles files;
  files.tokenizer_json = tokenizer.dump();
  files.tokenizer_config_json = Json{
      {"eos_token", "<|im_end|>"},
      {"bos_token", "<|im_start|>"},
      {"chat_template",
       "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
       "message['content'] + "
       "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
       "'<|im_start|>assistant\n' }}"
       "{% endif %}"}}.dump();
  return files;
}

}  // namespace tandem::tools
