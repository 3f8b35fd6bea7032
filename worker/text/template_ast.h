// The parsed form of a chat template. Internal to worker/text.
#pragma once

#include "worker/text/template_value.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace tandem::worker::text {

enum class ExpressionKind {
  kConstant,     ///< value
  kName,         ///< text
  kList,         ///< operands
  kTuple,        ///< operands
  kDict,         ///< operands: key, value, key, value, ...
  kAttribute,    ///< operands[0] . text
  kSubscript,    ///< operands[0] [ operands[1] ]
  kSlice,        ///< operands[0] [ operands[1] : operands[2] : operands[3] ], each may be null
  kCall,         ///< operands[0] ( operands[1...], keywords )
  kFilter,       ///< operands[0] | text ( operands[1...], keywords )
  kTest,         ///< operands[0] is text operands[1...]; negated: is not
  kNot,          ///< not operands[0]
  kNegate,       ///< - operands[0]
  kPlus,         ///< + operands[0]
  kBinary,       ///< operands[0] text operands[1]: + - * / // % **
  kAnd,          ///< operands[0] and operands[1]
  kOr,           ///< operands[0] or operands[1]
  kCompare,      ///< operands[0] names[0] operands[1] names[1] operands[2] ...
  kConcat,       ///< operands[0] ~ operands[1] ~ ...
  kConditional,  ///< operands[0] if operands[1] else operands[2] (may be null)
};

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;

struct Expression {
  ExpressionKind kind = ExpressionKind::kConstant;
  int line = 0;
  int depth = 1;  ///< of the tree below; bounded, because evaluation recurses
  bool negated = false;
  std::string text;
  Value value;
  std::vector<ExpressionPtr> operands;
  std::vector<std::string> names;
  std::vector<std::pair<std::string, ExpressionPtr>> keywords;
};

enum class StatementKind {
  kText,        ///< text
  kOutput,      ///< expression
  kIf,          ///< branches, bodies.back() is else when there is one more body than branches
  kFor,         ///< targets in expression if condition; bodies[0], bodies[1] (else)
  kSet,         ///< targets = expression, or text . targets[0] = expression for namespaces
  kSetBlock,    ///< targets[0] = what bodies[0] writes
  kMacro,       ///< macro
  kGeneration,  ///< bodies[0] is the assistant's text
  kBreak,
  kContinue,
};

struct Statement;
using Block = std::vector<std::unique_ptr<Statement>>;

/// {% macro name(parameters) %} body {% endmacro %}
struct MacroStatement {
  std::string name;
  std::vector<std::string> parameters;
  std::vector<ExpressionPtr> defaults;  ///< of the last parameters
  Block body;
};

struct Statement {
  StatementKind kind = StatementKind::kText;
  int line = 0;
  std::string text;
  ExpressionPtr expression, condition;
  std::vector<std::string> targets;
  std::vector<ExpressionPtr> branches;
  std::vector<Block> bodies;
  std::unique_ptr<MacroStatement> macro;
};

}  // namespace tandem::worker::text
