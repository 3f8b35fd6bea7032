// What a row says, apart from its format: a conversation, or plain text with the part to learn.
// Internal to worker/data.
#pragma once

#include "worker/data/dataset.h"

#include <nlohmann/json.hpp>

#include <string>
#include <variant>
#include <vector>

namespace tandem::worker::data {

/// Most messages of one conversation.
inline constexpr std::size_t kMessagesMax = 4096;

struct Conversation {
  nlohmann::ordered_json messages;  ///< as the chat template gets them
  nlohmann::ordered_json tools;     ///< null: none
  std::vector<bool> trained;        ///< one per message; true only for the assistant's
};

struct PlainText {
  std::string prompt;      ///< not trained
  std::string completion;  ///< trained
};

using RowParts = std::variant<Conversation, PlainText>;

/// Takes a row of a known format apart. `chat` says whether the model has a chat template, which
/// alpaca rows then use. Invalid: wrong types, unknown keys, of ShareGPT unknown roles, of messages
/// another spelling of user, assistant or system ("Assistant", "gpt"), naming them. What other
/// roles messages have is between them and the template; they are not trained.
Result<RowParts> take_apart(Format format, const nlohmann::ordered_json& row, bool chat,
                            const std::string& where);

/// Answers (assistant turns, completions, outputs) that are empty or blank.
std::int64_t count_empty_answers(const RowParts& parts);

}  // namespace tandem::worker::data
