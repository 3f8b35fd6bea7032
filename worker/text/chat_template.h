// Chat templates: an interpreter of the part of Jinja2 that models' templates use, with the
// settings of Hugging Face transformers (trim_blocks, lstrip_blocks, tojson without ASCII escapes,
// raise_exception, strftime_now, {% generation %}). The oracle is jinja2: identical text, or a
// clear error that names the construct and its line; never something close.
#pragma once

#include "protocol/base/result.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::worker::text {

/// Limits of one template and of one rendering; each error names the one that was hit.
inline constexpr std::size_t kTemplateBytesMax = std::size_t{1} << 20;
inline constexpr int kTemplateNestingMax = 64;  ///< of blocks, expressions and macro calls
inline constexpr std::int64_t kTemplateStepsMax = 5'000'000;  ///< evaluated nodes and copied items
inline constexpr std::size_t kTemplateOutputBytesMax = std::size_t{16} << 20;

struct RenderOptions {
  bool add_generation_prompt = false;  ///< ends with the header of the assistant's next turn
  std::string bos_token{};             ///< Tokenizer::bos_token()
  std::string eos_token{};
  nlohmann::ordered_json tools{};  ///< an array of tool schemas; null: none
  /// An object of further variables (enable_thinking, ...); null: none.
  nlohmann::ordered_json extra{};
  std::optional<std::int64_t> now_unix_s{};  ///< what strftime_now formats (UTC); absent: undefined
};

/// A range of bytes of a rendered conversation that a model has to learn to write.
struct AssistantSpan {
  std::size_t message = 0;  ///< index of the assistant's message
  std::size_t begin = 0;    ///< first byte after the turn's header
  std::size_t end = 0;      ///< one past the end-of-turn token ("<|im_end|>"), which is trained too
  bool rewritten = false;   ///< written otherwise than when the conversation ends with this turn
};

struct RenderedConversation {
  std::string text;
  std::vector<AssistantSpan> assistant;  ///< in order, disjoint
  std::size_t messages_rendered = 0;     ///< by all renderings that it took: what it cost
};

/// Immutable after parse(); copies share the program. Any thread.
class ChatTemplate {
 public:
  /// Refused: a construct outside the supported part of Jinja. Invalid: a syntax error. Both name
  /// the line.
  static Result<ChatTemplate> parse(std::string_view source);

  /// Renders `messages`, an array of {"role", "content", ...}. Invalid: messages of another shape,
  /// raise_exception() called by the template, an operation that Python would refuse. Refused: a
  /// limit hit, an unsupported filter or method.
  [[nodiscard]] Result<std::string> render(const nlohmann::ordered_json& messages,
                                           const RenderOptions& options = {}) const;

  /// Renders a whole conversation (add_generation_prompt is taken as false) and says which bytes
  /// are the assistant's: by {% generation %} blocks where the template has them, else by comparing
  /// the renderings of its prefixes. Of more than 8 turns, those between the same texts of the
  /// template are placed once, so that many turns cost little more than their text. A conversation
  /// may begin with the assistant. Refused: a template whose text for a turn depends on later turns
  /// in a way that leaves the turn's place unknown.
  [[nodiscard]] Result<RenderedConversation> render_with_spans(
      const nlohmann::ordered_json& messages, const RenderOptions& options = {}) const;

  /// The conversation up to one assistant's turn, as the model is asked for it: the prompt for the
  /// turn, and the turn, also where the template writes the prompt differently once it is answered.
  /// Refused: what follows the question does not show where the turn begins.
  [[nodiscard]] Result<RenderedConversation> render_turn(const nlohmann::ordered_json& messages,
                                                         std::size_t index,
                                                         const RenderOptions& options = {}) const;

  [[nodiscard]] const std::string& source() const;

  /// The parsed program; internal to worker/text.
  struct Impl;
  explicit ChatTemplate(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

 private:
  std::shared_ptr<const Impl> impl_;
};

}  // namespace tandem::worker::text
