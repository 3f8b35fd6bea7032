#include "worker/text/normalizer.h"

namespace tandem::worker::text {
namespace {

Status find_literal(std::string_view text, const std::string& literal, std::vector<Span>& found) {
  for (std::size_t at = text.find(literal); at != std::string_view::npos;
       at = text.find(literal, at + literal.size()))
    found.push_back({at, at + literal.size()});
  return Status::ok_status();
}

Result<std::string> apply_step(NormalForm form, const std::string& text) {
  return normalize(text, form);
}

Result<std::string> apply_step(const PrependStep& step, const std::string& text) {
  return text.empty() ? text : step.prefix + text;
}

Result<std::string> apply_step(const ReplaceStep& step, const std::string& text) {
  std::vector<Span> matches;
  if (const auto* literal = std::get_if<std::string>(&step.pattern)) {
    TANDEM_RETURN_IF_ERROR(find_literal(text, *literal, matches));
  } else {
    TANDEM_RETURN_IF_ERROR(std::get<Regex>(step.pattern).find_all(text, matches));
  }
  if (text.size() + matches.size() * step.content.size() > kNormalizedBytesMax)
    return refused_error(str("text of ", text.size(), " bytes would grow over ",
                             kNormalizedBytesMax, " bytes in the tokenizer's normalizer"));
  std::string out;
  std::size_t from = 0;
  for (const Span& match : matches) {
    out.append(text, from, match.begin - from);
    out += step.content;
    from = match.end;
  }
  out.append(text, from);
  return out;
}

}  // namespace

Result<std::string> Normalizer::apply(std::string_view text, bool prepend) const {
  std::string current(text);
  for (const Step& step : steps_) {
    if (!prepend && std::holds_alternative<PrependStep>(step)) continue;
    auto next = std::visit([&](const auto& s) { return apply_step(s, current); }, step);
    if (!next.ok()) return next.status();
    current = std::move(next).value();
  }
  return current;
}

}  // namespace tandem::worker::text
