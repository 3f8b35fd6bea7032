#include "worker/runtime/encoder.h"

#include <nlohmann/json.hpp>

namespace tandem::worker::runtime {
namespace {

Result<text::Tokenizer> make_tokenizer(const model::TokenizerFiles& files) {
  if (files.gguf) return text::Tokenizer::from_gguf(*files.gguf);
  return text::Tokenizer::from_json(files.tokenizer_json, files.tokenizer_config_json);
}

data::OverLength over_length(protocol::OverLength mode) {
  switch (mode) {
    case protocol::OverLength::kDrop:
      return data::OverLength::kDrop;
    case protocol::OverLength::kTruncate:
      return data::OverLength::kTruncate;
    case protocol::OverLength::kRaise:
      break;
  }
  return data::OverLength::kRaise;
}

Status in(const std::string& path, const Status& status) {
  return {status.code(), path + ": " + status.message()};
}

}  // namespace

Result<data::Encoder> make_encoder(const model::LoadedModel& model, const std::string& path) {
  auto tokenizer = make_tokenizer(model.tokenizer);
  if (!tokenizer.ok()) return in(path, tokenizer.status());
  std::optional<text::ChatTemplate> chat_template;
  if (!model.chat_template.empty()) {
    auto parsed = text::ChatTemplate::parse(model.chat_template);
    if (!parsed.ok()) return in(path, parsed.status());
    chat_template = std::move(*parsed);
  }
  return data::Encoder{std::move(*tokenizer), std::move(chat_template), model.config.vocab};
}

Result<std::vector<std::int32_t>> encode_input(const data::Encoder& encoder,
                                               const std::string& model,
                                               const protocol::PromptInput& input) {
  if (!input.tokens.empty()) return input.tokens;
  text::EncodeOptions raw;
  if (input.raw) return encoder.tokenizer.encode(input.prompt, raw);
  if (!encoder.chat_template)
    return refused_error(str("model ", model, " has no chat template; send a raw prompt (--raw)"));
  auto messages = nlohmann::ordered_json::array();
  for (const auto& message : input.messages)
    messages.push_back({{"role", message.role}, {"content", message.content}});
  if (input.messages.empty()) messages.push_back({{"role", "user"}, {"content", input.prompt}});
  text::RenderOptions render;
  render.add_generation_prompt = true;
  render.bos_token = encoder.tokenizer.bos_token();
  render.eos_token = encoder.tokenizer.eos_token();
  TANDEM_ASSIGN_OR_RETURN(const std::string text, encoder.chat_template->render(messages, render));
  text::EncodeOptions rendered;
  rendered.add_special_tokens = false;  // the template writes them
  return encoder.tokenizer.encode(text, rendered);
}

data::DatasetOptions dataset_options(const protocol::TrainSettings& settings) {
  data::DatasetOptions options;
  options.max_length = settings.max_length;
  options.over_length = over_length(settings.over_length);
  return options;
}

}  // namespace tandem::worker::runtime
