#include "worker/text/chat_template.h"

#include "worker/text/template_interpreter.h"
#include "worker/text/template_parser.h"
#include "worker/text/utf8.h"

#include <algorithm>

namespace tandem::worker::text {

struct ChatTemplate::Impl {
  std::string source;
  Block program;
  bool has_generation = false;
};

namespace {

using Json = nlohmann::ordered_json;
using Variables = std::vector<std::pair<std::string, Value>>;

Status to_status(const TemplateError& error) {
  return {error.code, str("chat template, ", error.message)};
}

Status check_messages(const Json& messages) {
  if (!messages.is_array()) return invalid_error("messages have to be a list");
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const Json& message = messages[i];
    if (!message.is_object() || !message.contains("role") || !message["role"].is_string())
      return invalid_error(str("message ", i, " has to be an object with a text \"role\""));
  }
  return Status::ok_status();
}

Variables make_variables(const Json& messages, const RenderOptions& options) {
  Variables variables;
  variables.emplace_back("messages", Value::from_json(messages));
  variables.emplace_back("tools", Value::from_json(options.tools));
  variables.emplace_back("documents", Value::none());
  variables.emplace_back("add_generation_prompt", Value::boolean(options.add_generation_prompt));
  if (!options.bos_token.empty())
    variables.emplace_back("bos_token", Value::text(options.bos_token));
  if (!options.eos_token.empty())
    variables.emplace_back("eos_token", Value::text(options.eos_token));
  if (!options.extra.is_null() && !options.extra.is_object())
    template_invalid("the extra variables have to be an object");
  for (const auto& [name, value] : options.extra.items())
    variables.emplace_back(name, Value::from_json(value));
  return variables;
}

struct Rendering {
  std::string text;
  std::vector<std::pair<std::size_t, std::size_t>> generation;
};

Result<Rendering> run(const Block& program, const Json& messages, const RenderOptions& options) {
  TANDEM_RETURN_IF_ERROR(check_messages(messages));
  try {
    Interpreter interpreter(options.now_unix_s);
    interpreter.run(program, make_variables(messages, options));
    return Rendering{std::move(interpreter.output()), interpreter.generation()};
  } catch (const TemplateError& error) {
    return to_status(error);
  }
}

bool is_assistant(const Json& message) {
  return message["role"] == "assistant";
}

/// Finds the assistant's turns in a rendered conversation by rendering parts of it.
class SpanFinder {
 public:
  SpanFinder(const ChatTemplate& chat_template, const Json& messages, RenderOptions options)
      : template_(chat_template), messages_(messages), options_(std::move(options)) {}
  Result<RenderedConversation> find();

 private:
  [[nodiscard]] Json first_messages(std::size_t count) const {
    Json part = Json::array();
    for (std::size_t i = 0; i < count; ++i) part.push_back(messages_[i]);
    return part;
  }
  Result<AssistantSpan> find_turn(std::size_t index, const std::string& full);
  Result<std::size_t> end_by_content(std::size_t index, std::size_t begin, const std::string& full,
                                     const std::string& prefix);
  [[nodiscard]] Status unstable(std::size_t index) const {
    return refused_error(
        str("chat template: the place of the assistant's turn in message ", index,
            " cannot be told, because the template writes earlier turns differently once later "
            "ones follow; mark the turn with {% generation %} in the template"));
  }

  const ChatTemplate& template_;
  const Json& messages_;
  RenderOptions options_;
};

std::string without_trailing_space(std::string text) {
  const std::size_t last = text.find_last_not_of(" \t\r\n");
  text.resize(last == std::string::npos ? 0 : last + 1);
  return text;
}

Result<RenderedConversation> SpanFinder::find() {
  RenderedConversation result;
  options_.add_generation_prompt = false;
  TANDEM_ASSIGN_OR_RETURN(result.text, template_.render(messages_, options_));
  std::size_t reached = 0;
  for (std::size_t i = 0; i < messages_.size(); ++i) {
    if (!is_assistant(messages_[i])) continue;
    TANDEM_ASSIGN_OR_RETURN(const AssistantSpan span, find_turn(i, result.text));
    if (span.begin < reached) return unstable(i);
    reached = span.end;
    result.assistant.push_back(span);
  }
  return result;
}

/// The turn begins where a prompt for it ends, and ends where the conversation up to it ends, less
/// white space after the end-of-turn token.
Result<AssistantSpan> SpanFinder::find_turn(std::size_t index, const std::string& full) {
  options_.add_generation_prompt = true;
  TANDEM_ASSIGN_OR_RETURN(const std::string prompt,
                          template_.render(first_messages(index), options_));
  options_.add_generation_prompt = false;
  TANDEM_ASSIGN_OR_RETURN(const std::string prefix,
                          template_.render(first_messages(index + 1), options_));
  if (!full.starts_with(prompt)) return unstable(index);
  AssistantSpan span{index, prompt.size(), 0};
  if (full.starts_with(prefix)) {
    span.end = std::max(without_trailing_space(prefix).size(), span.begin);
    return span;
  }
  TANDEM_ASSIGN_OR_RETURN(span.end, end_by_content(index, span.begin, full, prefix));
  return span;
}

/// Templates that strip earlier turns' reasoning: the content's place shows when it is exchanged
/// for a marker, and what follows it is what follows it at the end of a conversation.
Result<std::size_t> SpanFinder::end_by_content(std::size_t index, std::size_t begin,
                                               const std::string& full, const std::string& prefix) {
  const std::string marker = "tandem\x01marker\x02of\x03content";
  const auto text_after_marker = [&](std::size_t count) -> Result<std::string> {
    Json marked = first_messages(count);
    marked[index]["content"] = marker;
    TANDEM_ASSIGN_OR_RETURN(const std::string text, template_.render(marked, options_));
    const std::size_t at = text.find(marker);
    if (at == std::string::npos || text.find(marker, at + 1) != std::string::npos)
      return unstable(index);
    return text.substr(at + marker.size());
  };
  TANDEM_ASSIGN_OR_RETURN(const std::string after_in_full, text_after_marker(messages_.size()));
  TANDEM_ASSIGN_OR_RETURN(const std::string after_in_prefix, text_after_marker(index + 1));
  if (!full.ends_with(after_in_full) || !prefix.ends_with(after_in_prefix) ||
      !after_in_full.starts_with(after_in_prefix))
    return unstable(index);
  const std::size_t content_end = full.size() - after_in_full.size();
  const std::size_t end = content_end + without_trailing_space(after_in_prefix).size();
  if (content_end < begin) return unstable(index);
  return end;
}

}  // namespace

Result<ChatTemplate> ChatTemplate::parse(std::string_view source) {
  if (source.size() > kTemplateBytesMax)
    return refused_error(str("chat template of ", source.size(), " bytes; at most ",
                             kTemplateBytesMax, " are supported"));
  if (const std::size_t bad = find_invalid_utf8(source); bad != std::string_view::npos)
    return invalid_error(str("chat template is not valid UTF-8 at byte ", bad));
  auto impl = std::make_shared<Impl>();
  impl->source = std::string(source);
  try {
    impl->program = parse_template(source);
  } catch (const TemplateError& error) {
    return to_status(error);
  }
  impl->has_generation = has_generation(impl->program);
  return ChatTemplate(std::move(impl));
}

Result<std::string> ChatTemplate::render(const Json& messages, const RenderOptions& options) const {
  TANDEM_ASSIGN_OR_RETURN(Rendering rendering, run(impl_->program, messages, options));
  return std::move(rendering.text);
}

Result<RenderedConversation> ChatTemplate::render_with_spans(const Json& messages,
                                                             const RenderOptions& options) const {
  TANDEM_RETURN_IF_ERROR(check_messages(messages));
  if (!impl_->has_generation) return SpanFinder(*this, messages, options).find();
  RenderOptions whole = options;
  whole.add_generation_prompt = false;
  TANDEM_ASSIGN_OR_RETURN(Rendering rendering, run(impl_->program, messages, whole));
  RenderedConversation result{std::move(rendering.text), {}};
  std::vector<std::size_t> turns;
  for (std::size_t i = 0; i < messages.size(); ++i)
    if (is_assistant(messages[i])) turns.push_back(i);
  if (turns.size() != rendering.generation.size())
    return refused_error(str("chat template: ", rendering.generation.size(),
                             " {% generation %} blocks were written for ", turns.size(),
                             " assistant messages"));
  for (std::size_t i = 0; i < turns.size(); ++i)
    result.assistant.push_back(
        {turns[i], rendering.generation[i].first, rendering.generation[i].second});
  return result;
}

const std::string& ChatTemplate::source() const {
  return impl_->source;
}

}  // namespace tandem::worker::text
