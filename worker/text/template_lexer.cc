#include "worker/text/template_lexer.h"

#include "worker/text/unicode.h"
#include "worker/text/utf8.h"

#include <array>

namespace tandem::worker::text {
namespace {

bool is_name_start(char32_t c) {
  return c == '_' || (is_word(c) && !is_numeric(c));
}

/// Universal newlines to \n, and the last one dropped, as Jinja2 reads a source.
std::string normalize_newlines(std::string_view source) {
  std::string out;
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out += source[i];
    }
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}
  std::vector<TemplateToken> run();

 private:
  [[noreturn]] void fail(const std::string& what) const {
    template_invalid(str("line ", line_, ": ", what));
  }
  [[nodiscard]] std::string_view rest() const { return std::string_view(source_).substr(at_); }
  [[nodiscard]] bool at(std::string_view what) const { return rest().starts_with(what); }
  void advance(std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) line_ += source_[at_ + i] == '\n';
    at_ += bytes;
    if (bytes > 0) line_starting_ = source_[at_ - 1] == '\n';
  }
  void skip_space() {
    std::size_t i = at_;
    while (i < source_.size()) {
      std::size_t after = i;
      if (!is_python_space(next_code_point(source_, after))) break;
      i = after;
    }
    advance(i - at_);
  }
  void push(TokenKind kind, std::string text) {
    if (tokens_.size() >= kTemplateTokensMax)
      template_refused(
          str("line ", line_, ": the template has more than ", kTemplateTokensMax, " tokens"));
    tokens_.push_back({kind, std::move(text), line_});
  }
  void push_data(std::size_t length, char sign, bool is_variable);
  void lex_tag();
  void skip_comment();
  bool lex_raw();
  void lex_inside(bool is_block);
  bool end_of_tag(bool is_block);
  void lex_string(char quote);
  void lex_number();
  void lex_name();
  void lex_operator();
  void append_escape(std::string& out);
  unsigned read_digits(int base, int digits_min, int digits_max);
  /// After the tag's closing characters.
  void close(std::size_t bytes, bool strips, bool trims_newline) {
    advance(bytes);
    if (strips)
      skip_space();
    else if (trims_newline && at("\n"))
      advance(1);
  }

  std::string source_;
  std::size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<char> brackets_;
  std::vector<TemplateToken> tokens_;
};

std::vector<TemplateToken> Lexer::run() {
  while (at_ < source_.size()) {
    std::size_t tag = at_;
    for (; tag < source_.size(); ++tag)
      if (source_[tag] == '{' && tag + 1 < source_.size() &&
          std::string_view("{%#").find(source_[tag + 1]) != std::string_view::npos)
        break;
    const bool found = tag < source_.size();
    const char sign = found && tag + 2 < source_.size() ? source_[tag + 2] : ' ';
    push_data(tag - at_, found ? sign : '+', found && source_[tag + 1] == '{');
    if (found) lex_tag();
  }
  push(TokenKind::kEnd, "");
  return std::move(tokens_);
}

/// Text before a tag: "-" strips all white space before it; else a block that is the first thing
/// on its line takes the line's indentation with it (lstrip_blocks).
void Lexer::push_data(std::size_t length, char sign, bool is_variable) {
  std::string text = source_.substr(at_, length);
  if (sign == '-') {
    while (!text.empty()) {
      std::size_t last = text.size() - 1;
      while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
      std::size_t i = last;
      if (!is_python_space(next_code_point(text, i))) break;
      text.resize(last);
    }
  } else if (sign != '+' && !is_variable) {
    const std::size_t newline = text.rfind('\n');
    const std::size_t begin = newline == std::string::npos ? 0 : newline + 1;
    if (begin > 0 || line_starting_) {
      bool only_space = true;
      for (std::size_t i = begin; i < text.size();)
        only_space = is_python_space(next_code_point(text, i)) && only_space;
      if (only_space) text.resize(begin);
    }
  }
  if (!text.empty()) push(TokenKind::kData, std::move(text));
  advance(length);
}

void Lexer::lex_tag() {
  const char type = source_[at_ + 1];
  if (type == '#') return skip_comment();
  if (type == '%' && lex_raw()) return;
  push(type == '%' ? TokenKind::kBlockBegin : TokenKind::kVariableBegin, "");
  advance(2);
  if (at("-") || at("+")) advance(1);
  lex_inside(type == '%');
}

void Lexer::skip_comment() {
  const std::size_t end = source_.find("#}", at_ + 2);
  if (end == std::string::npos) fail("a comment {# is not closed");
  const bool strips = source_[end - 1] == '-' && end > at_ + 2;
  const bool keeps = source_[end - 1] == '+' && end > at_ + 2;
  close(end + 2 - at_, strips, !keeps);
}

/// {% raw %} ... {% endraw %}: the text between is data.
bool Lexer::lex_raw() {
  const auto tag_length = [&](std::size_t from, std::string_view name, bool& strips) {
    std::size_t i = from + 2;
    const auto skip = [&](std::string_view set) {
      while (i < source_.size() && set.find(source_[i]) != std::string_view::npos) ++i;
    };
    if (i < source_.size() && (source_[i] == '-' || source_[i] == '+')) ++i;
    skip(" \t\n");
    if (source_.compare(i, name.size(), name) != 0) return std::size_t{0};
    i += name.size();
    skip(" \t\n");
    strips = i < source_.size() && source_[i] == '-';
    if (i < source_.size() && (source_[i] == '-' || source_[i] == '+')) ++i;
    return source_.compare(i, 2, "%}") == 0 ? i + 2 - from : std::size_t{0};
  };
  bool strips = false;
  const std::size_t open = tag_length(at_, "raw", strips);
  if (open == 0) return false;
  close(open, strips, false);
  for (std::size_t end = source_.find("{%", at_); end != std::string::npos;
       end = source_.find("{%", end + 2)) {
    const std::size_t length = tag_length(end, "endraw", strips);
    if (length == 0) continue;
    push_data(end - at_, source_[end + 2], false);
    close(length, strips, true);
    return true;
  }
  fail("{% raw %} is not closed by {% endraw %}");
}

bool Lexer::end_of_tag(bool is_block) {
  if (!brackets_.empty()) return false;
  const std::string_view end = is_block ? "%}" : "}}";
  const bool sign = at("-") || (at("+") && is_block);
  const std::string_view after = rest().substr(sign ? 1 : 0);
  if (!after.starts_with(end)) return false;
  push(is_block ? TokenKind::kBlockEnd : TokenKind::kVariableEnd, "");
  close(sign ? 3 : 2, at("-"), is_block && !sign);
  return true;
}

void Lexer::lex_inside(bool is_block) {
  while (true) {
    if (at_ >= source_.size()) fail(is_block ? "{% is not closed" : "{{ is not closed");
    if (end_of_tag(is_block)) return;
    std::size_t after = at_;
    const char32_t c = next_code_point(source_, after);
    if (is_python_space(c))
      skip_space();
    else if (c == '\'' || c == '"')
      lex_string(static_cast<char>(c));
    else if (c >= '0' && c <= '9')
      lex_number();
    else if (is_name_start(c))
      lex_name();
    else
      lex_operator();
  }
}

void Lexer::lex_name() {
  std::size_t end = at_;
  while (end < source_.size()) {
    std::size_t after = end;
    if (!is_word(next_code_point(source_, after))) break;
    end = after;
  }
  push(TokenKind::kName, source_.substr(at_, end - at_));
  advance(end - at_);
}

void Lexer::lex_number() {
  std::size_t end = at_;
  const auto digits = [&] {
    while (end < source_.size() &&
           ((source_[end] >= '0' && source_[end] <= '9') || source_[end] == '_'))
      ++end;
  };
  digits();
  bool is_float = false;
  if (end + 1 < source_.size() && source_[end] == '.' && source_[end + 1] >= '0' &&
      source_[end + 1] <= '9') {
    is_float = true;
    ++end;
    digits();
  }
  if (end < source_.size() && (source_[end] == 'e' || source_[end] == 'E')) {
    is_float = true;
    ++end;
    if (end < source_.size() && (source_[end] == '+' || source_[end] == '-')) ++end;
    digits();
  }
  std::string text = source_.substr(at_, end - at_);
  std::erase(text, '_');
  std::size_t next = end;
  if (next < source_.size() && is_name_start(next_code_point(source_, next)))
    fail(str("the number ", text, " runs into a name (only decimal numbers are supported)"));
  push(is_float ? TokenKind::kFloat : TokenKind::kInteger, std::move(text));
  advance(end - at_);
}

unsigned Lexer::read_digits(int base, int digits_min, int digits_max) {
  unsigned value = 0;
  int count = 0;
  for (; count < digits_max && at_ < source_.size(); ++count) {
    const char c = source_[at_];
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : 99;
    if (digit >= base) break;
    value = value * static_cast<unsigned>(base) + static_cast<unsigned>(digit);
    advance(1);
  }
  if (count < digits_min) fail("a text has an unfinished escape sequence");
  return value;
}

/// One escape of a text, after its backslash; unknown ones keep the backslash (Python).
void Lexer::append_escape(std::string& out) {
  static constexpr std::string_view kNames = "ntrabfv\\'\"";
  static constexpr std::string_view kValues = "\n\t\r\a\b\f\v\\'\"";
  const char c = source_[at_];
  if (const std::size_t known = kNames.find(c); known != std::string_view::npos) {
    out += kValues[known];
    advance(1);
  } else if (c == '\n') {
    advance(1);
  } else if (c >= '0' && c <= '7') {
    append_code_point(out, read_digits(8, 1, 3));
  } else if (c == 'x' || c == 'u' || c == 'U') {
    advance(1);
    const int digits = c == 'x' ? 2 : c == 'u' ? 4 : 8;
    const unsigned code = read_digits(16, digits, digits);
    if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000))
      fail("a text has an escape that is no character");
    append_code_point(out, code);
  } else if (c == 'N') {
    template_refused(str("line ", line_, ": \\N{...} is not supported"));
  } else {
    out += '\\';
  }
}

void Lexer::lex_string(char quote) {
  const int line = line_;
  advance(1);
  std::string value;
  while (true) {
    if (at_ >= source_.size()) fail(str("a text that begins on line ", line, " is not closed"));
    const char c = source_[at_];
    if (c == quote) break;
    if (c != '\\') value += c;
    advance(1);
    if (c != '\\') continue;
    if (at_ >= source_.size()) fail("a text ends in a backslash");
    append_escape(value);
  }
  advance(1);
  push(TokenKind::kString, std::move(value));
}

void Lexer::lex_operator() {
  static constexpr std::array<std::string_view, 29> kOperators{
      "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(",
      ")",  "{",  "}",  ">",  "<",  "=",  ".", ":", "|", ",", ";", "&", "^", "@"};
  for (const std::string_view op : kOperators) {
    if (!at(op)) continue;
    if (op == "(" || op == "[" || op == "{") brackets_.push_back(op[0]);
    if (op == ")" || op == "]" || op == "}") {
      const char open = op == ")" ? '(' : op == "]" ? '[' : '{';
      if (brackets_.empty() || brackets_.back() != open) fail(str("unexpected \"", op, "\""));
      brackets_.pop_back();
    }
    push(TokenKind::kOperator, std::string(op));
    advance(op.size());
    return;
  }
  fail(str("unexpected character \"",
           rest().substr(0, utf8_length(static_cast<unsigned char>(source_[at_]))), "\""));
}

}  // namespace

std::vector<TemplateToken> lex_template(std::string_view source) {
  return Lexer(normalize_newlines(source)).run();
}

}  // namespace tandem::worker::text
