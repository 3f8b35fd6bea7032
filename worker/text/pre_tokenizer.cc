#include "worker/text/pre_tokenizer.h"

#include "worker/text/unicode.h"
#include "worker/text/utf8.h"

#include <algorithm>
#include <string_view>

namespace tandem::worker::text {

const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

/// A stretch of a piece that either matched the pattern or lies between matches.
struct Stretch {
  Span span;
  bool matched;
};

/// Cuts [0, size) at the matches, of which some may be empty; stretches between them are not.
std::vector<Stretch> stretches_of(const std::vector<Span>& matches, std::size_t size, bool invert) {
  std::vector<Stretch> out;
  std::size_t from = 0;
  for (const Span& match : matches) {
    if (match.begin > from) out.push_back({{from, match.begin}, invert});
    out.push_back({match, !invert});
    from = match.end;
  }
  if (from < size) out.push_back({{from, size}, invert});
  return out;
}

/// Appends the pieces that `behavior` makes of the stretches, moved by `base`.
void join_stretches(const std::vector<Stretch>& stretches, SplitBehavior behavior, std::size_t base,
                    std::vector<Span>& pieces) {
  const std::size_t first = pieces.size();
  bool previous_matched = false;
  for (std::size_t i = 0; i < stretches.size(); ++i) {
    const auto& [span, matched] = stretches[i];
    const Span moved{span.begin + base, span.end + base};
    const bool after_any = pieces.size() > first;
    bool extend = false;
    switch (behavior) {
      case SplitBehavior::kRemoved:
        if (!matched) pieces.push_back(moved);
        continue;
      case SplitBehavior::kIsolated:
        break;
      case SplitBehavior::kContiguous:
        extend = after_any && matched == previous_matched;
        break;
      case SplitBehavior::kMergedWithPrevious:
        extend = after_any && matched && !previous_matched;
        break;
      case SplitBehavior::kMergedWithNext:
        extend = after_any && !matched && previous_matched;
        break;
    }
    if (extend)
      pieces.back().end = moved.end;
    else
      pieces.push_back(moved);
    previous_matched = matched;
  }
  pieces.erase(std::remove_if(pieces.begin() + static_cast<std::ptrdiff_t>(first), pieces.end(),
                              [](const Span& piece) { return piece.size() == 0; }),
               pieces.end());
}

Status find_pattern(const std::variant<std::string, Regex>& pattern, std::string_view text,
                    std::vector<Span>& matches) {
  if (const auto* regex = std::get_if<Regex>(&pattern)) return regex->find_all(text, matches);
  const std::string& literal = std::get<std::string>(pattern);
  for (std::size_t at = text.find(literal); at != std::string_view::npos;
       at = text.find(literal, at + literal.size()))
    matches.push_back({at, at + literal.size()});
  return Status::ok_status();
}

/// Splits every piece; `find(text, matches)` says where.
template <class Find>
Status split_pieces(const std::string& buffer, std::vector<Span>& pieces, SplitBehavior behavior,
                    bool invert, const Find& find) {
  std::vector<Span> out, matches;
  out.reserve(pieces.size());
  for (const Span& piece : pieces) {
    matches.clear();
    const auto text = std::string_view(buffer).substr(piece.begin, piece.size());
    TANDEM_RETURN_IF_ERROR(find(text, matches));
    join_stretches(stretches_of(matches, text.size(), invert), behavior, piece.begin, out);
  }
  pieces.swap(out);
  return Status::ok_status();
}

Status find_digits(std::string_view text, std::vector<Span>& matches) {
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t begin = i;
    if (is_numeric(next_code_point(text, i))) matches.push_back({begin, i});
  }
  return Status::ok_status();
}

Status apply_step(const SplitStep& step, TextPlace, std::string& buffer,
                  std::vector<Span>& pieces) {
  return split_pieces(buffer, pieces, step.behavior, step.invert,
                      [&](std::string_view text, std::vector<Span>& matches) {
                        return find_pattern(step.pattern, text, matches);
                      });
}

Status apply_step(const DigitsStep& step, TextPlace, std::string& buffer,
                  std::vector<Span>& pieces) {
  const auto behavior = step.individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous;
  return split_pieces(buffer, pieces, behavior, false, find_digits);
}

void add_prefix_spaces(TextPlace place, std::string& buffer, std::vector<Span>& pieces) {
  std::string out;
  for (Span& piece : pieces) {
    const std::size_t begin = out.size();
    const bool here = !(place.continues && piece.begin == 0);
    if (here && buffer[piece.begin] != ' ') out.push_back(' ');
    out.append(buffer, piece.begin, piece.size());
    piece = {begin, out.size()};
  }
  buffer.swap(out);
}

Status apply_step(const ByteLevelStep& step, TextPlace place, std::string& buffer,
                  std::vector<Span>& pieces) {
  if (step.add_prefix_space) add_prefix_spaces(place, buffer, pieces);
  if (!step.regex) return Status::ok_status();
  return split_pieces(buffer, pieces, SplitBehavior::kIsolated, false,
                      [&](std::string_view text, std::vector<Span>& matches) {
                        return step.regex->find_all(text, matches);
                      });
}

/// Spaces of every piece become U+2581; where the step says so, one is put before the piece.
void write_metaspaces(const MetaspaceStep& step, TextPlace place, std::string& buffer,
                      std::vector<Span>& pieces) {
  std::string out;
  for (Span& piece : pieces) {
    const std::size_t begin = out.size();
    const std::string_view text = std::string_view(buffer).substr(piece.begin, piece.size());
    const bool first = piece.begin == 0;
    const bool wanted =
        step.prepend == MetaspaceStep::Prepend::kAlways
            ? !(first && place.continues)
            : step.prepend == MetaspaceStep::Prepend::kFirst && first && place.begins;
    if (wanted && !text.starts_with(' ') && !text.starts_with(kMetaspace)) out += kMetaspace;
    for (const char c : text) {
      if (c == ' ')
        out += kMetaspace;
      else
        out += c;
    }
    piece = {begin, out.size()};
  }
  buffer.swap(out);
}

Status apply_step(const MetaspaceStep& step, TextPlace place, std::string& buffer,
                  std::vector<Span>& pieces) {
  write_metaspaces(step, place, buffer, pieces);
  if (!step.split) return Status::ok_status();
  return split_pieces(buffer, pieces, SplitBehavior::kMergedWithNext, false,
                      [](std::string_view text, std::vector<Span>& matches) {
                        return find_pattern(std::string(kMetaspace), text, matches);
                      });
}

}  // namespace

Status PreTokenizer::apply(std::string& buffer, TextPlace place, std::vector<Span>& pieces) const {
  pieces.clear();
  if (buffer.empty()) return Status::ok_status();
  pieces.push_back({0, buffer.size()});
  for (const Step& step : steps_) {
    TANDEM_RETURN_IF_ERROR(
        std::visit([&](const auto& s) { return apply_step(s, place, buffer, pieces); }, step));
  }
  return Status::ok_status();
}

}  // namespace tandem::worker::text
