// Tests of chat templates: `value is test`.
#include "worker/text/template_interpreter.h"

#include "worker/text/unicode.h"
#include "worker/text/utf8.h"

#include <cmath>

namespace tandem::worker::text {
namespace {

bool all_cased(const Value& value, bool upper) {
  bool cased = false;
  const std::string s = to_text(value);
  for (std::size_t i = 0; i < s.size();) {
    const char32_t c = next_code_point(s, i);
    if (upper ? is_cased_lower(c) : is_cased_upper(c)) return false;
    cased = cased || is_cased_lower(c) || is_cased_upper(c);
  }
  return cased;
}

/// The tests without arguments; false in `known` when there is none of that name.
bool simple_test(const std::string& name, const Value& value, bool& known) {
  const bool is_int = value.plain_int() != nullptr, is_bool = value.get<bool>() != nullptr;
  const bool is_float = value.get<double>() != nullptr;
  const bool has_length = value.string() != nullptr || value.list() != nullptr ||
                          value.dict() != nullptr || value.is_undefined();
  known = true;
  if (name == "defined") return !value.is_undefined();
  if (name == "undefined") return value.is_undefined();
  if (name == "none") return value.is_none();
  if (name == "boolean") return is_bool;
  if (name == "true") return is_bool && is_true(value);
  if (name == "false") return is_bool && !is_true(value);
  if (name == "integer") return is_int;
  if (name == "float") return is_float;
  if (name == "number") return is_int || is_float || is_bool;
  if (name == "string") return value.string() != nullptr;
  if (name == "mapping") return value.dict() != nullptr;
  if (name == "iterable" || name == "sequence") return has_length;
  if (name == "callable")
    return value.get<MacroValue>() != nullptr || value.get<FunctionValue>() != nullptr;
  if (name == "lower" || name == "upper") return all_cased(value, name == "upper");
  if (name == "even" || name == "odd") {
    const std::int64_t i = require_int(value, str("the value tested with \"", name, "\""));
    return (i % 2 == 0) == (name == "even");
  }
  known = false;
  return false;
}

}  // namespace

bool apply_test(const std::string& name, const Value& input, const Arguments& arguments) {
  bool known = false;
  const bool holds = simple_test(name, input, known);
  if (known) {
    arguments.check({});
    return holds;
  }
  const auto other = [&]() -> const Value& {
    arguments.check({"other"});
    return arguments.require(0, "other");
  };
  if (name == "equalto" || name == "eq" || name == "==") return equals(input, other());
  if (name == "ne" || name == "!=") return !equals(input, other());
  if (name == "lt" || name == "lessthan" || name == "<") return compare(input, other()) < 0;
  if (name == "le" || name == "<=") return compare(input, other()) <= 0;
  if (name == "gt" || name == "greaterthan" || name == ">") return compare(input, other()) > 0;
  if (name == "ge" || name == ">=") return compare(input, other()) >= 0;
  if (name == "in") return contains(other(), input);
  if (name == "divisibleby") {
    const std::int64_t by = require_int(other(), "the divisor");
    if (by == 0) template_invalid("division by zero");
    const std::int64_t value = require_int(input, "the value tested with \"divisibleby\"");
    return by == -1 || value % by == 0;
  }
  template_refused(str("the test \"", name.substr(0, 40), "\" is not supported"));
}

}  // namespace tandem::worker::text
