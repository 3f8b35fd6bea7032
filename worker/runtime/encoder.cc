#include "worker/runtime/encoder.h"

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
  return data::Encoder{std::move(*tokenizer), std::move(chat_template)};
}

data::DatasetOptions dataset_options(const protocol::TrainSettings& settings) {
  data::DatasetOptions options;
  options.max_length = settings.max_length;
  options.over_length = over_length(settings.over_length);
  return options;
}

}  // namespace tandem::worker::runtime
