#include "worker/text/chat_template.h"

#include "worker/text/template_interpreter.h"
#include "worker/text/template_parser.h"
#include "worker/text/utf8.h"

#include <algorithm>
#include <map>

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

constexpr std::string_view kMarker = "tandem\001marker\002of\003content";
/// Of more turns than these, those that look the same from outside are placed once.
constexpr std::size_t kTurnsPlacedEach = 8;

/// Finds the assistant's turns in a rendered conversation by rendering parts of it.
class SpanFinder {
 public:
  SpanFinder(const ChatTemplate& chat_template, const Json& messages, RenderOptions options)
      : template_(chat_template), messages_(messages), options_(std::move(options)) {}
  Result<RenderedConversation> find();

 private:
  /// [begin, end): a message's content in the rendered conversation. The content before it ends at
  /// `from`, the one after it begins at `to`. Of a message without a text: all 0.
  struct Place {
    std::size_t from = 0, begin = 0, end = 0, to = 0;
  };

  Result<std::string> render_first(std::size_t count, bool add_generation_prompt) {
    Json part = Json::array();
    for (std::size_t i = 0; i < count; ++i) part.push_back(messages_[i]);
    options_.add_generation_prompt = add_generation_prompt;
    return render(part);
  }
  Result<std::string> render(const Json& messages) {
    rendered_ += messages.size();
    return template_.render(messages, options_);
  }
  std::vector<Place> find_contents(std::string_view full);
  Result<AssistantSpan> find_turn(std::size_t index, const std::string& full);
  Result<std::size_t> begin_of_first(const std::string& full, const std::string& prefix);
  Result<std::size_t> end_by_content(std::size_t index, std::size_t begin, const std::string& full,
                                     const std::string& prefix);
  Result<std::pair<std::string, std::string>> around_content(std::size_t index, std::size_t count);
  [[nodiscard]] Status unstable(std::size_t index) const {
    return refused_error(
        str("chat template: the place of the assistant's turn in message ", index,
            index == 0 ? ", which begins the conversation, cannot be told; begin with another role "
                         "or mark the turn with {% generation %} in the template"
                       : " cannot be told, because the template writes earlier turns differently "
                         "once later ones follow; mark the turn with {% generation %} in the "
                         "template"));
  }

  const ChatTemplate& template_;
  const Json& messages_;
  RenderOptions options_;
  std::size_t rendered_ = 0;  ///< messages
};

std::string without_trailing_space(std::string text) {
  const std::size_t last = text.find_last_not_of(" \t\r\n");
  text.resize(last == std::string::npos ? 0 : last + 1);
  return text;
}

/// Each turn is placed by renderings of the conversation up to it, which for all of a long one
/// would cost the square of its messages. So a turn between texts of the template between which
/// another one has been placed gets the same place relative to its content.
Result<RenderedConversation> SpanFinder::find() {
  RenderedConversation result;
  options_.add_generation_prompt = false;
  TANDEM_ASSIGN_OR_RETURN(result.text, render(messages_));
  const std::string_view full = result.text;
  std::vector<Place> contents(messages_.size());
  const auto turns = std::count_if(messages_.begin(), messages_.end(), is_assistant);
  if (static_cast<std::size_t>(turns) > kTurnsPlacedEach) contents = find_contents(full);
  struct Around {
    std::size_t before, after;  // bytes of the turn beside its content
    bool rewritten;
  };
  std::map<std::pair<std::string_view, std::string_view>, Around> placed;
  std::size_t reached = 0;
  for (std::size_t i = 0; i < messages_.size(); ++i) {
    if (!is_assistant(messages_[i])) continue;
    const Place& at = contents[i];
    const std::pair around(full.substr(at.from, at.begin - at.from),
                           full.substr(at.end, at.to - at.end));
    AssistantSpan span{i, 0, 0};
    if (const auto known = placed.find(around); known != placed.end()) {
      const auto [before, after, rewritten] = known->second;
      span = {i, at.begin - before, at.end + after, rewritten};
    } else {
      TANDEM_ASSIGN_OR_RETURN(span, find_turn(i, result.text));
      // Where nothing follows the content in the turn, its end depends on the content's own space.
      if (at.from <= span.begin && span.begin <= at.begin && at.end < span.end && span.end <= at.to)
        placed[around] = {at.begin - span.begin, span.end - at.end, span.rewritten};
    }
    if (span.begin < reached) return unstable(i);
    reached = span.end;
    result.assistant.push_back(span);
  }
  result.messages_rendered = rendered_;
  return result;
}

/// From one rendering in which each content is exchanged for a marker: what stands between the
/// markers is the template's. All 0 where that does not add up to the conversation, as where the
/// template cuts something out of a content. A message without a text counts as what is between.
std::vector<SpanFinder::Place> SpanFinder::find_contents(std::string_view full) {
  const std::vector<Place> unknown(messages_.size());
  const auto marker = [](std::size_t index) { return str(kMarker, index, '\x03'); };
  Json marked = messages_;
  std::vector<std::size_t> indices;
  for (std::size_t i = 0; i < marked.size(); ++i) {
    if (!marked[i].contains("content") || !marked[i]["content"].is_string()) continue;
    marked[i]["content"] = marker(i);
    indices.push_back(i);
  }
  const auto rendered = render(marked);
  if (!rendered.ok()) return unknown;
  const std::string_view text = *rendered;
  std::vector<Place> places = unknown;
  std::size_t at = std::min(text.find(kMarker), text.size());  // in text
  std::size_t from = 0, begin = at;                            // in full
  if (full.substr(0, at) != text.substr(0, at)) return unknown;
  for (const std::size_t i : indices) {
    const std::string expected = marker(i);
    if (!text.substr(at).starts_with(expected)) return unknown;
    at += expected.size();
    const std::size_t next = std::min(text.find(kMarker, at), text.size());
    const std::string_view after = text.substr(at, next - at);
    const auto is_written = [&](const std::string& content) {
      const std::string_view rest = full.substr(begin);
      return rest.starts_with(content) && rest.substr(content.size()).starts_with(after);
    };
    std::string content = messages_[i]["content"].get<std::string>();
    if (!is_written(content)) content = python_strip(content, nullptr, true, true);
    if (!is_written(content)) return unknown;
    const std::size_t end = begin + content.size();
    places[i] = {from, begin, end, end + after.size()};
    from = end;
    begin = end + after.size();
    at = next;
  }
  return at == text.size() && begin == full.size() ? places : unknown;
}

/// The turn begins where a prompt for it ends, and ends where the conversation up to it ends, less
/// white space after the end-of-turn token.
Result<AssistantSpan> SpanFinder::find_turn(std::size_t index, const std::string& full) {
  TANDEM_ASSIGN_OR_RETURN(const std::string prefix, render_first(index + 1, false));
  AssistantSpan span{index, 0, 0};
  if (index == 0) {
    TANDEM_ASSIGN_OR_RETURN(span.begin, begin_of_first(full, prefix));
  } else {
    TANDEM_ASSIGN_OR_RETURN(const std::string prompt, render_first(index, true));
    if (!full.starts_with(prompt)) return unstable(index);
    span.begin = prompt.size();
  }
  if (full.starts_with(prefix)) {
    span.end = std::max(without_trailing_space(prefix).size(), span.begin);
    return span;
  }
  TANDEM_ASSIGN_OR_RETURN(span.end, end_by_content(index, span.begin, full, prefix));
  const std::string alone = without_trailing_space(prefix);
  span.rewritten = alone.substr(std::min(span.begin, alone.size())) !=
                   full.substr(span.begin, span.end - span.begin);
  return span;
}

/// A prompt of no messages is no conversation, and many templates cannot render it. The first turn
/// begins after the header that a prompt for the next one adds, or with its content.
Result<std::size_t> SpanFinder::begin_of_first(const std::string& full, const std::string& prefix) {
  TANDEM_ASSIGN_OR_RETURN(const auto around, around_content(0, messages_.size()));
  const std::string& before = around.first;
  if (!full.starts_with(before)) return unstable(0);
  const auto prompt = render_first(1, true);
  if (!prompt.ok() || !prompt->starts_with(prefix)) return before.size();
  const std::string header = prompt->substr(prefix.size());
  const std::size_t at = before.rfind(header);
  return at == std::string::npos ? before.size() : at + header.size();
}

/// What the first `count` messages are rendered as before and after the content of one of them.
Result<std::pair<std::string, std::string>> SpanFinder::around_content(std::size_t index,
                                                                       std::size_t count) {
  Json marked = Json::array();
  for (std::size_t i = 0; i < count; ++i) marked.push_back(messages_[i]);
  marked[index]["content"] = kMarker;
  options_.add_generation_prompt = false;
  TANDEM_ASSIGN_OR_RETURN(const std::string text, render(marked));
  const std::size_t at = text.find(kMarker);
  if (at == std::string::npos || text.find(kMarker, at + 1) != std::string::npos)
    return unstable(index);
  return std::pair(text.substr(0, at), text.substr(at + kMarker.size()));
}

/// Templates that strip earlier turns' reasoning: the content's place shows when it is exchanged
/// for a marker, and what follows it is what follows it at the end of a conversation.
Result<std::size_t> SpanFinder::end_by_content(std::size_t index, std::size_t begin,
                                               const std::string& full, const std::string& prefix) {
  TANDEM_ASSIGN_OR_RETURN(const auto in_full, around_content(index, messages_.size()));
  TANDEM_ASSIGN_OR_RETURN(const auto in_prefix, around_content(index, index + 1));
  const std::string &after_in_full = in_full.second, &after_in_prefix = in_prefix.second;
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
  RenderedConversation result{std::move(rendering.text), {}, messages.size()};
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

Result<RenderedConversation> ChatTemplate::render_turn(const Json& messages, std::size_t index,
                                                       const RenderOptions& options) const {
  const auto at = messages.begin() + static_cast<std::ptrdiff_t>(index);
  Json asked(messages.begin(), at), answered(messages.begin(), at + 1);
  RenderOptions asking = options, whole = options;
  asking.add_generation_prompt = true;
  whole.add_generation_prompt = false;
  TANDEM_ASSIGN_OR_RETURN(const std::string prompt, render(asked, asking));
  TANDEM_ASSIGN_OR_RETURN(std::string turn, render(answered, whole));
  if (turn.starts_with(prompt)) {
    turn.erase(0, prompt.size());
  } else {
    // What comes after the question, with and without the answer.
    const auto after_question = [&](Json& first, const RenderOptions& as) -> Result<std::string> {
      if (index > 0) first[index - 1]["content"] = kMarker;
      TANDEM_ASSIGN_OR_RETURN(const std::string text, render(first, as));
      const std::size_t marker = text.rfind(kMarker);
      return marker == std::string::npos ? "" : text.substr(marker + kMarker.size());
    };
    TANDEM_ASSIGN_OR_RETURN(const std::string unanswered, after_question(asked, asking));
    TANDEM_ASSIGN_OR_RETURN(turn, after_question(answered, whole));
    if (unanswered.empty() || !turn.starts_with(unanswered))
      return refused_error(str("chat template: the place of the assistant's turn in message ",
                               index,
                               " cannot be told; mark the turn with {% generation %} in "
                               "the template"));
    turn.erase(0, unanswered.size());
  }
  const std::size_t end = prompt.size() + without_trailing_space(turn).size();
  return RenderedConversation{prompt + turn, {{index, prompt.size(), end}}, 2 * index + 1};
}

const std::string& ChatTemplate::source() const {
  return impl_->source;
}

}  // namespace tandem::worker::text
