// Operators and subscripts of chat templates.
#include "worker/text/chat_template.h"
#include "worker/text/template_interpreter.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tandem::worker::text {
namespace {

[[noreturn]] void fail_operator(const std::string& op, const Value& a, const Value& b) {
  if (const auto* missing = a.get<Undefined>())
    template_invalid(str("\"", missing->name, "\" is undefined"));
  if (const auto* missing = b.get<Undefined>())
    template_invalid(str("\"", missing->name, "\" is undefined"));
  template_invalid(str("a ", type_name(a), " and a ", type_name(b), " have no operator ", op));
}

[[noreturn]] void fail_overflow() {
  template_refused("a number over 64 bits is not supported");
}

std::int64_t floor_divide(std::int64_t a, std::int64_t b) {
  if (b == 0) template_invalid("division by zero");
  if (a == INT64_MIN && b == -1) fail_overflow();
  const std::int64_t quotient = a / b;
  return a % b != 0 && ((a < 0) != (b < 0)) ? quotient - 1 : quotient;
}

std::int64_t int_power(std::int64_t base, std::int64_t exponent) {
  constexpr std::int64_t kExponentMax = 64;
  if (exponent > kExponentMax && base != 0 && base != 1 && base != -1) fail_overflow();
  if (exponent > kExponentMax) return base == -1 && exponent % 2 == 0 ? 1 : base;
  std::int64_t result = 1;
  for (std::int64_t i = 0; i < exponent; ++i)
    if (__builtin_mul_overflow(result, base, &result)) fail_overflow();
  return result;
}

Value int_operator(const std::string& op, std::int64_t a, std::int64_t b) {
  std::int64_t result = 0;
  bool overflow = false;
  if (op == "+") {
    overflow = __builtin_add_overflow(a, b, &result);
  } else if (op == "-") {
    overflow = __builtin_sub_overflow(a, b, &result);
  } else if (op == "*") {
    overflow = __builtin_mul_overflow(a, b, &result);
  } else if (op == "//") {
    result = floor_divide(a, b);
  } else if (op == "%") {
    if (b == 0) template_invalid("division by zero");
    result = b == -1 ? 0 : a - b * floor_divide(a, b);
  } else if (op == "/") {
    if (b == 0) template_invalid("division by zero");
    return Value(static_cast<double>(a) / static_cast<double>(b));
  } else if (b < 0) {
    if (a == 0) template_invalid("0 to a negative power");
    return Value(std::pow(static_cast<double>(a), static_cast<double>(b)));
  } else {
    result = int_power(a, b);
  }
  if (overflow) fail_overflow();
  return Value::integer(result);
}

Value float_operator(const std::string& op, double a, double b) {
  if (op == "+") return Value(a + b);
  if (op == "-") return Value(a - b);
  if (op == "*") return Value(a * b);
  if (op == "**") return Value(std::pow(a, b));
  if (b == 0) template_invalid("division by zero");
  if (op == "/") return Value(a / b);
  if (op == "//") return Value(std::floor(a / b));
  const double remainder = std::fmod(a, b);
  return Value(remainder != 0 && ((remainder < 0) != (b < 0)) ? remainder + b : remainder);
}

Value repeat(Interpreter& interpreter, const Value& value, std::int64_t times) {
  const auto count = static_cast<std::size_t>(std::max<std::int64_t>(times, 0));
  if (const std::string* s = value.string()) {
    if (s->size() * std::min(count, kTemplateOutputBytesMax + 1) > kTemplateOutputBytesMax)
      template_refused(str("a text is longer than ", kTemplateOutputBytesMax, " bytes"));
    std::string out;
    for (std::size_t i = 0; i < count && !s->empty(); ++i) out += *s;
    return interpreter.text(std::move(out));
  }
  std::vector<Value> items;
  const ListValue& list = *value.list();
  for (std::size_t i = 0; i < count && !list.items.empty(); ++i) {
    interpreter.charge(list.items.size() * sizeof(Value));
    items.insert(items.end(), list.items.begin(), list.items.end());
  }
  return Value::list(std::move(items), list.is_tuple);
}

/// Python's slice indices of a sequence of `size` items.
std::vector<std::size_t> slice_indices(std::int64_t size, const Value& start, const Value& stop,
                                       const Value& step) {
  const std::int64_t by = step.is_none() ? 1 : require_int(step, "the step of a slice");
  if (by == 0) template_invalid("a slice with a step of 0");
  const auto bound = [&](const Value& value, std::int64_t missing) {
    if (value.is_none()) return missing;
    std::int64_t i = require_int(value, "the bound of a slice");
    if (i < 0) i = i < -size ? -1 : i + size;
    return by > 0 ? std::clamp<std::int64_t>(i, 0, size)
                  : std::clamp<std::int64_t>(i, -1, size - 1);
  };
  const std::int64_t from = bound(start, by > 0 ? 0 : size - 1);
  const std::int64_t to = bound(stop, by > 0 ? size : -1);
  std::vector<std::size_t> indices;
  const std::int64_t stride = std::clamp<std::int64_t>(by, -size - 1, size + 1);
  for (std::int64_t i = from; stride > 0 ? i < to : i > to; i += stride)
    indices.push_back(static_cast<std::size_t>(i));
  return indices;
}

}  // namespace

const std::string& require_text(const Value& value, std::string_view what) {
  if (value.string() == nullptr)
    template_invalid(str(what, " has to be a text, not a ", type_name(value)));
  return *value.string();
}

std::int64_t require_int(const Value& value, std::string_view what) {
  std::int64_t i = 0;
  if (!value.as_int(i))
    template_invalid(str(what, " has to be a whole number, not a ", type_name(value)));
  return i;
}

std::size_t find_text(std::string_view text, std::string_view needle, std::size_t from) {
  if (from > text.size()) return std::string_view::npos;
  if (needle.empty()) return from;
  const void* found = memmem(text.data() + from, text.size() - from, needle.data(), needle.size());
  if (found == nullptr) return std::string_view::npos;
  return static_cast<std::size_t>(static_cast<const char*>(found) - text.data());
}

Value apply_binary(Interpreter& interpreter, const std::string& op, const Value& a,
                   const Value& b) {
  std::int64_t ia = 0, ib = 0;
  const bool a_int = a.as_int(ia), b_int = b.as_int(ib);
  if (a_int && b_int) return int_operator(op, ia, ib);
  double da = 0, db = 0;
  if (a.as_number(da) && b.as_number(db)) return float_operator(op, da, db);
  const bool a_sequence = a.string() != nullptr || a.list() != nullptr;
  const bool b_sequence = b.string() != nullptr || b.list() != nullptr;
  if (op == "*" && a_sequence && b_int) return repeat(interpreter, a, ib);
  if (op == "*" && b_sequence && a_int) return repeat(interpreter, b, ia);
  if (op == "%" && a.string() != nullptr)
    template_refused("formatting a text with % is not supported");
  if (op != "+") fail_operator(op, a, b);
  if (a.string() != nullptr && b.string() != nullptr)
    return interpreter.text(*a.string() + *b.string());
  const ListValue *la = a.list(), *lb = b.list();
  if (la == nullptr || lb == nullptr || la->is_tuple != lb->is_tuple) fail_operator(op, a, b);
  std::vector<Value> items = la->items;
  items.insert(items.end(), lb->items.begin(), lb->items.end());
  interpreter.charge(items.size() * sizeof(Value));
  return Value::list(std::move(items), la->is_tuple);
}

bool contains(const Value& container, const Value& item) {
  if (const std::string* s = container.string()) {
    if (item.string() == nullptr)
      template_invalid(str("a ", type_name(item), " cannot be looked for in a text"));
    return find_text(*s, *item.string()) != std::string::npos;
  }
  if (const DictValue* dict = container.dict())
    return item.string() != nullptr && find_key(*dict, *item.string()) != nullptr;
  const std::vector<Value> items = iterate(container);
  return std::any_of(items.begin(), items.end(), [&](const Value& i) { return equals(i, item); });
}

Value get_item(Interpreter& interpreter, const Value& object, const Value& key) {
  if (object.string() != nullptr) interpreter.charge(object);
  const std::string* name = key.string();
  if (const DictValue* dict = object.dict()) {
    interpreter.charge(dict->items.size());
    const Value* found = name != nullptr ? find_key(*dict, *name) : nullptr;
    if (found != nullptr) return *found;
    if (name != nullptr && has_method(object, *name))
      template_refused(str("the method ", *name, " that is not called is not supported"));
    return Value::undefined(name != nullptr ? *name : to_repr(key));
  }
  std::int64_t index = 0;
  if (!key.as_int(index)) return Value::undefined(name != nullptr ? *name : type_name(key));
  if (const ListValue* list = object.list()) {
    const auto size = static_cast<std::int64_t>(list->items.size());
    if (index < 0) index += size;
    if (index >= 0 && index < size) return list->items[static_cast<std::size_t>(index)];
  } else if (const std::string* s = object.string()) {
    const auto offsets = character_offsets(*s);
    const auto size = static_cast<std::int64_t>(offsets.size()) - 1;
    if (index < 0) index += size;
    if (index >= 0 && index < size) {
      const auto i = static_cast<std::size_t>(index);
      return Value::text(s->substr(offsets[i], offsets[i + 1] - offsets[i]));
    }
  }
  return Value::undefined(str("item ", index));
}

Value slice(Interpreter& interpreter, const Value& object, const Value& start, const Value& stop,
            const Value& step) {
  if (const std::string* s = object.string()) {
    interpreter.charge(s->size());
    const auto offsets = character_offsets(*s);
    std::string out;
    for (const std::size_t i :
         slice_indices(static_cast<std::int64_t>(offsets.size()) - 1, start, stop, step))
      out.append(*s, offsets[i], offsets[i + 1] - offsets[i]);
    return interpreter.text(std::move(out));
  }
  const ListValue* list = object.list();
  if (list == nullptr) template_invalid(str("a ", type_name(object), " cannot be sliced"));
  std::vector<Value> items;
  for (const std::size_t i :
       slice_indices(static_cast<std::int64_t>(list->items.size()), start, stop, step))
    items.push_back(list->items[i]);
  interpreter.charge(items.size() * sizeof(Value));
  return Value::list(std::move(items), list->is_tuple);
}

}  // namespace tandem::worker::text
