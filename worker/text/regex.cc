#include "worker/text/regex.h"

#include "worker/text/unicode.h"
#include "worker/text/utf8.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <optional>
#include <string>

namespace tandem::worker::text {
namespace {

constexpr std::size_t kJitStackBytesFirst = 32 * 1024;
constexpr std::size_t kJitStackBytesMax = 64 << 20;
constexpr std::string_view kWordClass = "\\p{L}\\p{M}\\p{Nd}\\p{Pc}";

Status dialect_error(std::string_view pattern, std::size_t offset, const char* what) {
  return refused_error(
      str("regular expression /", pattern, "/ at byte ", offset, ": ", what, " is not supported"));
}

/// Appends PCRE2's spelling of the escape \c.
Status translate_escape(char c, bool in_class, std::string& out) {
  switch (c) {
    case 's':
      out += "\\p{White_Space}";
      break;
    case 'S':
      out += "\\P{White_Space}";
      break;
    case 'w':
      out += in_class ? std::string(kWordClass) : str("[", kWordClass, "]");
      break;
    case 'W':
      if (in_class) return refused_error("\\W inside a class");
      out += str("[^", kWordClass, "]");
      break;
    case 'h':
    case 'H':
      return refused_error("\\h");
    default:
      out += '\\';
      out += c;
  }
  return Status::ok_status();
}

/// Oniguruma's spelling to PCRE2's.
Result<std::string> translate(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const Status status = translate_escape(pattern[++i], in_class, out);
      if (!status.ok()) return dialect_error(pattern, i, status.message().c_str());
      continue;
    }
    if (in_class && c == '[') return dialect_error(pattern, i, "a class inside a class");
    if (in_class && c == '&' && pattern.substr(i, 2) == "&&")
      return dialect_error(pattern, i, "a class intersection");
    if (c == '[') {
      in_class = true;
      out += c;
      if (pattern.substr(i + 1, 1) == "^") out += pattern[++i];
      if (pattern.substr(i + 1, 1) == "]") return dialect_error(pattern, i, "an empty class");
      continue;
    }
    if (c == ']') in_class = false;
    out += c;
  }
  return out;
}

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
  TANDEM_ASSIGN_OR_RETURN(const std::string translated, translate(pattern));
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
  std::size_t offset = 0;
  while (offset < text.size()) {
    const int rc = compiled_->match(text, offset, data.get());
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0)
      return refused_error(str("regular expression /", compiled_->pattern, "/ gave up at byte ",
                               offset, " of a text of ", text.size(), " bytes (", pcre2_message(rc),
                               "; limit ", kRegexMatchLimit, ")"));
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data.get());
    if (bounds[1] > bounds[0]) {
      matches.push_back({bounds[0], bounds[1]});
      offset = bounds[1];
    } else {
      offset =
          bounds[1] +
          utf8_length(static_cast<unsigned char>(bounds[1] < text.size() ? text[bounds[1]] : ' '));
    }
  }
  return Status::ok_status();
}

}  // namespace tandem::worker::text
