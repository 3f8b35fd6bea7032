// Parses a chat template into statements (Jinja2's grammar, less what templates of models do not
// use). Internal to worker/text.
#pragma once

#include "worker/text/template_ast.h"

#include <string_view>

namespace tandem::worker::text {

/// Depth of one expression's tree: long chains of + or of filters are trees as deep as they are
/// long, and evaluation recurses.
inline constexpr int kTemplateExpressionDepthMax = 200;

/// The program of a template (valid UTF-8). Throws TemplateError with "line N: ".
Block parse_template(std::string_view source);

/// Whether a block is {% generation %} or holds one.
bool has_generation(const Block& block);

}  // namespace tandem::worker::text
