#include "worker/text/template_value.h"

#include "worker/text/unicode.h"
#include "worker/text/utf8.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>

namespace tandem::worker::text {

void template_invalid(std::string message) {
  throw TemplateError{StatusCode::kInvalid, std::move(message)};
}
void template_refused(std::string message) {
  throw TemplateError{StatusCode::kRefused, std::move(message)};
}

namespace {

int depth_of(const Value& value) {
  if (const ListValue* list = value.list()) return list->depth;
  if (const DictValue* dict = value.dict()) return dict->depth;
  return 0;
}

/// Takes a member into its container's depth and weight.
void check_member(const Value& value, int& depth, std::int64_t& weight) {
  if (!value.is_storable())
    template_refused(str("a list or dict that holds a ", type_name(value), " is not supported"));
  depth = std::max(depth, depth_of(value) + 1);
  if (depth > kTemplateValueDepthMax)
    template_refused(str("lists and dicts are nested more than ", kTemplateValueDepthMax, " deep"));
  weight += weight_of(value);
  if (weight > kTemplateValueWeightMax)
    template_refused(str("a list or dict has more than ", kTemplateValueWeightMax, " parts"));
}

template <class... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <class... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

}  // namespace

Value Value::text(std::string s) {
  return Value(std::make_shared<const std::string>(std::move(s)));
}

Value Value::list(std::vector<Value> items, bool is_tuple) {
  auto list = std::make_shared<ListValue>();
  for (const Value& item : items) check_member(item, list->depth, list->weight);
  list->items = std::move(items);
  list->is_tuple = is_tuple;
  return Value(ListPtr(std::move(list)));
}

Value Value::dict(std::vector<std::pair<std::string, Value>> items) {
  auto dict = std::make_shared<DictValue>();
  for (auto& [key, value] : items) {
    check_member(value, dict->depth, dict->weight);
    const auto same = [&k = key](const auto& item) { return item.first == k; };
    const auto found = std::find_if(dict->items.begin(), dict->items.end(), same);
    if (found != dict->items.end())
      found->second = std::move(value);
    else
      dict->items.emplace_back(std::move(key), std::move(value));
  }
  return Value(DictPtr(std::move(dict)));
}

Value Value::from_json(const nlohmann::ordered_json& json, int depth) {
  using Type = nlohmann::ordered_json::value_t;
  if (depth > kTemplateValueDepthMax)
    template_refused(str("messages are nested more than ", kTemplateValueDepthMax, " deep"));
  switch (json.type()) {
    case Type::null:
      return none();
    case Type::boolean:
      return boolean(json.get<bool>());
    case Type::number_integer:
      return integer(json.get<std::int64_t>());
    case Type::number_unsigned:
      if (json.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX))
        template_refused(str("the number ", json.dump(), " is over 64 bits with sign"));
      return integer(json.get<std::int64_t>());
    case Type::number_float:
      return Value(json.get<double>());
    case Type::string: {
      const auto& s = json.get_ref<const std::string&>();
      if (const std::size_t bad = find_invalid_utf8(s); bad != std::string::npos)
        template_invalid(str("a text is not valid UTF-8 at byte ", bad));
      return text(s);
    }
    case Type::array: {
      std::vector<Value> items;
      for (const auto& item : json) items.push_back(from_json(item, depth + 1));
      return list(std::move(items));
    }
    case Type::object: {
      // Keys of a JSON object are unique already: no search for repeated ones.
      auto dict = std::make_shared<DictValue>();
      for (const auto& [key, value] : json.items()) {
        dict->items.emplace_back(key, from_json(value, depth + 1));
        check_member(dict->items.back().second, dict->depth, dict->weight);
      }
      return Value(DictPtr(std::move(dict)));
    }
    default:
      template_refused("binary JSON is not supported");
  }
}

const std::string* Value::string() const {
  const auto* pointer = get<StringPtr>();
  return pointer != nullptr ? pointer->get() : nullptr;
}
const ListValue* Value::list() const {
  const auto* pointer = get<ListPtr>();
  return pointer != nullptr ? pointer->get() : nullptr;
}
const DictValue* Value::dict() const {
  const auto* pointer = get<DictPtr>();
  return pointer != nullptr ? pointer->get() : nullptr;
}

bool Value::as_int(std::int64_t& out) const {
  if (const auto* i = get<std::int64_t>()) {
    out = *i;
    return true;
  }
  if (const auto* b = get<bool>()) {
    out = *b ? 1 : 0;
    return true;
  }
  return false;
}

bool Value::as_number(double& out) const {
  std::int64_t i = 0;
  if (as_int(i)) {
    out = static_cast<double>(i);
    return true;
  }
  if (const auto* d = get<double>()) {
    out = *d;
    return true;
  }
  return false;
}

bool Value::is_storable() const {
  return get<NamespacePtr>() == nullptr && get<LoopPtr>() == nullptr &&
         get<MacroValue>() == nullptr && get<FunctionValue>() == nullptr;
}

std::int64_t weight_of(const Value& value) {
  constexpr std::size_t kBytesPerPart = 16;
  if (const std::string* s = value.string())
    return 1 + static_cast<std::int64_t>(s->size() / kBytesPerPart);
  if (const ListValue* list = value.list()) return list->weight;
  if (const DictValue* dict = value.dict()) return dict->weight;
  return 1;
}

std::string type_name(const Value& value) {
  static constexpr std::array<const char*, 12> kNames{"undefined", "None", "bool",  "int",
                                                      "float",     "str",  "list",  "dict",
                                                      "namespace", "loop", "macro", "function"};
  return kNames[value.data().index()];
}

bool is_true(const Value& value) {
  return std::visit(
      Overloaded{[](const Undefined&) { return false; }, [](const None&) { return false; },
                 [](bool b) { return b; }, [](std::int64_t i) { return i != 0; },
                 [](double d) { return d != 0; }, [](const StringPtr& s) { return !s->empty(); },
                 [](const ListPtr& l) { return !l->items.empty(); },
                 [](const DictPtr& d) { return !d->items.empty(); },
                 [](const auto&) { return true; }},
      value.data());
}

bool equals(const Value& a, const Value& b) {
  std::int64_t ia = 0, ib = 0;
  if (a.as_int(ia) && b.as_int(ib)) return ia == ib;
  double da = 0, db = 0;
  if (a.as_number(da) && b.as_number(db)) return da == db;
  if (a.data().index() != b.data().index()) return false;
  if (a.string() != nullptr) return *a.string() == *b.string();
  if (const ListValue* la = a.list()) {
    const ListValue* lb = b.list();
    return la->is_tuple == lb->is_tuple && std::equal(la->items.begin(), la->items.end(),
                                                      lb->items.begin(), lb->items.end(), equals);
  }
  if (const DictValue* x = a.dict()) {
    const DictValue* y = b.dict();
    if (x->items.size() != y->items.size()) return false;
    return std::all_of(x->items.begin(), x->items.end(), [&](const auto& item) {
      const Value* other = find_key(*y, item.first);
      return other != nullptr && equals(item.second, *other);
    });
  }
  if (const auto* n = a.get<NamespacePtr>()) return *n == *b.get<NamespacePtr>();
  return a.is_undefined() || a.is_none();
}

int compare(const Value& a, const Value& b) {
  std::int64_t ia = 0, ib = 0;
  if (a.as_int(ia) && b.as_int(ib)) return ia < ib ? -1 : ia > ib;
  double da = 0, db = 0;
  if (a.as_number(da) && b.as_number(db)) return da < db ? -1 : da > db;
  if (a.string() != nullptr && b.string() != nullptr) return a.string()->compare(*b.string());
  const ListValue *la = a.list(), *lb = b.list();
  if (la != nullptr && lb != nullptr && la->is_tuple == lb->is_tuple) {
    for (std::size_t i = 0; i < la->items.size() && i < lb->items.size(); ++i)
      if (!equals(la->items[i], lb->items[i])) return compare(la->items[i], lb->items[i]);
    return la->items.size() < lb->items.size() ? -1 : la->items.size() > lb->items.size();
  }
  template_invalid(str("cannot order ", type_name(a), " and ", type_name(b)));
}

std::string float_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  std::array<char, 64> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                 std::chars_format::scientific)
                       .ptr;
  const std::string shortest(buffer.data(), end);
  const int exponent = std::atoi(shortest.c_str() + shortest.find('e') + 1);
  // Python writes an exponent below 1e-4 and from 1e16 on; its exponents have two digits too.
  if (exponent < -4 || exponent >= 16) return shortest;
  const auto fixed =
      std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, std::chars_format::fixed)
          .ptr;
  std::string out(buffer.data(), fixed);
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

namespace {

void append_hex(std::string& out, const char* prefix, unsigned value, int digits) {
  static constexpr std::string_view kDigits = "0123456789abcdef";
  out += prefix;
  for (int shift = 4 * (digits - 1); shift >= 0; shift -= 4) out += kDigits[(value >> shift) & 15];
}

std::string string_repr(const std::string& s) {
  const bool has_single = s.find('\'') != std::string::npos;
  const char quote = has_single && s.find('"') == std::string::npos ? '"' : '\'';
  std::string out(1, quote);
  for (std::size_t i = 0; i < s.size();) {
    const std::size_t begin = i;
    const char32_t c = next_code_point(s, i);
    if (c == static_cast<char32_t>(quote) || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (is_printable(c)) {
      out.append(s, begin, i - begin);
    } else if (c < 0x100) {
      append_hex(out, "\\x", static_cast<unsigned>(c), 2);
    } else if (c < 0x10000) {
      append_hex(out, "\\u", static_cast<unsigned>(c), 4);
    } else {
      append_hex(out, "\\U", static_cast<unsigned>(c), 8);
    }
  }
  return out + quote;
}

std::string list_repr(const ListValue& list) {
  std::string out(1, list.is_tuple ? '(' : '[');
  for (std::size_t i = 0; i < list.items.size(); ++i)
    out += (i == 0 ? "" : ", ") + to_repr(list.items[i]);
  if (list.is_tuple && list.items.size() == 1) out += ",";
  return out + (list.is_tuple ? ')' : ']');
}

std::string dict_repr(const DictValue& dict) {
  std::string out = "{";
  for (const auto& [key, value] : dict.items)
    out += (out.size() == 1 ? "" : ", ") + string_repr(key) + ": " + to_repr(value);
  return out + "}";
}

void append_json_string(std::string& out, const std::string& s, bool ensure_ascii) {
  out += '"';
  for (std::size_t i = 0; i < s.size();) {
    const std::size_t begin = i;
    const char32_t c = next_code_point(s, i);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c == '\b') {
      out += "\\b";
    } else if (c == '\f') {
      out += "\\f";
    } else if (c < 0x20 || (ensure_ascii && c > 0x7E && c < 0x10000)) {
      append_hex(out, "\\u", static_cast<unsigned>(c), 4);
    } else if (ensure_ascii && c >= 0x10000) {
      append_hex(out, "\\u", 0xD800 + ((static_cast<unsigned>(c) - 0x10000) >> 10), 4);
      append_hex(out, "\\u", 0xDC00 + ((static_cast<unsigned>(c) - 0x10000) & 0x3FF), 4);
    } else {
      out.append(s, begin, i - begin);
    }
  }
  out += '"';
}

void append_json(std::string& out, const Value& value, const JsonStyle& style, int level);

/// The items of a list or dict between brackets, on lines of their own where indented.
template <class Items, class Append>
void append_json_items(std::string& out, char open, char close, const Items& items,
                       const JsonStyle& style, int level, const Append& append) {
  out += open;
  bool first = true;
  const auto line = [&](int indented) {
    if (style.indent >= 0)
      out += "\n" + std::string(static_cast<std::size_t>(style.indent * indented), ' ');
  };
  for (const auto& item : items) {
    if (!first) out += style.item_separator;
    first = false;
    line(level + 1);
    append(item);
  }
  if (!first) line(level);
  out += close;
}

void append_json(std::string& out, const Value& value, const JsonStyle& style, int level) {
  if (const ListValue* list = value.list()) {
    append_json_items(out, '[', ']', list->items, style, level,
                      [&](const Value& item) { append_json(out, item, style, level + 1); });
  } else if (const DictValue* dict = value.dict()) {
    auto items = dict->items;
    if (style.sort_keys)
      std::stable_sort(items.begin(), items.end(),
                       [](const auto& a, const auto& b) { return a.first < b.first; });
    append_json_items(out, '{', '}', items, style, level, [&](const auto& item) {
      append_json_string(out, item.first, style.ensure_ascii);
      out += style.key_separator;
      append_json(out, item.second, style, level + 1);
    });
  } else if (value.string() != nullptr) {
    append_json_string(out, *value.string(), style.ensure_ascii);
  } else if (value.is_none()) {
    out += "null";
  } else if (const auto* b = value.get<bool>()) {
    out += *b ? "true" : "false";
  } else if (const auto* d = value.get<double>()) {
    out += std::isnan(*d)   ? "NaN"
           : std::isinf(*d) ? (*d < 0 ? "-Infinity" : "Infinity")
                            : float_repr(*d);
  } else if (const auto* i = value.get<std::int64_t>()) {
    out += std::to_string(*i);
  } else {
    template_invalid(str("a ", type_name(value), " has no JSON form"));
  }
}

}  // namespace

std::string to_repr(const Value& value) {
  if (value.string() != nullptr) return string_repr(*value.string());
  return to_text(value);
}

std::string to_text(const Value& value) {
  return std::visit(
      Overloaded{[](const Undefined&) { return std::string(); },
                 [](const None&) { return std::string("None"); },
                 [](bool b) { return std::string(b ? "True" : "False"); },
                 [](std::int64_t i) { return std::to_string(i); },
                 [](double d) { return float_repr(d); }, [](const StringPtr& s) { return *s; },
                 [](const ListPtr& l) { return list_repr(*l); },
                 [](const DictPtr& d) { return dict_repr(*d); },
                 [&](const auto&) -> std::string {
                   template_refused(str("a ", type_name(value), " as text is not supported"));
                 }},
      value.data());
}

std::string to_json_text(const Value& value, const JsonStyle& style) {
  std::string out;
  append_json(out, value, style, 0);
  return out;
}

std::vector<Value> iterate(const Value& value) {
  if (const ListValue* list = value.list()) return list->items;
  std::vector<Value> items;
  if (const DictValue* dict = value.dict()) {
    for (const auto& [key, item] : dict->items) items.push_back(Value::text(key));
  } else if (const std::string* s = value.string()) {
    for (std::size_t i = 0; i < s->size();) {
      const std::size_t begin = i;
      next_code_point(*s, i);
      items.push_back(Value::text(s->substr(begin, i - begin)));
    }
  } else if (!value.is_undefined()) {
    template_invalid(str("a ", type_name(value), " cannot be iterated"));
  }
  return items;
}

const Value* find_key(const DictValue& dict, std::string_view key) {
  for (const auto& [name, value] : dict.items)
    if (name == key) return &value;
  return nullptr;
}

std::vector<std::size_t> character_offsets(std::string_view text) {
  std::vector<std::size_t> offsets;
  for (std::size_t i = 0; i < text.size(); next_code_point(text, i)) offsets.push_back(i);
  offsets.push_back(text.size());
  return offsets;
}

bool is_python_space(char32_t c) {
  return is_white_space(c) || (c >= 0x1C && c <= 0x1F);
}

}  // namespace tandem::worker::text
