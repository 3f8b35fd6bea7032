#include "worker/text/template_parser.h"

#include "worker/text/chat_template.h"
#include "worker/text/template_lexer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <initializer_list>

namespace tandem::worker::text {
namespace {

class Parser {
 public:
  explicit Parser(std::vector<TemplateToken> tokens) : tokens_(std::move(tokens)) {}
  Block run() { return parse_block({}); }

 private:
  // Tokens.
  [[nodiscard]] const TemplateToken& token() const { return tokens_[at_]; }
  [[nodiscard]] bool is_op(std::string_view op) const {
    return token().kind == TokenKind::kOperator && token().text == op;
  }
  [[nodiscard]] bool is_name(std::string_view name) const {
    return token().kind == TokenKind::kName && token().text == name;
  }
  bool skip_op(std::string_view op) { return is_op(op) && next(); }
  bool skip_name(std::string_view name) { return is_name(name) && next(); }
  bool next() {
    if (token().kind != TokenKind::kEnd) ++at_;
    return true;
  }
  [[noreturn]] void fail(const std::string& what) const {
    template_invalid(str("line ", token().line, ": ", what));
  }
  [[noreturn]] void refuse(const std::string& what) const {
    template_refused(str("line ", token().line, ": ", what, " is not supported"));
  }
  [[nodiscard]] std::string shown() const;
  void expect_op(std::string_view op) {
    if (!skip_op(op)) fail(str("expected \"", op, "\", found ", shown()));
  }
  void expect_name(std::string_view name) {
    if (!skip_name(name)) fail(str("expected \"", name, "\", found ", shown()));
  }
  std::string take_name();

  // Statements.
  Block parse_block(std::initializer_list<std::string_view> ends);
  std::unique_ptr<Statement> parse_statement();
  void end_tag() {
    if (token().kind != TokenKind::kBlockEnd) fail(str("expected \"%}\", found ", shown()));
    next();
  }
  /// The body up to {% end %}, whose tag is consumed.
  Block body_until(std::string_view end) {
    end_tag();
    Block body = parse_block({end});
    expect_name(end);
    end_tag();
    return body;
  }
  void parse_if(Statement& statement);
  void parse_for(Statement& statement);
  void parse_set(Statement& statement);
  void parse_macro(Statement& statement);
  std::vector<std::string> parse_targets();

  // Expressions, from the loosest binding to the tightest (Jinja2, parser.py).
  ExpressionPtr parse_tuple(bool with_condition = true);
  ExpressionPtr parse_conditional();
  ExpressionPtr parse_or();
  ExpressionPtr parse_and();
  ExpressionPtr parse_not();
  ExpressionPtr parse_compare();
  ExpressionPtr parse_sum();
  ExpressionPtr parse_concat();
  ExpressionPtr parse_product();
  ExpressionPtr parse_power();
  ExpressionPtr parse_unary(bool with_filters = true);
  ExpressionPtr parse_primary();
  ExpressionPtr parse_name();
  ExpressionPtr parse_postfix(ExpressionPtr node);
  ExpressionPtr parse_filters(ExpressionPtr node);
  ExpressionPtr parse_test(ExpressionPtr node);
  ExpressionPtr parse_attribute(ExpressionPtr node);
  ExpressionPtr parse_call(ExpressionPtr function);
  ExpressionPtr parse_subscript(ExpressionPtr node);
  ExpressionPtr parse_list();
  ExpressionPtr parse_dict();
  ExpressionPtr parse_number();
  void parse_arguments(Expression& call);

  ExpressionPtr make(ExpressionKind kind) const {
    auto node = std::make_unique<Expression>();
    node->kind = kind;
    node->line = token().line;
    return node;
  }
  void adopt(Expression& parent, ExpressionPtr child) const;
  ExpressionPtr binary(std::string op, ExpressionPtr left, ExpressionPtr right,
                       ExpressionKind kind = ExpressionKind::kBinary) const;
  void note_depth(Expression& parent, const Expression& child) const {
    parent.depth = std::max(parent.depth, child.depth + 1);
    if (parent.depth > kTemplateExpressionDepthMax)
      template_refused(str("line ", parent.line, ": an expression is nested more than ",
                           kTemplateExpressionDepthMax, " deep"));
  }

  /// Counts the nesting of blocks and of parenthesised expressions while it lives.
  struct Nested {
    explicit Nested(Parser& owner) : parser(owner) {
      if (++parser.nesting_ > kTemplateNestingMax)
        template_refused(
            str("line ", parser.token().line, ": nested more than ", kTemplateNestingMax, " deep"));
    }
    ~Nested() { --parser.nesting_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;
    Parser& parser;
  };

  std::vector<TemplateToken> tokens_;
  std::size_t at_ = 0;
  int nesting_ = 0;
  int loops_ = 0;
};

std::string Parser::shown() const {
  switch (token().kind) {
    case TokenKind::kEnd:
      return "the end of the template";
    case TokenKind::kBlockEnd:
      return "\"%}\"";
    case TokenKind::kVariableEnd:
      return "\"}}\"";
    case TokenKind::kData:
    case TokenKind::kBlockBegin:
    case TokenKind::kVariableBegin:
      return "text";
    default:
      return str("\"", token().text.substr(0, 40), "\"");
  }
}

std::string Parser::take_name() {
  if (token().kind != TokenKind::kName) fail(str("expected a name, found ", shown()));
  std::string name = token().text;
  next();
  return name;
}

void Parser::adopt(Expression& parent, ExpressionPtr child) const {
  if (child) note_depth(parent, *child);
  parent.operands.push_back(std::move(child));
}

ExpressionPtr Parser::binary(std::string op, ExpressionPtr left, ExpressionPtr right,
                             ExpressionKind kind) const {
  auto node = make(kind);
  node->line = left->line;
  node->text = std::move(op);
  adopt(*node, std::move(left));
  adopt(*node, std::move(right));
  return node;
}

// --- statements -------------------------------------------------------------------------------

Block Parser::parse_block(std::initializer_list<std::string_view> ends) {
  const Nested nested(*this);
  Block block;
  while (true) {
    auto statement = std::make_unique<Statement>();
    statement->line = token().line;
    switch (token().kind) {
      case TokenKind::kEnd:
        if (ends.size() > 0) fail(str("{% ", *(ends.end() - 1), " %} is missing"));
        return block;
      case TokenKind::kData:
        statement->text = token().text;
        next();
        break;
      case TokenKind::kVariableBegin:
        next();
        statement->kind = StatementKind::kOutput;
        statement->expression = parse_tuple();
        if (token().kind != TokenKind::kVariableEnd) fail(str("expected \"}}\", found ", shown()));
        next();
        break;
      default:
        next();  // {%
        for (const std::string_view end : ends)
          if (is_name(end)) return block;
        statement = parse_statement();
    }
    block.push_back(std::move(statement));
  }
}

std::unique_ptr<Statement> Parser::parse_statement() {
  auto statement = std::make_unique<Statement>();
  statement->line = token().line;
  const std::string keyword = take_name();
  if (keyword == "if") {
    parse_if(*statement);
  } else if (keyword == "for") {
    parse_for(*statement);
  } else if (keyword == "set") {
    parse_set(*statement);
  } else if (keyword == "macro") {
    parse_macro(*statement);
  } else if (keyword == "generation") {
    statement->kind = StatementKind::kGeneration;
    statement->bodies.push_back(body_until("endgeneration"));
  } else if (keyword == "break" || keyword == "continue") {
    if (loops_ == 0) fail(str("{% ", keyword, " %} outside a loop"));
    statement->kind = keyword == "break" ? StatementKind::kBreak : StatementKind::kContinue;
    end_tag();
  } else if (keyword.starts_with("end") || keyword == "else" || keyword == "elif") {
    fail(str("{% ", keyword, " %} without its beginning"));
  } else {
    template_refused(str("line ", statement->line, ": the tag {% ", keyword.substr(0, 40),
                         " %} is not supported"));
  }
  return statement;
}

void Parser::parse_if(Statement& statement) {
  statement.kind = StatementKind::kIf;
  statement.branches.push_back(parse_tuple(false));
  end_tag();
  while (true) {
    statement.bodies.push_back(parse_block({"elif", "else", "endif"}));
    if (!skip_name("elif")) break;
    statement.branches.push_back(parse_tuple(false));
    end_tag();
  }
  if (skip_name("else"))
    statement.bodies.push_back(body_until("endif"));
  else {
    expect_name("endif");
    end_tag();
  }
}

std::vector<std::string> Parser::parse_targets() {
  const bool parenthesised = skip_op("(");
  std::vector<std::string> targets{take_name()};
  while (skip_op(",")) {
    if (token().kind != TokenKind::kName) break;
    targets.push_back(take_name());
  }
  if (parenthesised) expect_op(")");
  for (const std::string& name : targets)
    if (name == "loop" || name == "true" || name == "false" || name == "none" || name == "not")
      fail(str("\"", name, "\" cannot be assigned"));
  return targets;
}

void Parser::parse_for(Statement& statement) {
  statement.kind = StatementKind::kFor;
  statement.targets = parse_targets();
  expect_name("in");
  statement.expression = parse_tuple(false);
  if (skip_name("if")) statement.condition = parse_conditional();
  if (is_name("recursive")) refuse("a recursive loop");
  end_tag();
  ++loops_;
  statement.bodies.push_back(parse_block({"else", "endfor"}));
  --loops_;
  if (skip_name("else"))
    statement.bodies.push_back(body_until("endfor"));
  else {
    expect_name("endfor");
    end_tag();
  }
}

void Parser::parse_set(Statement& statement) {
  statement.kind = StatementKind::kSet;
  statement.targets = parse_targets();
  if (skip_op(".")) {
    if (statement.targets.size() != 1) fail("only one attribute can be set at a time");
    statement.text = statement.targets[0];
    statement.targets = {take_name()};
    expect_op("=");
    statement.expression = parse_tuple();
    end_tag();
    return;
  }
  if (skip_op("=")) {
    statement.expression = parse_tuple();
    end_tag();
    return;
  }
  if (is_op("|")) refuse("a filter on {% set %}");
  if (statement.targets.size() != 1) fail(str("expected \"=\", found ", shown()));
  statement.kind = StatementKind::kSetBlock;
  statement.bodies.push_back(body_until("endset"));
}

void Parser::parse_macro(Statement& statement) {
  statement.kind = StatementKind::kMacro;
  statement.macro = std::make_unique<MacroStatement>();
  MacroStatement& macro = *statement.macro;
  macro.name = take_name();
  expect_op("(");
  while (!is_op(")")) {
    if (!macro.parameters.empty()) expect_op(",");
    macro.parameters.push_back(take_name());
    if (skip_op("="))
      macro.defaults.push_back(parse_conditional());
    else if (!macro.defaults.empty())
      fail("a parameter without a default follows one with a default");
  }
  expect_op(")");
  const int loops = std::exchange(loops_, 0);
  macro.body = body_until("endmacro");
  loops_ = loops;
}

// --- expressions ------------------------------------------------------------------------------

ExpressionPtr Parser::parse_tuple(bool with_condition) {
  const auto item = [&] { return with_condition ? parse_conditional() : parse_or(); };
  ExpressionPtr first = item();
  if (!is_op(",")) return first;
  auto tuple = make(ExpressionKind::kTuple);
  adopt(*tuple, std::move(first));
  while (skip_op(",")) {
    if (token().kind == TokenKind::kBlockEnd || token().kind == TokenKind::kVariableEnd ||
        is_op(")"))
      break;
    adopt(*tuple, item());
  }
  return tuple;
}

ExpressionPtr Parser::parse_conditional() {
  const Nested nested(*this);
  ExpressionPtr value = parse_or();
  while (skip_name("if")) {
    auto node = make(ExpressionKind::kConditional);
    adopt(*node, std::move(value));
    adopt(*node, parse_or());
    adopt(*node, skip_name("else") ? parse_conditional() : nullptr);
    value = std::move(node);
  }
  return value;
}

ExpressionPtr Parser::parse_or() {
  ExpressionPtr left = parse_and();
  while (skip_name("or")) left = binary("or", std::move(left), parse_and(), ExpressionKind::kOr);
  return left;
}

ExpressionPtr Parser::parse_and() {
  ExpressionPtr left = parse_not();
  while (skip_name("and")) left = binary("and", std::move(left), parse_not(), ExpressionKind::kAnd);
  return left;
}

ExpressionPtr Parser::parse_not() {
  if (!is_name("not")) return parse_compare();
  const Nested nested(*this);
  auto node = make(ExpressionKind::kNot);
  next();
  adopt(*node, parse_not());
  return node;
}

ExpressionPtr Parser::parse_compare() {
  static constexpr std::array<std::string_view, 6> kComparisons{"==", "!=", "<", "<=", ">", ">="};
  ExpressionPtr left = parse_sum();
  ExpressionPtr node;
  while (true) {
    std::string op;
    if (token().kind == TokenKind::kOperator &&
        std::find(kComparisons.begin(), kComparisons.end(), token().text) != kComparisons.end()) {
      op = token().text;
      next();
    } else if (skip_name("in")) {
      op = "in";
    } else if (is_name("not") && tokens_[at_ + 1].kind == TokenKind::kName &&
               tokens_[at_ + 1].text == "in") {
      next();
      next();
      op = "not in";
    } else {
      return node ? std::move(node) : std::move(left);
    }
    if (!node) {
      node = make(ExpressionKind::kCompare);
      adopt(*node, std::move(left));
    }
    node->names.push_back(std::move(op));
    adopt(*node, parse_sum());
  }
}

ExpressionPtr Parser::parse_sum() {
  ExpressionPtr left = parse_concat();
  while (is_op("+") || is_op("-")) {
    std::string op = token().text;
    next();
    left = binary(std::move(op), std::move(left), parse_concat());
  }
  return left;
}

ExpressionPtr Parser::parse_concat() {
  ExpressionPtr first = parse_product();
  if (!is_op("~")) return first;
  auto node = make(ExpressionKind::kConcat);
  adopt(*node, std::move(first));
  while (skip_op("~")) adopt(*node, parse_product());
  return node;
}

ExpressionPtr Parser::parse_product() {
  ExpressionPtr left = parse_power();
  while (is_op("*") || is_op("/") || is_op("//") || is_op("%")) {
    std::string op = token().text;
    next();
    left = binary(std::move(op), std::move(left), parse_power());
  }
  return left;
}

ExpressionPtr Parser::parse_power() {
  ExpressionPtr left = parse_unary();
  while (skip_op("**")) left = binary("**", std::move(left), parse_unary());
  return left;
}

ExpressionPtr Parser::parse_unary(bool with_filters) {
  ExpressionPtr node;
  if (is_op("-") || is_op("+")) {
    const Nested nested(*this);
    node = make(is_op("-") ? ExpressionKind::kNegate : ExpressionKind::kPlus);
    next();
    adopt(*node, parse_unary(false));
  } else {
    node = parse_primary();
  }
  node = parse_postfix(std::move(node));
  return with_filters ? parse_filters(std::move(node)) : std::move(node);
}

ExpressionPtr Parser::parse_primary() {
  switch (token().kind) {
    case TokenKind::kName:
      return parse_name();
    case TokenKind::kString: {
      auto node = make(ExpressionKind::kConstant);
      std::string text;
      for (; token().kind == TokenKind::kString; next()) text += token().text;
      node->value = Value::text(std::move(text));
      return node;
    }
    case TokenKind::kInteger:
    case TokenKind::kFloat:
      return parse_number();
    default:
      break;
  }
  if (is_op("[")) return parse_list();
  if (is_op("{")) return parse_dict();
  if (!is_op("(")) fail(str("expected an expression, found ", shown()));
  auto empty = make(ExpressionKind::kTuple);
  next();
  if (skip_op(")")) return empty;
  ExpressionPtr inner = parse_tuple();
  expect_op(")");
  return inner;
}

ExpressionPtr Parser::parse_name() {
  auto node = make(ExpressionKind::kConstant);
  const std::string name = take_name();
  if (name == "true" || name == "True") {
    node->value = Value::boolean(true);
  } else if (name == "false" || name == "False") {
    node->value = Value::boolean(false);
  } else if (name == "none" || name == "None") {
    node->value = Value::none();
  } else {
    static constexpr std::array<std::string_view, 6> kReserved{"if", "else", "in",
                                                               "is", "and",  "or"};
    if (std::find(kReserved.begin(), kReserved.end(), name) != kReserved.end())
      fail(str("expected an expression, found \"", name, "\""));
    node->kind = ExpressionKind::kName;
    node->text = name;
  }
  return node;
}

ExpressionPtr Parser::parse_number() {
  auto node = make(ExpressionKind::kConstant);
  const std::string& text = token().text;
  if (token().kind == TokenKind::kFloat) {
    node->value = Value(std::strtod(text.c_str(), nullptr));
  } else {
    std::int64_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size())
      refuse(str("the number ", text.substr(0, 40)));
    node->value = Value::integer(number);
  }
  next();
  return node;
}

ExpressionPtr Parser::parse_list() {
  auto node = make(ExpressionKind::kList);
  next();
  while (!is_op("]")) {
    if (!node->operands.empty()) {
      expect_op(",");
      if (is_op("]")) break;
    }
    adopt(*node, parse_conditional());
  }
  next();
  return node;
}

ExpressionPtr Parser::parse_dict() {
  auto node = make(ExpressionKind::kDict);
  next();
  while (!is_op("}")) {
    if (!node->operands.empty()) {
      expect_op(",");
      if (is_op("}")) break;
    }
    adopt(*node, parse_conditional());
    expect_op(":");
    adopt(*node, parse_conditional());
  }
  next();
  return node;
}

ExpressionPtr Parser::parse_postfix(ExpressionPtr node) {
  while (true) {
    if (is_op(".")) {
      node = parse_attribute(std::move(node));
    } else if (is_op("[")) {
      node = parse_subscript(std::move(node));
    } else if (is_op("(")) {
      node = parse_call(std::move(node));
    } else {
      return node;
    }
  }
}

ExpressionPtr Parser::parse_call(ExpressionPtr function) {
  auto call = make(ExpressionKind::kCall);
  adopt(*call, std::move(function));
  parse_arguments(*call);
  return call;
}

ExpressionPtr Parser::parse_attribute(ExpressionPtr object) {
  next();
  auto node = make(ExpressionKind::kAttribute);
  if (token().kind == TokenKind::kInteger) {
    node->kind = ExpressionKind::kSubscript;
    adopt(*node, std::move(object));
    adopt(*node, parse_number());
    return node;
  }
  node->text = take_name();
  adopt(*node, std::move(object));
  return node;
}

ExpressionPtr Parser::parse_subscript(ExpressionPtr object) {
  auto node = make(ExpressionKind::kSubscript);
  next();
  adopt(*node, std::move(object));
  const auto at_end = [&] { return is_op(":") || is_op("]"); };
  adopt(*node, is_op(":") ? nullptr : parse_conditional());
  if (is_op(",")) refuse("a subscript of several values");
  if (is_op(":")) {
    node->kind = ExpressionKind::kSlice;
    for (int part = 0; part < 2; ++part)
      adopt(*node, skip_op(":") && !at_end() ? parse_conditional() : nullptr);
  }
  expect_op("]");
  return node;
}

void Parser::parse_arguments(Expression& call) {
  next();
  bool first = true;
  while (!is_op(")")) {
    if (!first) {
      expect_op(",");
      if (is_op(")")) break;
    }
    first = false;
    if (is_op("*") || is_op("**")) refuse("unpacking arguments with *");
    if (token().kind == TokenKind::kName && tokens_[at_ + 1].kind == TokenKind::kOperator &&
        tokens_[at_ + 1].text == "=") {
      std::string name = take_name();
      next();
      ExpressionPtr value = parse_conditional();
      note_depth(call, *value);
      call.keywords.emplace_back(std::move(name), std::move(value));
    } else {
      if (!call.keywords.empty()) fail("a positional argument follows a named one");
      adopt(call, parse_conditional());
    }
  }
  next();
}

ExpressionPtr Parser::parse_filters(ExpressionPtr node) {
  while (true) {
    if (skip_op("|")) {
      auto filter = make(ExpressionKind::kFilter);
      filter->text = take_name();
      if (is_op(".")) refuse("a filter name with a dot");
      adopt(*filter, std::move(node));
      if (is_op("(")) parse_arguments(*filter);
      node = std::move(filter);
    } else if (skip_name("is")) {
      node = parse_test(std::move(node));
    } else if (is_op("(")) {
      node = parse_call(std::move(node));
    } else {
      return node;
    }
  }
}

ExpressionPtr Parser::parse_test(ExpressionPtr object) {
  auto node = make(ExpressionKind::kTest);
  node->negated = skip_name("not");
  node->text = take_name();
  adopt(*node, std::move(object));
  if (is_op("(")) {
    parse_arguments(*node);
    return node;
  }
  const bool value_follows =
      token().kind == TokenKind::kString || token().kind == TokenKind::kInteger ||
      token().kind == TokenKind::kFloat || is_op("[") || is_op("{") ||
      (token().kind == TokenKind::kName && !is_name("else") && !is_name("or") && !is_name("and") &&
       !is_name("if") && !is_name("in") && !is_name("not"));
  if (value_follows) {
    if (is_name("is")) fail("tests cannot be chained with \"is\"");
    adopt(*node, parse_postfix(parse_primary()));
  }
  return node;
}

}  // namespace

Block parse_template(std::string_view source) {
  return Parser(lex_template(source)).run();
}

bool has_generation(const Block& block) {
  return std::any_of(block.begin(), block.end(), [](const auto& statement) {
    return statement->kind == StatementKind::kGeneration ||
           (statement->macro && has_generation(statement->macro->body)) ||
           std::any_of(statement->bodies.begin(), statement->bodies.end(), has_generation);
  });
}

}  // namespace tandem::worker::text
