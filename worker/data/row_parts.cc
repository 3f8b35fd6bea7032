#include "worker/data/row_parts.h"

#include <algorithm>
#include <array>

namespace tandem::worker::data {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<std::string_view, 8> kMessageKeys{
    "role",         "content",           "weight",   "name", "tool_calls",
    "tool_call_id", "reasoning_content", "tool_name"};

Result<std::string> take_text(const Json& row, const char* key, const std::string& where) {
  const auto found = row.find(key);
  if (found == row.end() || found->is_null()) return std::string();
  if (!found->is_string())
    return invalid_error(
        str(where, ": \"", key, "\" has to be a text, not a ", found->type_name()));
  return found->get<std::string>();
}

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n") == std::string_view::npos;
}

/// OpenAI's "weight": 0 keeps an assistant's turn out of the loss.
Result<bool> take_weight(const Json& message, bool assistant, const std::string& where) {
  const auto found = message.find("weight");
  if (found == message.end() || found->is_null()) return assistant;
  if (!found->is_number() || (*found != 0 && *found != 1))
    return invalid_error(str(where, ": \"weight\" has to be 0 or 1"));
  if (!assistant && *found == 1)
    return invalid_error(str(where, ": \"weight\" 1 on a message that is not the assistant's"));
  return assistant && *found == 1;
}

const char* sharegpt_role(const std::string& from) {
  if (from == "human" || from == "user") return "user";
  if (from == "gpt" || from == "assistant" || from == "model" || from == "chatgpt")
    return "assistant";
  if (from == "system") return "system";
  if (from == "tool" || from == "observation" || from == "function_response") return "tool";
  return nullptr;
}

/// "Assistant" or "gpt" would be rendered, and never trained.
Status check_role(const std::string& role, const std::string& where) {
  std::string lower = role;
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  const char* means = sharegpt_role(lower);
  if (means == nullptr || role == means || std::string_view(means) == "tool") return {};
  return invalid_error(
      str(where, ": unknown role \"", role.substr(0, 40), "\"; did you mean ", means));
}

/// OpenAI's content parts, [{"type":"text","text":...}], as one text: most templates write content
/// as it comes, and would train the list's spelling.
Result<std::string> join_parts(const Json& parts, const std::string& where) {
  std::string text;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Json type = parts[i].is_object() ? parts[i].value("type", Json()) : Json();
    const auto found = parts[i].is_object() ? parts[i].find("text") : parts[i].end();
    if (type != "text" || found == parts[i].end() || !found->is_string())
      return invalid_error(
          str(where, ": part ", i + 1, " of \"content\" is of type ",
              type.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 40),
              "; only {\"type\":\"text\",\"text\":...} is supported"));
    text += found->get_ref<const std::string&>();
  }
  return text;
}

Status add_message(const Json& message, std::size_t index, Conversation& conversation,
                   const std::string& where) {
  const std::string at = str(where, ", message ", index + 1);
  if (!message.is_object()) return invalid_error(str(at, ": has to be an object"));
  for (const auto& [key, value] : message.items()) {
    if (std::find(kMessageKeys.begin(), kMessageKeys.end(), key) != kMessageKeys.end()) continue;
    const std::string nearest = nearest_name(std::string_view(key).substr(0, 40), kMessageKeys);
    return invalid_error(str(at, ": unknown key \"", key.substr(0, 40), "\"",
                             nearest.empty() ? "; remove it" : "; did you mean ", nearest));
  }
  const auto role = message.find("role");
  if (role == message.end() || !role->is_string() || *role == "")
    return invalid_error(str(at, ": \"role\" has to be a text"));
  TANDEM_RETURN_IF_ERROR(check_role(role->get<std::string>(), at));
  const bool assistant = *role == "assistant";
  const auto content = message.find("content");
  const bool calls = message.contains("tool_calls");
  const bool has_content =
      content != message.end() && (content->is_string() || content->is_array());
  if (!has_content && !(assistant && calls))
    return invalid_error(str(at, ": \"content\" has to be a text"));
  TANDEM_ASSIGN_OR_RETURN(const bool trained, take_weight(message, assistant, at));
  Json kept = message;
  kept.erase("weight");
  if (content != message.end() && content->is_array()) {
    TANDEM_ASSIGN_OR_RETURN(kept["content"], join_parts(*content, at));
  }
  conversation.messages.push_back(std::move(kept));
  conversation.trained.push_back(trained);
  return Status::ok_status();
}

Status add_messages(const Json& list, const char* key, Conversation& conversation,
                    const std::string& where) {
  if (!list.is_array() || list.empty())
    return invalid_error(str(where, ": \"", key, "\" has to be a list of messages, not empty"));
  if (list.size() + conversation.trained.size() > kMessagesMax)
    return invalid_error(str(where, ": more than ", kMessagesMax, " messages"));
  for (std::size_t i = 0; i < list.size(); ++i)
    TANDEM_RETURN_IF_ERROR(add_message(list[i], i, conversation, where));
  return Status::ok_status();
}

Conversation empty_conversation(const Json& row) {
  Conversation conversation;
  conversation.messages = Json::array();
  if (row.contains("tools") && !row["tools"].empty()) conversation.tools = row["tools"];
  return conversation;
}

void add_plain(Conversation& conversation, const char* role, std::string content, bool trained) {
  conversation.messages.push_back({{"role", role}, {"content", std::move(content)}});
  conversation.trained.push_back(trained);
}

Result<RowParts> from_messages(const Json& row, const std::string& where) {
  Conversation conversation = empty_conversation(row);
  TANDEM_RETURN_IF_ERROR(add_messages(row["messages"], "messages", conversation, where));
  return RowParts(std::move(conversation));
}

Result<RowParts> from_prompt(const Json& row, const std::string& where) {
  if (row["prompt"].is_array() || row["completion"].is_array()) {
    Conversation conversation = empty_conversation(row);
    TANDEM_RETURN_IF_ERROR(add_messages(row["prompt"], "prompt", conversation, where));
    std::fill(conversation.trained.begin(), conversation.trained.end(), false);
    TANDEM_RETURN_IF_ERROR(add_messages(row["completion"], "completion", conversation, where));
    return RowParts(std::move(conversation));
  }
  PlainText plain;
  TANDEM_ASSIGN_OR_RETURN(plain.prompt, take_text(row, "prompt", where));
  TANDEM_ASSIGN_OR_RETURN(plain.completion, take_text(row, "completion", where));
  return RowParts(std::move(plain));
}

/// The wording that the Alpaca data set was trained with (tatsu-lab/stanford_alpaca, train.py).
std::string alpaca_prompt(const std::string& instruction, const std::string& input) {
  if (input.empty())
    return str(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n",
        instruction, "\n\n### Response:\n");
  return str(
      "Below is an instruction that describes a task, paired with an input that provides further "
      "context. Write a response that appropriately completes the request.\n\n### Instruction:\n",
      instruction, "\n\n### Input:\n", input, "\n\n### Response:\n");
}

Result<RowParts> from_alpaca(const Json& row, bool chat, const std::string& where) {
  TANDEM_ASSIGN_OR_RETURN(const std::string instruction, take_text(row, "instruction", where));
  TANDEM_ASSIGN_OR_RETURN(const std::string input, take_text(row, "input", where));
  TANDEM_ASSIGN_OR_RETURN(const std::string system, take_text(row, "system", where));
  TANDEM_ASSIGN_OR_RETURN(std::string output, take_text(row, "output", where));
  if (!chat) {
    if (!system.empty())
      return invalid_error(str(where, ": \"system\" needs a model with a chat template"));
    return RowParts(PlainText{alpaca_prompt(instruction, input), std::move(output)});
  }
  Conversation conversation = empty_conversation(row);
  if (!system.empty()) add_plain(conversation, "system", system, false);
  add_plain(conversation, "user", input.empty() ? instruction : instruction + "\n\n" + input,
            false);
  add_plain(conversation, "assistant", std::move(output), true);
  return RowParts(std::move(conversation));
}

Result<RowParts> from_sharegpt(const Json& row, const std::string& where) {
  Conversation conversation = empty_conversation(row);
  TANDEM_ASSIGN_OR_RETURN(const std::string system, take_text(row, "system", where));
  if (!system.empty()) add_plain(conversation, "system", system, false);
  const Json& turns = row["conversations"];
  if (!turns.is_array() || turns.empty() || turns.size() > kMessagesMax)
    return invalid_error(
        str(where, ": \"conversations\" has to be a list of 1 to ", kMessagesMax, " turns"));
  for (std::size_t i = 0; i < turns.size(); ++i) {
    const std::string at = str(where, ", turn ", i + 1);
    if (!turns[i].is_object()) return invalid_error(str(at, ": has to be an object"));
    for (const auto& [key, value] : turns[i].items())
      if (key != "from" && key != "value" && key != "weight")
        return invalid_error(str(at, ": unknown key \"", key.substr(0, 40),
                                 "\"; a turn has "
                                 "\"from\", \"value\" and \"weight\""));
    TANDEM_ASSIGN_OR_RETURN(const std::string from, take_text(turns[i], "from", at));
    const char* role = sharegpt_role(from);
    if (role == nullptr)
      return invalid_error(str(at, ": unknown \"from\" \"", from.substr(0, 40),
                               "\" (known: human, gpt, system, tool)"));
    TANDEM_ASSIGN_OR_RETURN(std::string value, take_text(turns[i], "value", at));
    TANDEM_ASSIGN_OR_RETURN(const bool trained,
                            take_weight(turns[i], std::string_view(role) == "assistant", at));
    add_plain(conversation, role, std::move(value), trained);
  }
  return RowParts(std::move(conversation));
}

}  // namespace

Result<RowParts> take_apart(Format format, const Json& row, bool chat, const std::string& where) {
  switch (format) {
    case Format::kMessages:
      return from_messages(row, where);
    case Format::kPromptCompletion:
      return from_prompt(row, where);
    case Format::kAlpaca:
      return from_alpaca(row, chat, where);
    case Format::kShareGpt:
      return from_sharegpt(row, where);
    case Format::kText: {
      TANDEM_ASSIGN_OR_RETURN(std::string text, take_text(row, "text", where));
      return RowParts(PlainText{"", std::move(text)});
    }
  }
  return internal_error("an unknown format");
}

std::int64_t count_empty_answers(const RowParts& parts) {
  if (const auto* plain = std::get_if<PlainText>(&parts))
    return is_blank(plain->completion) ? 1 : 0;
  const auto& conversation = std::get<Conversation>(parts);
  std::int64_t empty = 0;
  for (std::size_t i = 0; i < conversation.trained.size(); ++i) {
    const Json& message = conversation.messages[i];
    if (!conversation.trained[i] || message.contains("tool_calls")) continue;
    const auto content = message.find("content");
    if (content != message.end() && content->is_string() &&
        is_blank(content->get_ref<const std::string&>()))
      ++empty;
  }
  return empty;
}

}  // namespace tandem::worker::data
