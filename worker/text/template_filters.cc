// Filters of chat templates: `value | filter`. Jinja2's own, and transformers' tojson.
#include "worker/text/chat_template.h"
#include "worker/text/template_interpreter.h"
#include "worker/text/unicode.h"
#include "worker/text/utf8.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>

namespace tandem::worker::text {
namespace {

struct FilterCall {
  Interpreter& interpreter;
  const Value& input;
  const Arguments& arguments;
  /// An argument, or a default.
  [[nodiscard]] bool flag(std::size_t index, const char* name, bool otherwise) const {
    const Value* value = arguments.find(index, name);
    return value != nullptr ? is_true(*value) : otherwise;
  }
};

std::int64_t length_of(const Value& value) {
  if (const ListValue* list = value.list()) return static_cast<std::int64_t>(list->items.size());
  if (const DictValue* dict = value.dict()) return static_cast<std::int64_t>(dict->items.size());
  if (const std::string* s = value.string())
    return static_cast<std::int64_t>(character_offsets(*s).size()) - 1;
  if (value.is_undefined()) return 0;
  template_invalid(str("a ", type_name(value), " has no length"));
}

/// item.a.b, as the attribute argument of filters names it.
Value attribute_of(Interpreter& interpreter, const Value& item, const Value& path) {
  if (path.string() == nullptr) return get_item(interpreter, item, path);
  Value value = item;
  std::string_view rest = *path.string();
  while (true) {
    const std::size_t dot = rest.find('.');
    const std::string part(rest.substr(0, dot));
    const bool is_index =
        !part.empty() && part.find_first_not_of("0123456789") == std::string::npos;
    std::int64_t index = 0;
    if (is_index) std::from_chars(part.data(), part.data() + part.size(), index);
    if (value.is_undefined()) return value;
    value = get_item(interpreter, value, is_index ? Value::integer(index) : Value::text(part));
    if (dot == std::string_view::npos) return value;
    rest = rest.substr(dot + 1);
  }
}

Value filter_length(const FilterCall& call) {
  call.arguments.check({});
  return Value::integer(length_of(call.input));
}

Value filter_default(const FilterCall& call) {
  call.arguments.check({"default_value", "boolean"});
  const bool replaces =
      call.input.is_undefined() || (call.flag(1, "boolean", false) && !is_true(call.input));
  if (!replaces) return call.input;
  const Value* value = call.arguments.find(0, "default_value");
  return value != nullptr ? *value : Value::text("");
}

Value filter_trim(const FilterCall& call) {
  call.arguments.check({"chars"});
  return call.interpreter.text(
      python_strip(to_text(call.input), call.arguments.find(0, "chars"), true, true));
}

Value filter_upper(const FilterCall& call) {
  call.arguments.check({});
  return call.interpreter.text(python_upper(to_text(call.input)));
}
Value filter_lower(const FilterCall& call) {
  call.arguments.check({});
  return call.interpreter.text(python_lower(to_text(call.input)));
}
Value filter_capitalize(const FilterCall& call) {
  call.arguments.check({});
  return call.interpreter.text(python_capitalize(to_text(call.input)));
}

/// Jinja2's title: words begin after white space, dashes and opening brackets.
Value filter_title(const FilterCall& call) {
  call.arguments.check({});
  const std::string s = to_text(call.input);
  std::string out, word;
  const auto flush = [&] {
    if (!word.empty()) out += python_capitalize(word);
    word.clear();
  };
  for (std::size_t i = 0; i < s.size();) {
    const std::size_t begin = i;
    const char32_t c = next_code_point(s, i);
    const bool separates =
        is_python_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
    if (separates) flush();
    (separates ? out : word).append(s, begin, i - begin);
  }
  flush();
  return call.interpreter.text(std::move(out));
}

Value filter_replace(const FilterCall& call) {
  call.arguments.check({"old", "new", "count"});
  const Value* count = call.arguments.find(2, "count");
  const bool limited = count != nullptr && !count->is_none();
  return call.interpreter.text(python_replace(
      to_text(call.input), to_text(call.arguments.require(0, "old")),
      to_text(call.arguments.require(1, "new")), limited ? require_int(*count, "a count") : -1));
}

Value filter_join(const FilterCall& call) {
  call.arguments.check({"d", "attribute"});
  const Value* separator = call.arguments.find(0, "d");
  const Value* attribute = call.arguments.find(1, "attribute");
  const std::string between = separator != nullptr ? to_text(*separator) : "";
  std::string out;
  bool first = true;
  for (const Value& item : iterate(call.input)) {
    if (!first) out += between;
    first = false;
    const Value shown =
        attribute != nullptr ? attribute_of(call.interpreter, item, *attribute) : item;
    call.interpreter.charge(shown);
    out += to_text(shown);
  }
  return call.interpreter.text(std::move(out));
}

Value filter_first(const FilterCall& call) {
  call.arguments.check({});
  const std::vector<Value> items = iterate(call.input);
  return items.empty() ? Value::undefined("the first item of nothing") : items.front();
}
Value filter_last(const FilterCall& call) {
  call.arguments.check({});
  const std::vector<Value> items = iterate(call.input);
  return items.empty() ? Value::undefined("the last item of nothing") : items.back();
}

Value filter_items(const FilterCall& call) {
  call.arguments.check({});
  if (call.input.is_undefined()) return Value::list({});
  if (call.input.dict() == nullptr) template_invalid("items wants a dict");
  return call_method(call.interpreter, call.input, "items", call.arguments);
}

Value filter_list(const FilterCall& call) {
  call.arguments.check({});
  return Value::list(iterate(call.input));
}

Value filter_reverse(const FilterCall& call) {
  call.arguments.check({});
  std::vector<Value> items = iterate(call.input);
  std::reverse(items.begin(), items.end());
  if (call.input.string() == nullptr) return Value::list(std::move(items));
  std::string out;
  for (const Value& item : items) out += *item.string();
  return call.interpreter.text(std::move(out));
}

Value filter_int(const FilterCall& call) {
  call.arguments.check({"default", "base"});
  const Value* base = call.arguments.find(1, "base");
  if (base != nullptr && require_int(*base, "a base") != 10)
    template_refused("int with a base other than 10 is not supported");
  const Value* otherwise = call.arguments.find(0, "default");
  const Value missing = otherwise != nullptr ? *otherwise : Value::integer(0);
  std::int64_t i = 0;
  if (call.input.as_int(i)) return Value::integer(i);
  double d = 0;
  const std::string* s = call.input.string();
  if (s != nullptr) {
    const std::string trimmed = python_strip(*s, nullptr, true, true);
    const char *begin = trimmed.data(), *end = begin + trimmed.size();
    if (begin != end && *begin == '+') ++begin;
    const auto [stop, error] = std::from_chars(begin, end, i);
    if (error == std::errc() && stop == end && begin != end) return Value::integer(i);
    const auto [float_stop, float_error] = std::from_chars(begin, end, d);
    if (float_error != std::errc() || float_stop != end || begin == end) return missing;
  } else if (!call.input.as_number(d)) {
    return missing;
  }
  if (!(std::fabs(d) < 0x1p63)) template_refused("a number over 64 bits is not supported");
  return Value::integer(static_cast<std::int64_t>(d));
}

Value filter_float(const FilterCall& call) {
  call.arguments.check({"default"});
  const Value* otherwise = call.arguments.find(0, "default");
  double d = 0;
  if (call.input.as_number(d)) return Value(d);
  if (const std::string* s = call.input.string()) {
    const std::string trimmed = python_strip(*s, nullptr, true, true);
    const auto [stop, error] = std::from_chars(trimmed.data(), trimmed.data() + trimmed.size(), d);
    if (error == std::errc() && stop == trimmed.data() + trimmed.size()) return Value(d);
  }
  return otherwise != nullptr ? *otherwise : Value(0.0);
}

Value filter_string(const FilterCall& call) {
  call.arguments.check({});
  return call.interpreter.text(to_text(call.input));
}
Value filter_safe(const FilterCall& call) {
  return filter_string(call);
}

Value filter_abs(const FilterCall& call) {
  call.arguments.check({});
  std::int64_t i = 0;
  if (call.input.as_int(i)) {
    if (i == INT64_MIN) template_refused("a number over 64 bits is not supported");
    return Value::integer(std::abs(i));
  }
  double d = 0;
  if (!call.input.as_number(d)) template_invalid(str("abs of a ", type_name(call.input)));
  return Value(std::fabs(d));
}

Value filter_tojson(const FilterCall& call) {
  call.arguments.check({"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  style.ensure_ascii = call.flag(0, "ensure_ascii", false);
  style.sort_keys = call.flag(3, "sort_keys", false);
  const Value* indent = call.arguments.find(1, "indent");
  if (indent != nullptr && !indent->is_none()) {
    constexpr std::int64_t kIndentMax = 64;
    const std::int64_t width = require_int(*indent, "the indent of tojson");
    if (width < 0 || width > kIndentMax)
      template_refused(str("an indent of tojson outside 0 to ", kIndentMax));
    style.indent = static_cast<int>(width);
    style.item_separator = ",";
  }
  const Value* separators = call.arguments.find(2, "separators");
  if (separators != nullptr && !separators->is_none()) {
    const std::vector<Value> pair = iterate(*separators);
    if (pair.size() != 2) template_invalid("separators of tojson are two texts");
    style.item_separator = require_text(pair[0], "a separator of tojson");
    style.key_separator = require_text(pair[1], "a separator of tojson");
  }
  return call.interpreter.text(to_json_text(call.input, style));
}

Value filter_indent(const FilterCall& call) {
  constexpr std::int64_t kIndentMax = 1000;
  call.arguments.check({"width", "first", "blank"});
  const Value* width = call.arguments.find(0, "width");
  std::string by(4, ' ');
  if (width != nullptr && width->string() != nullptr) {
    by = *width->string();
  } else if (width != nullptr) {
    const std::int64_t count = require_int(*width, "the width of indent");
    if (count > kIndentMax) template_refused(str("an indent over ", kIndentMax));
    by = std::string(static_cast<std::size_t>(std::max<std::int64_t>(count, 0)), ' ');
  }
  const bool blank = call.flag(2, "blank", false);
  const Value lines =
      call_method(call.interpreter, Value::text(to_text(call.input) + "\n"), "splitlines", {});
  std::string out = call.flag(1, "first", false) ? by : "";
  for (std::size_t i = 0; i < lines.list()->items.size(); ++i) {
    const std::string& line = *lines.list()->items[i].string();
    call.interpreter.charge(line.size() + by.size());
    if (i > 0) out += "\n" + (line.empty() && !blank ? "" : by);
    out += line;
  }
  return call.interpreter.text(std::move(out));
}

/// What sort, unique, min and max compare: texts without case unless told otherwise.
Value sort_key(const FilterCall& call, const Value& item, const Value* attribute,
               bool case_sensitive) {
  Value key = attribute != nullptr && !attribute->is_none()
                  ? attribute_of(call.interpreter, item, *attribute)
                  : item;
  if (!case_sensitive && key.string() != nullptr) return Value::text(python_lower(*key.string()));
  return key;
}

Value sorted(const FilterCall& call, const std::vector<Value>& items,
             const std::vector<Value>& keys, bool reverse) {
  std::vector<std::size_t> order(items.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    call.interpreter.charge(keys[a]);
    return reverse ? compare(keys[b], keys[a]) < 0 : compare(keys[a], keys[b]) < 0;
  });
  std::vector<Value> out;
  for (const std::size_t i : order) out.push_back(items[i]);
  return Value::list(std::move(out));
}

Value filter_sort(const FilterCall& call) {
  call.arguments.check({"reverse", "case_sensitive", "attribute"});
  const Value* attribute = call.arguments.find(2, "attribute");
  if (attribute != nullptr && attribute->string() != nullptr &&
      attribute->string()->find(',') != std::string::npos)
    template_refused("sorting by several attributes is not supported");
  const std::vector<Value> items = iterate(call.input);
  std::vector<Value> keys;
  for (const Value& item : items)
    keys.push_back(sort_key(call, item, attribute, call.flag(1, "case_sensitive", false)));
  return sorted(call, items, keys, call.flag(0, "reverse", false));
}

Value filter_dictsort(const FilterCall& call) {
  call.arguments.check({"case_sensitive", "by", "reverse"});
  if (call.input.dict() == nullptr) template_invalid("dictsort wants a dict");
  const Value* by = call.arguments.find(1, "by");
  const std::string what = by != nullptr ? to_text(*by) : "key";
  if (what != "key" && what != "value") template_invalid("dictsort sorts by \"key\" or \"value\"");
  const Value pairs = call_method(call.interpreter, call.input, "items", {});
  const Value attribute = Value::integer(what == "key" ? 0 : 1);
  std::vector<Value> keys;
  for (const Value& pair : pairs.list()->items)
    keys.push_back(sort_key(call, pair, &attribute, call.flag(0, "case_sensitive", false)));
  return sorted(call, pairs.list()->items, keys, call.flag(2, "reverse", false));
}

Value filter_unique(const FilterCall& call) {
  call.arguments.check({"case_sensitive", "attribute"});
  const Value* attribute = call.arguments.find(1, "attribute");
  std::vector<Value> kept, keys;
  for (const Value& item : iterate(call.input)) {
    Value key = sort_key(call, item, attribute, call.flag(0, "case_sensitive", false));
    bool seen = false;
    for (const Value& known : keys) {
      call.interpreter.charge(0);
      seen = seen || equals(known, key);
    }
    if (seen) continue;
    kept.push_back(item);
    keys.push_back(std::move(key));
  }
  return Value::list(std::move(kept));
}

Value extreme(const FilterCall& call, int sign) {
  call.arguments.check({"case_sensitive", "attribute"});
  const Value* attribute = call.arguments.find(1, "attribute");
  const bool case_sensitive = call.flag(0, "case_sensitive", false);
  Value best = Value::undefined("an item of nothing"), best_key;
  for (const Value& item : iterate(call.input)) {
    Value key = sort_key(call, item, attribute, case_sensitive);
    if (!best.is_undefined() && compare(key, best_key) * sign <= 0) continue;
    best = item;
    best_key = std::move(key);
  }
  return best;
}
Value filter_max(const FilterCall& call) {
  return extreme(call, 1);
}
Value filter_min(const FilterCall& call) {
  return extreme(call, -1);
}

Value filter_sum(const FilterCall& call) {
  call.arguments.check({"attribute", "start"});
  const Value* attribute = call.arguments.find(0, "attribute");
  const Value* start = call.arguments.find(1, "start");
  Value total = start != nullptr ? *start : Value::integer(0);
  for (const Value& item : iterate(call.input))
    total = apply_binary(call.interpreter, "+", total,
                         attribute != nullptr && !attribute->is_none()
                             ? attribute_of(call.interpreter, item, *attribute)
                             : item);
  return total;
}

Value filter_map(const FilterCall& call) {
  std::vector<Value> out;
  const bool by_attribute =
      call.arguments.positional.empty() && call.arguments.find(1, "attribute") != nullptr;
  if (by_attribute) {
    for (const auto& [name, value] : call.arguments.named)
      if (name != "attribute" && name != "default")
        template_invalid(str("map has no argument \"", name, "\""));
    const Value& attribute = call.arguments.require(1, "attribute");
    const Value* otherwise = call.arguments.find(1, "default");
    for (const Value& item : iterate(call.input)) {
      Value value = attribute_of(call.interpreter, item, attribute);
      out.push_back(value.is_undefined() && otherwise != nullptr ? *otherwise : std::move(value));
    }
    return Value::list(std::move(out));
  }
  if (call.arguments.positional.empty()) template_invalid("map wants a filter or attribute=");
  const std::string& name = require_text(call.arguments.positional[0], "the filter of map");
  if (name == "map") template_refused("map of map is not supported");
  Arguments rest = call.arguments;
  rest.positional.erase(rest.positional.begin());
  rest.callee = name;
  for (const Value& item : iterate(call.input))
    out.push_back(apply_filter(call.interpreter, name, item, rest));
  return Value::list(std::move(out));
}

/// select, reject, selectattr and rejectattr.
Value select_items(const FilterCall& call, bool keep, bool by_attribute) {
  Arguments rest = call.arguments;
  Value attribute;
  const auto take = [&](const char* what) {
    if (rest.positional.empty()) template_invalid(str(call.arguments.callee, " wants ", what));
    Value first = rest.positional.front();
    rest.positional.erase(rest.positional.begin());
    return first;
  };
  if (by_attribute) attribute = take("an attribute");
  std::string test;
  if (!rest.positional.empty()) test = require_text(take("a test"), "a test");
  rest.callee = test;
  std::vector<Value> out;
  for (const Value& item : iterate(call.input)) {
    call.interpreter.charge(0);
    const Value value = by_attribute ? attribute_of(call.interpreter, item, attribute) : item;
    if ((test.empty() ? is_true(value) : apply_test(test, value, rest)) == keep)
      out.push_back(item);
  }
  return Value::list(std::move(out));
}
Value filter_select(const FilterCall& call) {
  return select_items(call, true, false);
}
Value filter_reject(const FilterCall& call) {
  return select_items(call, false, false);
}
Value filter_selectattr(const FilterCall& call) {
  return select_items(call, true, true);
}
Value filter_rejectattr(const FilterCall& call) {
  return select_items(call, false, true);
}

struct Filter {
  std::string_view name;
  Value (*apply)(const FilterCall&);
};
constexpr std::array<Filter, 34> kFilters{{
    {"abs", filter_abs},
    {"capitalize", filter_capitalize},
    {"count", filter_length},
    {"d", filter_default},
    {"default", filter_default},
    {"dictsort", filter_dictsort},
    {"first", filter_first},
    {"float", filter_float},
    {"indent", filter_indent},
    {"int", filter_int},
    {"items", filter_items},
    {"join", filter_join},
    {"last", filter_last},
    {"length", filter_length},
    {"list", filter_list},
    {"lower", filter_lower},
    {"map", filter_map},
    {"max", filter_max},
    {"min", filter_min},
    {"reject", filter_reject},
    {"rejectattr", filter_rejectattr},
    {"replace", filter_replace},
    {"reverse", filter_reverse},
    {"safe", filter_safe},
    {"select", filter_select},
    {"selectattr", filter_selectattr},
    {"sort", filter_sort},
    {"string", filter_string},
    {"sum", filter_sum},
    {"title", filter_title},
    {"tojson", filter_tojson},
    {"trim", filter_trim},
    {"unique", filter_unique},
    {"upper", filter_upper},
}};

}  // namespace

Value apply_filter(Interpreter& interpreter, const std::string& name, const Value& input,
                   const Arguments& arguments) {
  for (const Filter& filter : kFilters) {
    if (filter.name != name) continue;
    interpreter.charge(input);
    return filter.apply({interpreter, input, arguments});
  }
  std::vector<std::string_view> names;
  for (const Filter& filter : kFilters) names.push_back(filter.name);
  const std::string nearest = nearest_name(std::string_view(name).substr(0, 40), names);
  template_refused(str("the filter \"", name.substr(0, 40), "\" is not supported",
                       nearest.empty() ? "" : "; did you mean ", nearest));
}

}  // namespace tandem::worker::text
