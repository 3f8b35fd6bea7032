// Values of the chat-template language: Python's, as far as templates use them. Internal to
// worker/text. Errors inside the interpreter travel as TemplateError and end in chat_template.cc.
#pragma once

#include "protocol/base/result.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace tandem::worker::text {

struct MacroStatement;
struct TemplateFrame;
class Value;

/// Nesting of lists and dicts inside one another.
inline constexpr int kTemplateValueDepthMax = 64;
/// Largest weight of a value. Parts may be shared, so a small program can describe a huge value;
/// its weight counts every part as often as printing it would.
inline constexpr std::int64_t kTemplateValueWeightMax = 4'000'000;

/// Thrown by the interpreter's parts, caught in chat_template.cc. The message has no line yet.
struct TemplateError {
  StatusCode code;
  std::string message;
};
[[noreturn]] void template_invalid(std::string message);  ///< what Python or Jinja would refuse
[[noreturn]] void template_refused(std::string message);  ///< what this interpreter lacks

struct Undefined {
  std::string name;  ///< for messages
};
struct None {};
struct ListValue {
  std::vector<Value> items;
  bool is_tuple = false;
  int depth = 1;
  std::int64_t weight = 1;
};
struct DictValue {
  std::vector<std::pair<std::string, Value>> items;  ///< in insertion order; keys are texts
  int depth = 1;
  std::int64_t weight = 1;
};
/// The only value that changes; it holds plain values alone, so nothing refers to itself.
struct NamespaceValue;
struct LoopValue;
/// A macro and the frame that it was defined in, which outlives every use: neither containers nor
/// namespaces may hold macros.
struct MacroValue {
  const MacroStatement* macro;
  TemplateFrame* frame;
};
/// A function of the environment, such as range.
struct FunctionValue {
  std::string name;
};

using StringPtr = std::shared_ptr<const std::string>;
using ListPtr = std::shared_ptr<const ListValue>;
using DictPtr = std::shared_ptr<const DictValue>;
using NamespacePtr = std::shared_ptr<NamespaceValue>;
using LoopPtr = std::shared_ptr<const LoopValue>;

class Value {
 public:
  using Data = std::variant<Undefined, None, bool, std::int64_t, double, StringPtr, ListPtr,
                            DictPtr, NamespacePtr, LoopPtr, MacroValue, FunctionValue>;
  Value() : data_(Undefined{}) {}
  template <class T>
  requires(!std::is_same_v<std::remove_cvref_t<T>, Value>) explicit Value(T data)
      : data_(std::move(data)) {}

  static Value none() { return Value(None{}); }
  static Value boolean(bool b) { return Value(b); }
  static Value integer(std::int64_t i) { return Value(i); }
  static Value text(std::string s);
  static Value undefined(std::string name) { return Value(Undefined{std::move(name)}); }
  /// Refused: nested too deep, or holding a namespace, loop or macro.
  static Value list(std::vector<Value> items, bool is_tuple = false);
  /// A later key replaces an earlier one in its place, as in Python.
  static Value dict(std::vector<std::pair<std::string, Value>> items);
  static Value from_json(const nlohmann::ordered_json& json, int depth = 0);

  [[nodiscard]] const Data& data() const { return data_; }
  template <class T>
  [[nodiscard]] const T* get() const {
    return std::get_if<T>(&data_);
  }
  [[nodiscard]] bool is_undefined() const { return get<Undefined>() != nullptr; }
  [[nodiscard]] bool is_none() const { return get<None>() != nullptr; }
  [[nodiscard]] const std::string* string() const;
  [[nodiscard]] const ListValue* list() const;
  [[nodiscard]] const DictValue* dict() const;
  /// An int or a bool as an int, as Python has it.
  [[nodiscard]] const std::int64_t* plain_int() const { return get<std::int64_t>(); }
  [[nodiscard]] bool as_int(std::int64_t& out) const;
  [[nodiscard]] bool as_number(double& out) const;
  /// May stand in containers and namespaces.
  [[nodiscard]] bool is_storable() const;

 private:
  Data data_;
};

struct NamespaceValue {
  std::vector<std::pair<std::string, Value>> attributes;
};
struct LoopValue {
  ListPtr items;
  std::size_t index = 0;
  std::int64_t depth = 1;
};

/// The work that printing or comparing a value takes: its parts, and 16 bytes of text as one.
std::int64_t weight_of(const Value& value);
/// What Python calls the type, for messages.
std::string type_name(const Value& value);
bool is_true(const Value& value);
bool equals(const Value& a, const Value& b);
/// Negative, 0 or positive. Invalid: types that Python does not order.
int compare(const Value& a, const Value& b);
/// str() and repr().
std::string to_text(const Value& value);
std::string to_repr(const Value& value);
std::string float_repr(double value);

struct JsonStyle {
  int indent = -1;  ///< -1: one line
  bool sort_keys = false;
  bool ensure_ascii = false;
  std::string item_separator = ", ", key_separator = ": ";
};
/// json.dumps(value, ensure_ascii=False). Invalid: values without a JSON form.
std::string to_json_text(const Value& value, const JsonStyle& style);

/// The items that a for loop sees. Invalid: not iterable.
std::vector<Value> iterate(const Value& value);
const Value* find_key(const DictValue& dict, std::string_view key);

/// Characters of UTF-8 text, and the byte offset of each (one more for the end).
std::vector<std::size_t> character_offsets(std::string_view text);
/// str.isspace() of one character.
bool is_python_space(char32_t c);

}  // namespace tandem::worker::text
