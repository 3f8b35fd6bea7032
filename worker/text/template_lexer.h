// Cuts a chat template into tokens as Jinja2's lexer does with trim_blocks and lstrip_blocks.
// Internal to worker/text.
#pragma once

#include "worker/text/template_value.h"

#include <string>
#include <string_view>
#include <vector>

namespace tandem::worker::text {

enum class TokenKind {
  kData,           ///< text between tags
  kBlockBegin,     ///< {%
  kBlockEnd,       ///< %}
  kVariableBegin,  ///< {{
  kVariableEnd,    ///< }}
  kName,
  kString,  ///< text is the value
  kInteger,
  kFloat,
  kOperator,  ///< text is the operator
  kEnd,
};

struct TemplateToken {
  TokenKind kind = TokenKind::kEnd;
  std::string text;
  int line = 0;
};

/// Most tokens of one template.
inline constexpr std::size_t kTemplateTokensMax = 200'000;

/// The tokens of a template (valid UTF-8), kEnd last. Throws TemplateError with "line N: ".
std::vector<TemplateToken> lex_template(std::string_view source);

}  // namespace tandem::worker::text
