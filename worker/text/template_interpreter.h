// Runs a parsed chat template. Internal to worker/text; one object per rendering, one thread.
#pragma once

#include "worker/text/template_ast.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tandem::worker::text {

/// Depth of the interpreter's own recursion: expressions, blocks and macro calls together.
inline constexpr int kTemplateEvaluationDepthMax = 800;
/// Longest range() (Jinja2's sandbox has the same limit).
inline constexpr std::int64_t kTemplateRangeMax = 100'000;

/// Variables of one scope. Frames live on the C++ stack, so a parent outlives its children.
struct TemplateFrame {
  TemplateFrame* parent = nullptr;
  std::vector<std::pair<std::string, Value>> variables;
  [[nodiscard]] const Value* find(std::string_view name) const;
  void set(const std::string& name, Value value);
};

/// Evaluated arguments of a call, filter or test.
struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
  std::string callee;  ///< for messages
  /// The argument at `index` or called `name`; nullptr when it was not given.
  [[nodiscard]] const Value* find(std::size_t index, std::string_view name) const;
  /// Invalid: it was not given.
  [[nodiscard]] const Value& require(std::size_t index, std::string_view name) const;
  /// Invalid: more positional arguments than names, or a name that is not among them.
  void check(std::initializer_list<std::string_view> names) const;
};

class Interpreter {
 public:
  explicit Interpreter(std::optional<std::int64_t> now_unix_s) : now_unix_s_(now_unix_s) {}

  /// Runs a program with the given variables; the text it writes is in output(). Throws
  /// TemplateError with "line N: ".
  void run(const Block& program, std::vector<std::pair<std::string, Value>> variables);
  std::string& output() { return root_output_; }
  /// Where {% generation %} blocks stand in the output.
  [[nodiscard]] const std::vector<std::pair<std::size_t, std::size_t>>& generation() const {
    return generation_;
  }

  // For filters, tests and methods.

  /// Counts work: `bytes` made or copied, or items looked at. Refused over kTemplateStepsMax.
  void charge(std::size_t bytes);
  /// Counts the work of going through a value.
  void charge(const Value& value);
  /// A text, charged and held to the output limit.
  Value text(std::string s);

 private:
  enum class Flow { kNormal, kBreak, kContinue };
  struct Depth;

  Flow run_block(const Block& block, TemplateFrame& frame);
  Flow run_statement(const Statement& statement, TemplateFrame& frame);
  Flow run_if(const Statement& statement, TemplateFrame& frame);
  Flow run_for(const Statement& statement, TemplateFrame& frame);
  void run_set(const Statement& statement, TemplateFrame& frame);
  void run_generation(const Statement& statement, TemplateFrame& frame);
  /// What a block writes, in a scope of its own.
  std::string capture(const Block& block, TemplateFrame& frame);
  void assign(const std::vector<std::string>& targets, const Value& value, TemplateFrame& frame);
  void write(std::string_view text);
  std::string printed(const Value& value);

  Value evaluate(const Expression& e, TemplateFrame& frame);
  Value evaluate_kind(const Expression& e, TemplateFrame& frame);
  Value evaluate_name(const Expression& e, const TemplateFrame& frame) const;
  Value evaluate_dict(const Expression& e, TemplateFrame& frame);
  Value evaluate_attribute(const Expression& e, TemplateFrame& frame);
  Value evaluate_subscript(const Expression& e, TemplateFrame& frame);
  Value evaluate_slice(const Expression& e, TemplateFrame& frame);
  Value evaluate_call(const Expression& e, TemplateFrame& frame);
  Value evaluate_compare(const Expression& e, TemplateFrame& frame);
  Value evaluate_concat(const Expression& e, TemplateFrame& frame);
  Value evaluate_binary(const Expression& e, TemplateFrame& frame);
  Value evaluate_negate(const Expression& e, TemplateFrame& frame);
  Arguments evaluate_arguments(const Expression& e, std::size_t first, TemplateFrame& frame);
  Value call_macro(const MacroValue& macro, const Arguments& arguments);
  Value call_function(const std::string& name, const Arguments& arguments);
  Value call_range(const Arguments& arguments);
  Value call_strftime(const Arguments& arguments);

  std::optional<std::int64_t> now_unix_s_;
  std::int64_t steps_ = 0;
  int depth_ = 0, macro_depth_ = 0, line_ = 0;
  std::string root_output_;
  std::string* output_ = &root_output_;
  std::vector<std::pair<std::size_t, std::size_t>> generation_;
};

// In template_filters.cc, template_tests.cc, template_methods.cc and template_operators.cc.
// Refused: a name they do not know.
Value apply_filter(Interpreter& interpreter, const std::string& name, const Value& input,
                   const Arguments& arguments);
bool apply_test(const std::string& name, const Value& input, const Arguments& arguments);
/// Whether an object of this type has a method of this name (supported here or not).
bool has_method(const Value& object, std::string_view name);
Value call_method(Interpreter& interpreter, const Value& object, const std::string& name,
                  const Arguments& arguments);
Value apply_binary(Interpreter& interpreter, const std::string& op, const Value& a, const Value& b);
bool contains(const Value& container, const Value& item);
/// object[key] and object.name of plain values; undefined when there is none.
Value get_item(Interpreter& interpreter, const Value& object, const Value& key);
Value slice(Interpreter& interpreter, const Value& object, const Value& start, const Value& stop,
            const Value& step);

// Text functions shared by filters and methods; Python's, on Unicode characters.
std::string python_strip(const std::string& s, const Value* characters, bool left, bool right);
std::string python_upper(const std::string& s);
std::string python_lower(const std::string& s);
std::string python_capitalize(const std::string& s);
std::string python_replace(const std::string& s, const std::string& from, const std::string& to,
                           std::int64_t count);
/// The text of an argument. Invalid: another type.
const std::string& require_text(const Value& value, std::string_view what);
std::int64_t require_int(const Value& value, std::string_view what);
/// The first occurrence from `from` on, or npos. Linear in the text, whatever the needle.
std::size_t find_text(std::string_view text, std::string_view needle, std::size_t from = 0);

}  // namespace tandem::worker::text
