#include "worker/text/template_interpreter.h"

#include "worker/text/chat_template.h"

#include <algorithm>
#include <array>
#include <ctime>

namespace tandem::worker::text {

const Value* TemplateFrame::find(std::string_view name) const {
  for (const TemplateFrame* frame = this; frame != nullptr; frame = frame->parent)
    for (const auto& [known, value] : frame->variables)
      if (known == name) return &value;
  return nullptr;
}

void TemplateFrame::set(const std::string& name, Value value) {
  for (auto& [known, old] : variables)
    if (known == name) {
      old = std::move(value);
      return;
    }
  variables.emplace_back(name, std::move(value));
}

const Value* Arguments::find(std::size_t index, std::string_view name) const {
  if (index < positional.size()) return &positional[index];
  for (const auto& [known, value] : named)
    if (known == name) return &value;
  return nullptr;
}

const Value& Arguments::require(std::size_t index, std::string_view name) const {
  const Value* value = find(index, name);
  if (value == nullptr) template_invalid(str(callee, " needs the argument \"", name, "\""));
  return *value;
}

void Arguments::check(std::initializer_list<std::string_view> names) const {
  if (positional.size() > names.size())
    template_invalid(str(callee, " takes at most ", names.size(), " arguments, ", positional.size(),
                         " were given"));
  for (const auto& [name, value] : named) {
    const auto known = std::find(names.begin(), names.end(), name);
    if (known == names.end())
      template_invalid(str(callee, " has no argument \"", name.substr(0, 40), "\""));
    if (static_cast<std::size_t>(known - names.begin()) < positional.size())
      template_invalid(str(callee, " gets the argument \"", name, "\" twice"));
  }
}

struct Interpreter::Depth {
  explicit Depth(int& counter) : depth(counter) {
    if (++depth > kTemplateEvaluationDepthMax)
      template_refused(
          str("evaluation is nested more than ", kTemplateEvaluationDepthMax, " deep"));
  }
  ~Depth() { --depth; }
  Depth(const Depth&) = delete;
  Depth& operator=(const Depth&) = delete;
  int& depth;
};

void Interpreter::charge(std::size_t bytes) {
  constexpr std::size_t kBytesPerStep = 16;
  steps_ += 1 + static_cast<std::int64_t>(bytes / kBytesPerStep);
  if (steps_ > kTemplateStepsMax)
    template_refused(str("the template needs more than ", kTemplateStepsMax, " steps"));
}

void Interpreter::charge(const Value& value) {
  steps_ += weight_of(value) - 1;
  charge(0);
}

Value Interpreter::text(std::string s) {
  charge(s.size());
  if (s.size() > kTemplateOutputBytesMax)
    template_refused(str("a text is longer than ", kTemplateOutputBytesMax, " bytes"));
  return Value::text(std::move(s));
}

void Interpreter::write(std::string_view text) {
  charge(text.size());
  if (output_->size() + text.size() > kTemplateOutputBytesMax)
    template_refused(str("the template writes more than ", kTemplateOutputBytesMax, " bytes"));
  *output_ += text;
}

void Interpreter::run(const Block& program, std::vector<std::pair<std::string, Value>> variables) {
  // Two scopes: what the template sets at its top level hides what it was given.
  TemplateFrame environment;
  for (const char* name : {"range", "namespace", "dict", "raise_exception", "joiner", "cycler"})
    environment.variables.emplace_back(name, Value(FunctionValue{name}));
  if (now_unix_s_)
    environment.variables.emplace_back("strftime_now", Value(FunctionValue{"strftime_now"}));
  for (auto& [name, value] : variables) environment.set(name, std::move(value));
  TemplateFrame top{&environment, {}};
  try {
    run_block(program, top);
  } catch (TemplateError& error) {
    error.message = str("line ", line_, ": ", error.message);
    throw;
  }
}

std::string Interpreter::printed(const Value& value) {
  charge(value);
  return to_text(value);
}

// --- statements -------------------------------------------------------------------------------

Interpreter::Flow Interpreter::run_block(const Block& block, TemplateFrame& frame) {
  const Depth depth(depth_);
  for (const auto& statement : block) {
    const Flow flow = run_statement(*statement, frame);
    if (flow != Flow::kNormal) return flow;
  }
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::run_statement(const Statement& statement, TemplateFrame& frame) {
  line_ = statement.line;
  charge(0);
  switch (statement.kind) {
    case StatementKind::kText:
      write(statement.text);
      break;
    case StatementKind::kOutput:
      write(printed(evaluate(*statement.expression, frame)));
      break;
    case StatementKind::kIf:
      return run_if(statement, frame);
    case StatementKind::kFor:
      return run_for(statement, frame);
    case StatementKind::kSet:
      run_set(statement, frame);
      break;
    case StatementKind::kSetBlock:
      frame.set(statement.targets[0], text(capture(statement.bodies[0], frame)));
      break;
    case StatementKind::kMacro:
      frame.set(statement.macro->name, Value(MacroValue{statement.macro.get(), &frame}));
      break;
    case StatementKind::kGeneration:
      run_generation(statement, frame);
      break;
    case StatementKind::kBreak:
      return Flow::kBreak;
    case StatementKind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::run_if(const Statement& statement, TemplateFrame& frame) {
  for (std::size_t i = 0; i < statement.branches.size(); ++i)
    if (is_true(evaluate(*statement.branches[i], frame)))
      return run_block(statement.bodies[i], frame);
  if (statement.bodies.size() > statement.branches.size())
    return run_block(statement.bodies.back(), frame);
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::run_for(const Statement& statement, TemplateFrame& frame) {
  auto items = std::make_shared<ListValue>();
  const Value sequence = evaluate(*statement.expression, frame);
  charge(sequence);
  items->items = iterate(sequence);
  charge(items->items.size() * sizeof(Value));
  if (statement.condition) {
    std::vector<Value> kept;
    for (const Value& item : items->items) {
      TemplateFrame scope{&frame, {}};
      assign(statement.targets, item, scope);
      if (is_true(evaluate(*statement.condition, scope))) kept.push_back(item);
    }
    items->items = std::move(kept);
  }
  const ListPtr shared = items;
  for (std::size_t i = 0; i < shared->items.size(); ++i) {
    charge(0);
    TemplateFrame scope{&frame, {}};
    assign(statement.targets, shared->items[i], scope);
    scope.set("loop", Value(std::make_shared<const LoopValue>(LoopValue{shared, i, 1})));
    if (run_block(statement.bodies[0], scope) == Flow::kBreak) break;
  }
  if (shared->items.empty() && statement.bodies.size() > 1) {
    TemplateFrame scope{&frame, {}};
    return run_block(statement.bodies[1], scope);
  }
  return Flow::kNormal;
}

void Interpreter::assign(const std::vector<std::string>& targets, const Value& value,
                         TemplateFrame& frame) {
  if (targets.size() == 1) return frame.set(targets[0], value);
  const std::vector<Value> parts = iterate(value);
  if (parts.size() != targets.size())
    template_invalid(str("cannot assign ", parts.size(), " values to ", targets.size(), " names"));
  for (std::size_t i = 0; i < targets.size(); ++i) frame.set(targets[i], parts[i]);
}

void Interpreter::run_set(const Statement& statement, TemplateFrame& frame) {
  Value value = evaluate(*statement.expression, frame);
  if (statement.text.empty()) return assign(statement.targets, value, frame);
  const Value* object = frame.find(statement.text);
  const auto* pointer = object != nullptr ? object->get<NamespacePtr>() : nullptr;
  if (pointer == nullptr)
    template_invalid(
        str("cannot set an attribute of \"", statement.text, "\", which is no namespace"));
  if (!value.is_storable())
    template_refused(str("a ", type_name(value), " inside a namespace is not supported"));
  auto& attributes = (*pointer)->attributes;
  for (auto& [name, old] : attributes)
    if (name == statement.targets[0]) {
      old = std::move(value);
      return;
    }
  attributes.emplace_back(statement.targets[0], std::move(value));
}

void Interpreter::run_generation(const Statement& statement, TemplateFrame& frame) {
  if (output_ != &root_output_)
    template_refused("{% generation %} inside a macro or {% set %} block is not supported");
  TemplateFrame scope{&frame, {}};
  const std::size_t begin = output_->size();
  run_block(statement.bodies[0], scope);
  generation_.emplace_back(begin, output_->size());
}

std::string Interpreter::capture(const Block& block, TemplateFrame& frame) {
  std::string captured;
  std::string* const outer = std::exchange(output_, &captured);
  TemplateFrame scope{&frame, {}};
  try {
    run_block(block, scope);
  } catch (...) {
    output_ = outer;
    throw;
  }
  output_ = outer;
  return captured;
}

// --- expressions ------------------------------------------------------------------------------

Value Interpreter::evaluate(const Expression& e, TemplateFrame& frame) {
  const Depth depth(depth_);
  line_ = e.line;
  charge(0);
  return evaluate_kind(e, frame);
}

Value Interpreter::evaluate_kind(const Expression& e, TemplateFrame& frame) {
  const auto operand = [&](std::size_t i) { return evaluate(*e.operands[i], frame); };
  switch (e.kind) {
    case ExpressionKind::kConstant:
      return e.value;
    case ExpressionKind::kName:
      return evaluate_name(e, frame);
    case ExpressionKind::kList:
    case ExpressionKind::kTuple: {
      std::vector<Value> items;
      for (std::size_t i = 0; i < e.operands.size(); ++i) items.push_back(operand(i));
      return Value::list(std::move(items), e.kind == ExpressionKind::kTuple);
    }
    case ExpressionKind::kDict:
      return evaluate_dict(e, frame);
    case ExpressionKind::kAttribute:
      return evaluate_attribute(e, frame);
    case ExpressionKind::kSubscript:
      return evaluate_subscript(e, frame);
    case ExpressionKind::kSlice:
      return evaluate_slice(e, frame);
    case ExpressionKind::kCall:
      return evaluate_call(e, frame);
    case ExpressionKind::kFilter:
      return apply_filter(*this, e.text, operand(0), evaluate_arguments(e, 1, frame));
    case ExpressionKind::kTest:
      return Value::boolean(apply_test(e.text, operand(0), evaluate_arguments(e, 1, frame)) !=
                            e.negated);
    case ExpressionKind::kNot:
      return Value::boolean(!is_true(operand(0)));
    case ExpressionKind::kNegate:
    case ExpressionKind::kPlus:
      return evaluate_negate(e, frame);
    case ExpressionKind::kBinary:
      return evaluate_binary(e, frame);
    case ExpressionKind::kAnd: {
      Value left = operand(0);
      return is_true(left) ? operand(1) : left;
    }
    case ExpressionKind::kOr: {
      Value left = operand(0);
      return is_true(left) ? left : operand(1);
    }
    case ExpressionKind::kCompare:
      return evaluate_compare(e, frame);
    case ExpressionKind::kConcat:
      return evaluate_concat(e, frame);
    case ExpressionKind::kConditional:
      if (is_true(operand(1))) return operand(0);
      return e.operands[2] ? operand(2) : Value::undefined("the missing else");
  }
  return {};
}

Value Interpreter::evaluate_name(const Expression& e, const TemplateFrame& frame) const {
  const Value* value = frame.find(e.text);
  return value != nullptr ? *value : Value::undefined(e.text);
}

Value Interpreter::evaluate_dict(const Expression& e, TemplateFrame& frame) {
  std::vector<std::pair<std::string, Value>> items;
  for (std::size_t i = 0; i < e.operands.size(); i += 2) {
    const Value key = evaluate(*e.operands[i], frame);
    if (key.string() == nullptr)
      template_refused(str("a dict key that is a ", type_name(key), " is not supported"));
    items.emplace_back(*key.string(), evaluate(*e.operands[i + 1], frame));
  }
  return Value::dict(std::move(items));
}

namespace {

Value loop_attribute(const LoopValue& loop, const std::string& name) {
  const auto size = static_cast<std::int64_t>(loop.items->items.size());
  const auto index = static_cast<std::int64_t>(loop.index);
  if (name == "index") return Value::integer(index + 1);
  if (name == "index0") return Value::integer(index);
  if (name == "revindex") return Value::integer(size - index);
  if (name == "revindex0") return Value::integer(size - index - 1);
  if (name == "first") return Value::boolean(index == 0);
  if (name == "last") return Value::boolean(index + 1 == size);
  if (name == "length") return Value::integer(size);
  if (name == "depth") return Value::integer(loop.depth);
  if (name == "depth0") return Value::integer(loop.depth - 1);
  if (name == "previtem")
    return index > 0 ? loop.items->items[loop.index - 1]
                     : Value::undefined("there is no previous item");
  if (name == "nextitem")
    return index + 1 < size ? loop.items->items[loop.index + 1]
                            : Value::undefined("there is no next item");
  template_refused(str("loop.", name.substr(0, 40), " is not supported"));
}

}  // namespace

Value Interpreter::evaluate_attribute(const Expression& e, TemplateFrame& frame) {
  const Value object = evaluate(*e.operands[0], frame);
  line_ = e.line;
  if (const auto* loop = object.get<LoopPtr>()) return loop_attribute(**loop, e.text);
  if (const auto* space = object.get<NamespacePtr>()) {
    for (const auto& [name, value] : (*space)->attributes)
      if (name == e.text) return value;
    return Value::undefined(e.text);
  }
  if (const auto* missing = object.get<Undefined>())
    template_invalid(str("\"", missing->name, "\" is undefined"));
  // Jinja2 finds a method before a key of the same name.
  if (has_method(object, e.text))
    template_refused(str("the method ", e.text, " that is not called is not supported"));
  return get_item(*this, object, Value::text(e.text));
}

Value Interpreter::evaluate_subscript(const Expression& e, TemplateFrame& frame) {
  const Value object = evaluate(*e.operands[0], frame);
  const Value key = evaluate(*e.operands[1], frame);
  line_ = e.line;
  if (const auto* missing = object.get<Undefined>())
    template_invalid(str("\"", missing->name, "\" is undefined"));
  if (const auto* space = object.get<NamespacePtr>(); space != nullptr && key.string() != nullptr) {
    for (const auto& [name, value] : (*space)->attributes)
      if (name == *key.string()) return value;
    return Value::undefined(*key.string());
  }
  return get_item(*this, object, key);
}

Value Interpreter::evaluate_slice(const Expression& e, TemplateFrame& frame) {
  std::array<Value, 4> parts{Value::none(), Value::none(), Value::none(), Value::none()};
  for (std::size_t i = 0; i < e.operands.size(); ++i)
    if (e.operands[i]) parts[i] = evaluate(*e.operands[i], frame);
  line_ = e.line;
  return slice(*this, parts[0], parts[1], parts[2], parts[3]);
}

Arguments Interpreter::evaluate_arguments(const Expression& e, std::size_t first,
                                          TemplateFrame& frame) {
  Arguments arguments;
  arguments.callee = e.text;
  for (std::size_t i = first; i < e.operands.size(); ++i)
    arguments.positional.push_back(evaluate(*e.operands[i], frame));
  for (const auto& [name, value] : e.keywords)
    arguments.named.emplace_back(name, evaluate(*value, frame));
  line_ = e.line;
  return arguments;
}

Value Interpreter::evaluate_call(const Expression& e, TemplateFrame& frame) {
  const Expression& callee = *e.operands[0];
  Value function;
  if (callee.kind == ExpressionKind::kAttribute) {
    const Value object = evaluate(*callee.operands[0], frame);
    Arguments arguments = evaluate_arguments(e, 1, frame);
    arguments.callee = callee.text;
    if (const auto* missing = object.get<Undefined>())
      template_invalid(str("\"", missing->name, "\" is undefined"));
    if (has_method(object, callee.text)) return call_method(*this, object, callee.text, arguments);
    template_invalid(str("a ", type_name(object), " has no method \"", callee.text.substr(0, 40),
                         "\" that this interpreter knows"));
  }
  function = evaluate(callee, frame);
  Arguments arguments = evaluate_arguments(e, 1, frame);
  arguments.callee = callee.text;
  if (const auto* macro = function.get<MacroValue>()) return call_macro(*macro, arguments);
  if (const auto* known = function.get<FunctionValue>())
    return call_function(known->name, arguments);
  if (const auto* missing = function.get<Undefined>())
    template_invalid(str("\"", missing->name, "\" is undefined"));
  template_invalid(str("a ", type_name(function), " cannot be called"));
}

Value Interpreter::call_macro(const MacroValue& value, const Arguments& arguments) {
  const MacroStatement& macro = *value.macro;
  const int line = line_;
  if (++macro_depth_ > kTemplateNestingMax)
    template_refused(str("macro calls are nested more than ", kTemplateNestingMax, " deep"));
  TemplateFrame scope{value.frame, {}};
  if (arguments.positional.size() > macro.parameters.size())
    template_invalid(str("the macro ", macro.name, " takes ", macro.parameters.size(),
                         " arguments, ", arguments.positional.size(), " were given"));
  for (const auto& [name, given] : arguments.named)
    if (std::find(macro.parameters.begin(), macro.parameters.end(), name) == macro.parameters.end())
      template_invalid(str("the macro ", macro.name, " has no parameter \"", name, "\""));
  const std::size_t without_default = macro.parameters.size() - macro.defaults.size();
  for (std::size_t i = 0; i < macro.parameters.size(); ++i) {
    const std::string& name = macro.parameters[i];
    if (const Value* given = arguments.find(i, name))
      scope.set(name, *given);
    else if (i >= without_default)
      scope.set(name, evaluate(*macro.defaults[i - without_default], scope));
    else
      scope.set(name, Value::undefined(name));
  }
  Value result = text(capture(macro.body, scope));
  --macro_depth_;
  line_ = line;
  return result;
}

Value Interpreter::call_function(const std::string& name, const Arguments& arguments) {
  if (name == "range") return call_range(arguments);
  if (name == "strftime_now") return call_strftime(arguments);
  if (name == "raise_exception") {
    arguments.check({"message"});
    template_invalid(str("the template refuses: ", to_text(arguments.require(0, "message"))));
  }
  if (name == "namespace" || name == "dict") {
    std::vector<std::pair<std::string, Value>> items;
    if (!arguments.positional.empty()) {
      const DictValue* from = arguments.positional[0].dict();
      if (from == nullptr || arguments.positional.size() > 1)
        template_refused(str(name, "() of anything but one dict and names is not supported"));
      items = from->items;
    }
    items.insert(items.end(), arguments.named.begin(), arguments.named.end());
    Value dict = Value::dict(std::move(items));
    if (name == "dict") return dict;
    return Value(std::make_shared<NamespaceValue>(NamespaceValue{dict.dict()->items}));
  }
  template_refused(str("the function ", name, " is not supported"));
}

Value Interpreter::call_range(const Arguments& arguments) {
  arguments.check({"start", "stop", "step"});
  if (!arguments.named.empty()) template_invalid("range() takes no named arguments");
  std::array<std::int64_t, 3> parts{0, 0, 1};
  const std::size_t count = arguments.positional.size();
  if (count == 0) template_invalid("range() needs an argument");
  for (std::size_t i = 0; i < count; ++i)
    parts[count == 1 ? 1 : i] = require_int(arguments.positional[i], "an argument of range()");
  const auto [start, stop, step] = parts;
  if (step == 0) template_invalid("range() with a step of 0");
  std::vector<Value> items;
  for (std::int64_t i = start; step > 0 ? i < stop : i > stop;) {
    if (static_cast<std::int64_t>(items.size()) >= kTemplateRangeMax)
      template_refused(str("range() of more than ", kTemplateRangeMax, " numbers"));
    charge(sizeof(Value));
    items.push_back(Value::integer(i));
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return Value::list(std::move(items));
}

Value Interpreter::call_strftime(const Arguments& arguments) {
  constexpr std::size_t kFormatBytesMax = 256;
  arguments.check({"format"});
  const std::string& format = require_text(arguments.require(0, "format"), "the format of a date");
  if (format.size() > kFormatBytesMax)
    template_refused(str("a date format of more than ", kFormatBytesMax, " bytes"));
  for (std::size_t i = 0; i + 1 < format.size(); ++i)
    if (format[i] == '%' &&
        std::string_view("aAbBdHIjmMpSyY%").find(format[++i]) == std::string_view::npos)
      template_refused(str("the date format %", format[i], " is not supported"));
  const std::time_t now = static_cast<std::time_t>(*now_unix_s_);
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::array<char, 16 * kFormatBytesMax> buffer{};
  const std::size_t size = std::strftime(buffer.data(), buffer.size(), format.c_str(), &parts);
  return text(std::string(buffer.data(), size));
}

Value Interpreter::evaluate_compare(const Expression& e, TemplateFrame& frame) {
  Value left = evaluate(*e.operands[0], frame);
  for (std::size_t i = 0; i < e.names.size(); ++i) {
    Value right = evaluate(*e.operands[i + 1], frame);
    line_ = e.line;
    const std::string& op = e.names[i];
    charge(op.ends_with("in") || weight_of(right) < weight_of(left) ? right : left);
    bool holds = false;
    if (op == "==" || op == "!=")
      holds = equals(left, right) == (op == "==");
    else if (op == "in" || op == "not in")
      holds = contains(right, left) == (op == "in");
    else if (op == "<" || op == ">")
      holds = op == "<" ? compare(left, right) < 0 : compare(left, right) > 0;
    else
      holds = op == "<=" ? compare(left, right) <= 0 : compare(left, right) >= 0;
    if (!holds) return Value::boolean(false);
    left = std::move(right);
  }
  return Value::boolean(true);
}

Value Interpreter::evaluate_concat(const Expression& e, TemplateFrame& frame) {
  std::string joined;
  for (const ExpressionPtr& part : e.operands) joined += printed(evaluate(*part, frame));
  return text(std::move(joined));
}

Value Interpreter::evaluate_binary(const Expression& e, TemplateFrame& frame) {
  const Value left = evaluate(*e.operands[0], frame);
  const Value right = evaluate(*e.operands[1], frame);
  line_ = e.line;
  return apply_binary(*this, e.text, left, right);
}

Value Interpreter::evaluate_negate(const Expression& e, TemplateFrame& frame) {
  const Value value = evaluate(*e.operands[0], frame);
  const bool negate = e.kind == ExpressionKind::kNegate;
  std::int64_t i = 0;
  if (value.as_int(i)) {
    if (negate && i == INT64_MIN) template_refused("a number over 64 bits");
    return Value::integer(negate ? -i : i);
  }
  double d = 0;
  if (!value.as_number(d)) template_invalid(str("a ", type_name(value), " cannot be negated"));
  return Value(negate ? -d : d);
}

}  // namespace tandem::worker::text
