#include "worker/data/dataset.h"
#include "worker/data/row_parts.h"

#include <algorithm>

namespace tandem::worker::data {
namespace {

/// Appends tokens; those that are trained become the labels of the positions before them.
void append(const std::vector<std::int32_t>& ids, bool trained, Example& example) {
  for (const std::int32_t id : ids) {
    if (trained && !example.labels.empty()) example.labels.back() = id;
    example.tokens.push_back(id);
    example.labels.push_back(kIgnore);
  }
}

Status append_text(const text::Tokenizer& tokenizer, std::string_view part, bool trained,
                   Example& example, const std::string& where) {
  const bool continues = !example.tokens.empty() && !tokenizer.is_added(example.tokens.back());
  const auto ids = tokenizer.encode(part, {.add_special_tokens = false, .continues = continues});
  if (!ids.ok()) return {ids.status().code(), str(where, ": ", ids.status().message())};
  append(*ids, trained, example);
  return Status::ok_status();
}

Status encode_plain(const text::Tokenizer& tokenizer, const PlainText& plain, Example& example,
                    const std::string& where) {
  const std::string& first = plain.prompt.empty() ? plain.completion : plain.prompt;
  const std::string bos = tokenizer.bos_token();
  if (tokenizer.adds_bos() && !first.starts_with(bos))
    append({*tokenizer.bos_id()}, false, example);
  TANDEM_RETURN_IF_ERROR(append_text(tokenizer, plain.prompt, false, example, where));
  TANDEM_RETURN_IF_ERROR(append_text(tokenizer, plain.completion, true, example, where));
  const auto eos = tokenizer.eos_id();
  const bool has_end = eos && !example.tokens.empty() && example.tokens.back() == *eos;
  if (eos && !has_end && !plain.completion.empty()) append({*eos}, true, example);
  return Status::ok_status();
}

/// The text is cut where the assistant's turns begin and end, and each part is tokenized by itself:
/// a turn then begins exactly where a prompt for it ends when the model is served, and no token is
/// half header, half answer.
Status encode_rendered(const Encoder& encoder, const Conversation& conversation,
                       const text::RenderedConversation& rendered, Example& example,
                       const std::string& where) {
  const std::string_view all = rendered.text;
  std::size_t from = 0;
  for (const text::AssistantSpan& span : rendered.assistant) {
    const bool trained = conversation.trained[span.message];
    TANDEM_RETURN_IF_ERROR(
        append_text(encoder.tokenizer, all.substr(from, span.begin - from), false, example, where));
    TANDEM_RETURN_IF_ERROR(append_text(
        encoder.tokenizer, all.substr(span.begin, span.end - span.begin), trained, example, where));
    from = span.end;
  }
  return append_text(encoder.tokenizer, all.substr(from), false, example, where);
}

/// One example per trained turn.
Result<std::vector<Example>> encode_turns(const Encoder& encoder, const Conversation& conversation,
                                          const text::RenderOptions& options,
                                          const std::string& where) {
  std::vector<Example> examples;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < conversation.trained.size(); ++i) {
    if (!conversation.trained[i]) continue;
    const auto rendered = encoder.chat_template->render_turn(conversation.messages, i, options);
    if (!rendered.ok())
      return Status(rendered.status().code(), str(where, ": ", rendered.status().message()));
    bytes += rendered->text.size();
    if (bytes > kTurnsBytesMax)
      return refused_error(str(where,
                               ": its turns, each with what stands before it, have more than ",
                               kTurnsBytesMax, " bytes; split the conversation"));
    TANDEM_RETURN_IF_ERROR(
        encode_rendered(encoder, conversation, *rendered, examples.emplace_back(), where));
  }
  return examples;
}

Result<std::vector<Example>> encode_conversation(const Encoder& encoder,
                                                 const Conversation& conversation,
                                                 const std::string& where) {
  if (!encoder.chat_template)
    return invalid_error(str(where,
                             ": a conversation needs a model with a chat template; use "
                             "{\"prompt\",\"completion\"} or {\"text\"} rows with this one"));
  text::RenderOptions options;
  options.bos_token = encoder.tokenizer.bos_token();
  options.eos_token = encoder.tokenizer.eos_token();
  options.tools = conversation.tools;
  const auto rendered = encoder.chat_template->render_with_spans(conversation.messages, options);
  const auto& trained = conversation.trained;
  const auto is_rewritten = [&](const text::AssistantSpan& span) {
    return span.rewritten && trained[span.message];
  };
  const bool by_turns =
      rendered.ok()
          ? std::any_of(rendered->assistant.begin(), rendered->assistant.end(), is_rewritten)
          : rendered.status().code() == StatusCode::kRefused &&
                std::find(trained.begin(), trained.end(), true) != trained.end();
  if (by_turns) return encode_turns(encoder, conversation, options, where);
  if (!rendered.ok())
    return Status(rendered.status().code(), str(where, ": ", rendered.status().message()));
  std::vector<Example> whole(1);
  TANDEM_RETURN_IF_ERROR(encode_rendered(encoder, conversation, *rendered, whole[0], where));
  return whole;
}

Status check_vocabulary(const Encoder& encoder, const Example& example, const std::string& where) {
  if (encoder.vocab == 0) return Status::ok_status();
  for (std::size_t i = 0; i < example.tokens.size(); ++i)
    if (const std::int32_t id = example.tokens[i]; id >= encoder.vocab)
      return invalid_error(str(where, ": token ", i, " (\"",
                               encoder.tokenizer.token_bytes(id).substr(0, 40), "\") has the id ",
                               id, ", the model's vocabulary is [0, ", encoder.vocab,
                               "); the tokenizer does not belong to these weights, or the token "
                               "was added to it alone"));
  return Status::ok_status();
}

}  // namespace

std::int64_t Example::trained_tokens() const {
  return static_cast<std::int64_t>(labels.size()) -
         std::count(labels.begin(), labels.end(), kIgnore);
}

Result<std::vector<Example>> Encoder::encode(Format format, const nlohmann::ordered_json& row,
                                             const std::string& where) const {
  TANDEM_ASSIGN_OR_RETURN(const RowParts parts,
                          take_apart(format, row, chat_template.has_value(), where));
  std::vector<Example> examples(1);
  if (const auto* plain = std::get_if<PlainText>(&parts)) {
    TANDEM_RETURN_IF_ERROR(encode_plain(tokenizer, *plain, examples[0], where));
  } else {
    TANDEM_ASSIGN_OR_RETURN(examples,
                            encode_conversation(*this, std::get<Conversation>(parts), where));
  }
  for (const Example& example : examples)
    TANDEM_RETURN_IF_ERROR(check_vocabulary(*this, example, where));
  return examples;
}

}  // namespace tandem::worker::data
