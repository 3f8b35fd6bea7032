#include "worker/text/regex.h"

#include "worker/text/unicode.h"
#include "worker/text/utf8.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace tandem::worker::text {
namespace {

constexpr std::size_t kJitStackBytesFirst = 32 * 1024;
constexpr std::size_t kJitStackBytesMax = 64 << 20;
constexpr std::string_view kWordClass = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}";
/// Outside a class Oniguruma takes Latin-1's superscripts and fractions for words as well.
constexpr std::string_view kWord =
    "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{B2}\\x{B3}\\x{B9}\\x{BC}-\\x{BE}";

Status dialect_error(std::string_view pattern, std::size_t offset, const char* what) {
  return refused_error(
      str("regular expression /", pattern, "/ at byte ", offset, ": ", what, " is not supported"));
}

/// Where Oniguruma's idea of a word begins or ends (`wanted`), or does not.
std::string word_boundary(bool wanted) {
  const std::string word = str("[", kWord, "]");
  return wanted ? str("(?:(?<=", word, ")(?!", word, ")|(?<!", word, ")(?=", word, "))")
                : str("(?:(?<=", word, ")(?=", word, ")|(?<!", word, ")(?!", word, "))");
}

/// Oniguruma's spelling (as Ruby has it) to PCRE2's.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : pattern_(pattern) {}

  Result<std::string> run() {
    while (at_ < pattern_.size()) {
      const std::size_t begin = at_;
      const Status status = step();
      if (!status.ok()) return dialect_error(pattern_, begin, status.message().c_str());
    }
    return std::move(out_);
  }

 private:
  Status step() {
    const char c = pattern_[at_];
    if (c == '\\' && at_ + 1 < pattern_.size()) return escape();
    if (in_class_) return inside_class(c);
    if (c == '{' && atom_ && bounds()) return Status::ok_status();
    if (c == '[') {
      atom_ = out_.size();
      return begin_class();
    }
    if (c == '(') groups_.push_back(out_.size());
    if (c == ')' && !groups_.empty()) {
      atom_ = groups_.back();
      groups_.pop_back();
    } else if (c == '(' || c == '|') {
      atom_.reset();
    } else if (c != '*' && c != '+' && c != '?' && (static_cast<unsigned char>(c) & 0xC0) != 0x80) {
      atom_ = out_.size();  // a character; its further bytes belong to it
    }
    copy(1);
    return Status::ok_status();
  }

  Status begin_class() {
    in_class_ = true;
    copy(1);
    if (pattern_.substr(at_, 1) == "^") copy(1);
    return pattern_.substr(at_, 1) == "]" ? refused_error("an empty class") : Status();
  }

  Status inside_class(char c) {
    if (c == '[') return refused_error("a class inside a class");
    if (pattern_.substr(at_, 2) == "&&") return refused_error("a class intersection");
    if (c == ']') in_class_ = false;
    copy(1);
    return Status::ok_status();
  }

  Status escape() {
    if (!in_class_) atom_ = out_.size();
    const char c = pattern_[at_ + 1];
    if (c == 'p' || c == 'P' || c == 'x') {  // braces after it are no bounds
      const std::size_t end = pattern_.find('}', at_);
      const bool braces = pattern_.substr(at_ + 2, 1) == "{" && end != std::string_view::npos;
      copy(braces ? end + 1 - at_ : c == 'x' ? 2 : 3);
      return Status::ok_status();
    }
    if (c == 'u' && at_ + 6 <= pattern_.size()) {
      out_ += str("\\x{", pattern_.substr(at_ + 2, 4), "}");
      at_ += 6;
      return Status::ok_status();
    }
    const Status status = class_escape(c);
    at_ += 2;
    return status;
  }

  /// Escapes whose characters differ between the two.
  Status class_escape(char c) {
    const auto set = [&](std::string_view inside, bool negated) -> Status {
      if (in_class_ && negated) return refused_error("a negated escape inside a class");
      out_ += in_class_ ? std::string(inside) : str(negated ? "[^" : "[", inside, "]");
      return Status::ok_status();
    };
    switch (c) {
      case 's':
        out_ += "\\p{White_Space}";
        return Status::ok_status();
      case 'S':
        out_ += "\\P{White_Space}";
        return Status::ok_status();
      case 'w':
      case 'W':
        return set(in_class_ ? kWordClass : kWord, c == 'W');
      case 'h':
      case 'H':
        return set("0-9A-Fa-f", c == 'H');
      case 'b':
      case 'B':
        out_ += in_class_ ? str('\\', c) : word_boundary(c == 'b');
        return Status::ok_status();
      case 'X':
        return refused_error("\\X");
      default:
        out_ += str('\\', c);
        return Status::ok_status();
    }
  }

  /// {n}, {n,}, {n,m} or {,m}; false: a brace that means itself. In Ruby a + after bounds repeats
  /// what they bound and does not make them possessive, and a ? after {n} makes it optional.
  bool bounds() {
    const std::size_t end = pattern_.find('}', at_);
    if (end == std::string_view::npos) return false;
    const std::string_view inside = pattern_.substr(at_ + 1, end - at_ - 1);
    const std::size_t comma = inside.find(',');
    const auto digits = [](std::string_view text) {
      return text.find_first_not_of("0123456789") == std::string_view::npos;
    };
    const std::string_view low = inside.substr(0, comma);
    const std::string_view high =
        comma == std::string_view::npos ? std::string_view() : inside.substr(comma + 1);
    if (!digits(low) || !digits(high) || (low.empty() && high.empty())) return false;
    out_ +=
        str("{", low.empty() ? "0" : low, comma == std::string_view::npos ? "" : ",", high, "}");
    at_ = end + 1;
    const std::string_view next = pattern_.substr(at_, 1);
    if (next == "+" || (next == "?" && comma == std::string_view::npos)) {
      out_.insert(*atom_, "(?:");
      out_ += ")";
    }
    return true;
  }

  void copy(std::size_t bytes) {
    const std::string_view part = pattern_.substr(at_, bytes);
    out_ += part;
    at_ += part.size();
  }

  const std::string_view pattern_;
  std::size_t at_ = 0;
  bool in_class_ = false;
  std::string out_;
  std::optional<std::size_t> atom_;  ///< where in out_ begins what a quantifier would repeat
  std::vector<std::size_t> groups_;  ///< where in out_ the open ones begin
};

/// Letters and numbers too new for PCRE2's tables give way to old ones of the same class and the
/// same number of bytes, so that pieces do not depend on its version. Nothing when there are none.
std::optional<std::string> with_known_characters(std::string_view text) {
  std::optional<std::string> out;
  for (std::size_t i = 0; i + 2 < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const auto second = static_cast<unsigned char>(text[i + 1]);
    const bool may_be_newer =
        lead >= 0xF0 || (lead == 0xE1 && second == 0xB2) || (lead == 0xEA && second == 0x9F);
    if (!may_be_newer) {
      ++i;
      continue;
    }
    const std::size_t begin = i;
    const NewerClass newer = newer_class(next_code_point(text, i));
    if (newer == NewerClass::kNone) continue;
    if (!out) out = std::string(text);
    const std::string_view known = newer == NewerClass::kNumber ? "\U0001D7CE"
                                   : lead < 0xF0                ? "\u4E00"
                                                                : "\U00020000";
    out->replace(begin, known.size(), known);
  }
  return out;
}

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

}  // namespace

struct Regex::Compiled {
  std::string pattern;
  pcre2_code* code = nullptr;
  pcre2_match_context* context = nullptr;
  Compiled() = default;
  Compiled(const Compiled&) = delete;
  Compiled& operator=(const Compiled&) = delete;
  ~Compiled() {
    pcre2_match_context_free(context);
    pcre2_code_free(code);
  }
  /// One match. Deep backtracking outgrows the small default stack of compiled code: it is then
  /// repeated once on a large one.
  int match(std::string_view text, std::size_t offset, pcre2_match_data* data) const {
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    int rc = pcre2_match(code, subject, text.size(), offset, PCRE2_NO_UTF_CHECK, data, context);
    if (rc != PCRE2_ERROR_JIT_STACKLIMIT) return rc;
    pcre2_jit_stack* stack =
        pcre2_jit_stack_create(kJitStackBytesFirst, kJitStackBytesMax, nullptr);
    pcre2_match_context* large = pcre2_match_context_copy(context);
    if (stack != nullptr && large != nullptr) {
      pcre2_jit_stack_assign(large, nullptr, stack);
      rc = pcre2_match(code, subject, text.size(), offset, PCRE2_NO_UTF_CHECK, data, large);
    }
    pcre2_match_context_free(large);
    pcre2_jit_stack_free(stack);
    return rc;
  }
};

Result<Regex> Regex::compile(std::string_view pattern) {
  if (pattern.size() > kRegexBytesMax)
    return refused_error(str("regular expression of ", pattern.size(), " bytes; at most ",
                             kRegexBytesMax, " are supported"));
  TANDEM_ASSIGN_OR_RETURN(const std::string translated, Translator(pattern).run());
  auto compiled = std::make_shared<Compiled>();
  compiled->pattern = std::string(pattern);
  int code = 0;
  PCRE2_SIZE offset = 0;
  compiled->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                                 &code, &offset, nullptr);
  if (compiled->code == nullptr)
    return invalid_error(str("regular expression /", pattern, "/ is wrong near byte ", offset, ": ",
                             pcre2_message(code)));
  // Without JIT (a platform that lacks it) matching is interpreted: slower, the same result.
  (void)pcre2_jit_compile(compiled->code, PCRE2_JIT_COMPLETE);
  compiled->context = pcre2_match_context_create(nullptr);
  TANDEM_CHECK(compiled->context != nullptr);
  pcre2_set_match_limit(compiled->context, kRegexMatchLimit);
  return Regex(std::shared_ptr<const Compiled>(std::move(compiled)));
}

Status Regex::find_all(std::string_view given, std::vector<Span>& matches) const {
  const std::optional<std::string> known = with_known_characters(given);
  const std::string_view text = known ? std::string_view(*known) : given;
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
      pcre2_match_data_create_from_pattern(compiled_->code, nullptr), &pcre2_match_data_free);
  TANDEM_CHECK(data != nullptr);
  // Empty matches count, but for one where the match before ended.
  std::optional<std::size_t> last_end;
  for (std::size_t offset = 0; offset <= text.size();) {
    const int rc = compiled_->match(text, offset, data.get());
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0)
      return refused_error(str("regular expression /", compiled_->pattern, "/ gave up at byte ",
                               offset, " of a text of ", text.size(), " bytes (", pcre2_message(rc),
                               "; limit ", kRegexMatchLimit, ")"));
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data.get());
    if (bounds[0] == bounds[1] && last_end == bounds[1]) {
      offset += offset < text.size() ? utf8_length(static_cast<unsigned char>(text[offset])) : 1;
      continue;
    }
    matches.push_back({bounds[0], bounds[1]});
    offset = bounds[1];
    last_end = offset;
  }
  return Status::ok_status();
}

}  // namespace tandem::worker::text
