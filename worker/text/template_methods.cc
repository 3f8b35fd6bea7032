// Methods of texts, dicts and lists in chat templates: Python's, without those that change their
// object (the sandbox refuses them too).
#include "worker/text/chat_template.h"
#include "worker/text/template_interpreter.h"
#include "worker/text/unicode.h"
#include "worker/text/utf8.h"

#include <algorithm>
#include <array>

namespace tandem::worker::text {
namespace {

constexpr std::array<std::string_view, 47> kStringMethods{
    "capitalize",   "casefold",    "center",    "count",      "encode",       "endswith",
    "expandtabs",   "find",        "format",    "format_map", "index",        "isalnum",
    "isalpha",      "isascii",     "isdecimal", "isdigit",    "isidentifier", "islower",
    "isnumeric",    "isprintable", "isspace",   "istitle",    "isupper",      "join",
    "ljust",        "lower",       "lstrip",    "maketrans",  "partition",    "removeprefix",
    "removesuffix", "replace",     "rfind",     "rindex",     "rjust",        "rpartition",
    "rsplit",       "rstrip",      "split",     "splitlines", "startswith",   "strip",
    "swapcase",     "title",       "translate", "upper",      "zfill"};
constexpr std::array<std::string_view, 11> kDictMethods{
    "clear", "copy",    "fromkeys",   "get",    "items", "keys",
    "pop",   "popitem", "setdefault", "update", "values"};
constexpr std::array<std::string_view, 11> kListMethods{"append", "clear",   "copy",   "count",
                                                        "extend", "index",   "insert", "pop",
                                                        "remove", "reverse", "sort"};

template <class Names>
bool is_among(const Names& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

/// Characters whose upper-case form is several characters in Unicode; utf8proc has single ones.
bool uppercase_is_longer(char32_t c) {
  return c == 0xDF || c == 0x149 || c == 0x1F0 || c == 0x390 || c == 0x3B0 || c == 0x587 ||
         (c >= 0x1E96 && c <= 0x1E9A) || (c >= 0x1F50 && c <= 0x1FFC) ||
         (c >= 0xFB00 && c <= 0xFB17) || c == 0x345;
}

/// The two whose lower-case form depends on what surrounds them or is longer.
bool lowercase_is_special(char32_t c) {
  return c == 0x130 || c == 0x3A3;
}

[[noreturn]] void refuse_case(char32_t c) {
  std::string shown;
  append_code_point(shown, c);
  template_refused(str("changing the case of \"", shown, "\" is not supported"));
}

char32_t upper_one(char32_t c) {
  if (uppercase_is_longer(c)) refuse_case(c);
  return to_upper(c);
}
char32_t lower_one(char32_t c) {
  if (lowercase_is_special(c)) refuse_case(c);
  return to_lower(c);
}

template <class Map>
std::string map_characters(const std::string& s, const Map& map) {
  std::string out;
  for (std::size_t i = 0; i < s.size();) append_code_point(out, map(next_code_point(s, i)));
  return out;
}

/// str.title(): a letter after a letter is lower, any other upper.
std::string python_title(const std::string& s) {
  bool after_letter = false;
  return map_characters(s, [&](char32_t c) {
    // Digraphs have a third, title case.
    if (c >= 0x1C4 && c <= 0x1F3) refuse_case(c);
    const char32_t out = after_letter ? lower_one(c) : upper_one(c);
    after_letter = to_upper(c) != c || to_lower(c) != c;
    return out;
  });
}

std::vector<std::string> split_space(const std::string& s, std::int64_t limit) {
  std::vector<std::string> parts;
  std::size_t i = 0;
  while (true) {
    std::size_t begin = i;
    while (begin < s.size()) {
      std::size_t after = begin;
      if (!is_python_space(next_code_point(s, after))) break;
      begin = after;
    }
    if (begin >= s.size()) return parts;
    if (limit >= 0 && static_cast<std::int64_t>(parts.size()) == limit) {
      parts.push_back(s.substr(begin));
      return parts;
    }
    std::size_t end = begin;
    while (end < s.size()) {
      std::size_t after = end;
      if (is_python_space(next_code_point(s, after))) break;
      end = after;
    }
    parts.push_back(s.substr(begin, end - begin));
    i = end;
  }
}

std::vector<std::string> split_at(const std::string& s, const std::string& separator,
                                  std::int64_t limit) {
  if (separator.empty()) template_invalid("an empty separator");
  std::vector<std::string> parts;
  std::size_t from = 0;
  for (std::size_t at = find_text(s, separator);
       at != std::string::npos && (limit < 0 || static_cast<std::int64_t>(parts.size()) < limit);
       at = find_text(s, separator, from)) {
    parts.push_back(s.substr(from, at - from));
    from = at + separator.size();
  }
  parts.push_back(s.substr(from));
  return parts;
}

/// str.splitlines() without the ends.
std::vector<std::string> split_lines(const std::string& s) {
  std::vector<std::string> lines;
  std::size_t from = 0;
  for (std::size_t i = 0; i < s.size();) {
    const std::size_t at = i;
    const char32_t c = next_code_point(s, i);
    const bool ends = (c >= 0xA && c <= 0xD) || (c >= 0x1C && c <= 0x1E) || c == 0x85 ||
                      c == 0x2028 || c == 0x2029;
    if (!ends) continue;
    if (c == '\r' && i < s.size() && s[i] == '\n') ++i;
    lines.push_back(s.substr(from, at - from));
    from = i;
  }
  if (from < s.size()) lines.push_back(s.substr(from));
  return lines;
}

Value text_list(Interpreter& interpreter, std::vector<std::string> parts) {
  std::vector<Value> items;
  items.reserve(parts.size());
  for (std::string& part : parts) items.push_back(interpreter.text(std::move(part)));
  return Value::list(std::move(items));
}

bool has_affix(const std::string& s, const Value& affix, bool at_start) {
  if (const ListValue* list = affix.list(); list != nullptr && list->is_tuple)
    return std::any_of(list->items.begin(), list->items.end(),
                       [&](const Value& one) { return has_affix(s, one, at_start); });
  const std::string& text = require_text(affix, at_start ? "a prefix" : "a suffix");
  return at_start ? s.starts_with(text) : s.ends_with(text);
}

Value find_position(const std::string& s, const Arguments& arguments, bool from_right) {
  arguments.check({"sub"});
  const std::string& needle = require_text(arguments.require(0, "sub"), "what is looked for");
  const std::size_t at = from_right ? s.rfind(needle) : find_text(s, needle);
  if (at == std::string::npos) return Value::integer(-1);
  return Value::integer(
      static_cast<std::int64_t>(character_offsets(std::string_view(s).substr(0, at)).size()) - 1);
}

Value count_text(const std::string& s, const Arguments& arguments) {
  arguments.check({"sub"});
  const std::string& needle = require_text(arguments.require(0, "sub"), "what is counted");
  if (needle.empty()) return Value::integer(static_cast<std::int64_t>(character_offsets(s).size()));
  std::int64_t count = 0;
  for (std::size_t at = find_text(s, needle); at != std::string::npos;
       at = find_text(s, needle, at + needle.size()))
    ++count;
  return Value::integer(count);
}

Value split_method(Interpreter& interpreter, const std::string& s, const Arguments& arguments) {
  arguments.check({"sep", "maxsplit"});
  const Value* separator = arguments.find(0, "sep");
  const Value* limit = arguments.find(1, "maxsplit");
  const std::int64_t most = limit != nullptr ? require_int(*limit, "maxsplit") : -1;
  if (separator == nullptr || separator->is_none())
    return text_list(interpreter, split_space(s, most));
  return text_list(interpreter, split_at(s, require_text(*separator, "a separator"), most));
}

Value join_method(Interpreter& interpreter, const std::string& s, const Arguments& arguments) {
  arguments.check({"iterable"});
  std::string out;
  bool first = true;
  for (const Value& item : iterate(arguments.require(0, "iterable"))) {
    if (!first) out += s;
    first = false;
    out += require_text(item, "an item to join");
  }
  return interpreter.text(std::move(out));
}

Value replace_method(Interpreter& interpreter, const std::string& s, const Arguments& arguments) {
  arguments.check({"old", "new", "count"});
  const Value* count = arguments.find(2, "count");
  const std::string& from = require_text(arguments.require(0, "old"), "the text to replace");
  const std::string& to = require_text(arguments.require(1, "new"), "the replacement");
  return interpreter.text(
      python_replace(s, from, to, count != nullptr ? require_int(*count, "a count") : -1));
}

Value string_method(Interpreter& interpreter, const std::string& s, const std::string& name,
                    const Arguments& arguments) {
  if (name == "strip" || name == "lstrip" || name == "rstrip") {
    arguments.check({"chars"});
    return interpreter.text(
        python_strip(s, arguments.find(0, "chars"), name != "rstrip", name != "lstrip"));
  }
  if (name == "split") return split_method(interpreter, s, arguments);
  if (name == "replace") return replace_method(interpreter, s, arguments);
  if (name == "join") return join_method(interpreter, s, arguments);
  if (name == "find" || name == "rfind") return find_position(s, arguments, name == "rfind");
  if (name == "count") return count_text(s, arguments);
  if (name == "startswith" || name == "endswith") {
    arguments.check({"affix"});
    return Value::boolean(has_affix(s, arguments.require(0, "affix"), name == "startswith"));
  }
  if (name == "removeprefix" || name == "removesuffix") {
    arguments.check({"affix"});
    const std::string& affix = require_text(arguments.require(0, "affix"), "an affix");
    if (name == "removeprefix")
      return interpreter.text(s.starts_with(affix) ? s.substr(affix.size()) : s);
    return interpreter.text(s.ends_with(affix) ? s.substr(0, s.size() - affix.size()) : s);
  }
  constexpr std::array<std::string_view, 5> kWithoutArguments{"upper", "lower", "title",
                                                              "capitalize", "splitlines"};
  if (!is_among(kWithoutArguments, name))
    template_refused(str("the method ", name, " of a text is not supported"));
  arguments.check({});
  if (name == "upper") return interpreter.text(python_upper(s));
  if (name == "lower") return interpreter.text(python_lower(s));
  if (name == "title") return interpreter.text(python_title(s));
  if (name == "capitalize") return interpreter.text(python_capitalize(s));
  return text_list(interpreter, split_lines(s));
}

Value dict_method(Interpreter& interpreter, const DictValue& dict, const std::string& name,
                  const Arguments& arguments) {
  if (name == "get") {
    arguments.check({"key", "default"});
    const Value& key = arguments.require(0, "key");
    interpreter.charge(dict.items.size());
    const Value* found = key.string() != nullptr ? find_key(dict, *key.string()) : nullptr;
    if (found != nullptr) return *found;
    const Value* otherwise = arguments.find(1, "default");
    return otherwise != nullptr ? *otherwise : Value::none();
  }
  arguments.check({});
  std::vector<Value> items;
  for (const auto& [key, value] : dict.items) {
    interpreter.charge(sizeof(Value));
    if (name == "keys")
      items.push_back(Value::text(key));
    else if (name == "values")
      items.push_back(value);
    else if (name == "items")
      items.push_back(Value::list({Value::text(key), value}, true));
    else
      template_refused(str("the method ", name, " of a dict is not supported"));
  }
  return Value::list(std::move(items));
}

Value list_method(const ListValue& list, const std::string& name, const Arguments& arguments) {
  if (name != "count" && name != "index")
    template_refused(str("the method ", name, " of a list is not supported"));
  arguments.check({"value"});
  const Value& wanted = arguments.require(0, "value");
  std::int64_t count = 0;
  for (std::size_t i = 0; i < list.items.size(); ++i) {
    if (!equals(list.items[i], wanted)) continue;
    if (name == "index") return Value::integer(static_cast<std::int64_t>(i));
    ++count;
  }
  if (name == "index") template_invalid("index(): the list has no such value");
  return Value::integer(count);
}

}  // namespace

std::string python_upper(const std::string& s) {
  return map_characters(s, upper_one);
}
std::string python_lower(const std::string& s) {
  return map_characters(s, lower_one);
}

std::string python_capitalize(const std::string& s) {
  bool first = true;
  return map_characters(s, [&](char32_t c) {
    if (!std::exchange(first, false)) return lower_one(c);
    if (c >= 0x1C4 && c <= 0x1F3) refuse_case(c);
    return upper_one(c);
  });
}

std::string python_strip(const std::string& s, const Value* characters, bool left, bool right) {
  std::vector<char32_t> set;
  const bool spaces = characters == nullptr || characters->is_none();
  if (!spaces) {
    const std::string& listed = require_text(*characters, "the characters to strip");
    for (std::size_t i = 0; i < listed.size();) set.push_back(next_code_point(listed, i));
  }
  const auto strips = [&](char32_t c) {
    return spaces ? is_python_space(c) : std::find(set.begin(), set.end(), c) != set.end();
  };
  std::size_t begin = 0, end = s.size();
  while (left && begin < end) {
    std::size_t after = begin;
    if (!strips(next_code_point(s, after))) break;
    begin = after;
  }
  while (right && end > begin) {
    std::size_t last = end - 1;
    while (last > begin && (static_cast<unsigned char>(s[last]) & 0xC0) == 0x80) --last;
    std::size_t i = last;
    if (!strips(next_code_point(s, i))) break;
    end = last;
  }
  return s.substr(begin, end - begin);
}

std::string python_replace(const std::string& s, const std::string& from, const std::string& to,
                           std::int64_t count) {
  if (from.empty()) template_refused("replacing an empty text is not supported");
  std::string out;
  std::size_t begin = 0;
  for (std::size_t at = find_text(s, from); at != std::string::npos && count != 0;
       at = find_text(s, from, begin)) {
    out.append(s, begin, at - begin);
    out += to;
    if (out.size() > kTemplateOutputBytesMax)
      template_refused(str("a text is longer than ", kTemplateOutputBytesMax, " bytes"));
    begin = at + from.size();
    --count;
  }
  return out.append(s, begin);
}

bool has_method(const Value& object, std::string_view name) {
  if (object.string() != nullptr) return is_among(kStringMethods, name);
  if (object.dict() != nullptr) return is_among(kDictMethods, name);
  if (object.list() != nullptr) return is_among(kListMethods, name);
  return false;
}

Value call_method(Interpreter& interpreter, const Value& object, const std::string& name,
                  const Arguments& arguments) {
  if (const DictValue* dict = object.dict())
    return dict_method(interpreter, *dict, name, arguments);
  interpreter.charge(object);
  for (const Value& argument : arguments.positional) interpreter.charge(argument);
  if (const std::string* s = object.string())
    return string_method(interpreter, *s, name, arguments);
  return list_method(*object.list(), name, arguments);
}

}  // namespace tandem::worker::text
