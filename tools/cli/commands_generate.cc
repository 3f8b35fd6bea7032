#include "tools/cli/commands.h"
#include "tools/cli/output.h"

#include <unistd.h>

#include <iostream>

namespace tandem::tools {
namespace {

const char* finish_name(protocol::FinishReason reason) {
  switch (reason) {
    case protocol::FinishReason::kStop:
      return "stop";
    case protocol::FinishReason::kLength:
      return "length";
    case protocol::FinishReason::kCancelled:
      return "cancelled";
    case protocol::FinishReason::kError:
      return "error";
    case protocol::FinishReason::kNone:
      break;
  }
  return "";
}

protocol::Generate to_request(const GenerateOptions& options) {
  protocol::Generate request;
  request.model = options.model;
  request.stream = options.stream;
  request.no_cache = options.no_cache;
  request.input.raw = options.raw;
  if (options.raw || options.system.empty()) {
    request.input.prompt = options.prompt;
  } else {
    request.input.messages = {{"system", options.system}, {"user", options.prompt}};
  }
  auto& sampling = request.sampling;
  sampling.max_tokens = options.max_tokens;
  if (options.temperature) sampling.temperature = static_cast<float>(*options.temperature);
  sampling.top_k = options.top_k;
  if (options.top_p) sampling.top_p = static_cast<float>(*options.top_p);
  if (options.min_p) sampling.min_p = static_cast<float>(*options.min_p);
  if (options.repetition_penalty)
    sampling.repetition_penalty = static_cast<float>(*options.repetition_penalty);
  sampling.seed = options.seed;
  sampling.stop = options.stop;
  sampling.logprobs = options.logprobs;
  sampling.ignore_eos = options.ignore_eos;
  return request;
}

Json logprobs_json(const std::vector<protocol::TokenLogprob>& logprobs) {
  Json list = Json::array();
  for (const auto& token : logprobs) {
    Json entry{{"token", token.token}, {"logprob", token.logprob}};
    for (const auto& [id, logprob] : token.top)
      entry["top"].push_back({{"token", id}, {"logprob", logprob}});
    list.push_back(std::move(entry));
  }
  return list;
}

/// The whole answer of one request, gathered from its chunks.
struct Answer {
  std::string text;
  std::vector<std::int32_t> tokens;
  std::vector<protocol::TokenLogprob> logprobs;
  protocol::GenerateChunk last;
  std::int64_t first_token_us = -1, total_us = 0;

  [[nodiscard]] Json to_json(const std::string& model) const {
    Json json{{"id", last.id.value},
              {"model", model},
              {"model_digest", last.model.hex()},
              {"adapter_digest", last.adapter.empty() ? Json(nullptr) : Json(last.adapter.hex())},
              {"text", text},
              {"tokens", tokens},
              {"finish_reason", finish_name(last.finish)},
              {"usage",
               {{"prompt_tokens", last.usage.prompt_tokens},
                {"completion_tokens", last.usage.completion_tokens},
                {"cached_prompt_tokens", last.usage.cached_prompt_tokens}}},
              {"cached", last.cached},
              {"first_token_ms", static_cast<double>(first_token_us) / 1000},
              {"total_ms", static_cast<double>(total_us) / 1000},
              {"coordinator_us", last.queue_us},
              {"engine_first_token_us", last.first_token_us}};
    if (!logprobs.empty()) json["logprobs"] = logprobs_json(logprobs);
    return json;
  }
};

/// Runs one request; `print` streams text to stdout as it comes. What came before an error is in
/// `answer`. `ending`: as Interruptible's.
Status generate(Session& session, protocol::Generate request, bool print, bool ending,
                Answer& answer) {
  TANDEM_ASSIGN_OR_RETURN(protocol::client::Client* const client, session.client());
  const std::int64_t begin = steady_ns();
  const Interruptible interruptible(ending);
  const auto generation =
      client->generate(std::move(request), [&](const protocol::GenerateChunk& chunk) {
        if (answer.first_token_us < 0 && !chunk.tokens.empty())
          answer.first_token_us = (steady_ns() - begin) / 1000;
        answer.text += chunk.text;
        answer.tokens.insert(answer.tokens.end(), chunk.tokens.begin(), chunk.tokens.end());
        answer.logprobs.insert(answer.logprobs.end(), chunk.logprobs.begin(), chunk.logprobs.end());
        if (print) std::cout << chunk.text << std::flush;
        if (chunk.finish != protocol::FinishReason::kNone) answer.last = chunk;
        return !Interruptible::interrupted();
      });
  answer.total_us = (steady_ns() - begin) / 1000;
  return generation.status();
}

}  // namespace

Status run_generate(Session& session, const GenerateOptions& options) {
  if (options.raw && !options.system.empty())
    return invalid_error("--system is for the chat template, which --raw leaves out; give one");
  GenerateOptions complete = options;
  if (complete.prompt.empty() && !::isatty(STDIN_FILENO))
    complete.prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  if (complete.prompt.empty())
    return invalid_error("tandem generate needs --prompt TEXT (or text on standard input)");
  Answer answer;
  TANDEM_RETURN_IF_ERROR(generate(session, to_request(complete), !session.json(), true, answer));
  if (session.json())
    std::cout << answer.to_json(options.model).dump() << "\n";
  else
    std::cout << "\n";
  if (answer.last.finish == protocol::FinishReason::kCancelled) return cancelled_error("cancelled");
  return {};
}

Status run_chat(Session& session, const GenerateOptions& options) {
  std::vector<protocol::ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({"system", options.system});
  const bool terminal = ::isatty(STDIN_FILENO) != 0;
  if (terminal && !session.json())
    std::cout << "Chatting with " << options.model
              << ". Ctrl-C stops an answer, an empty line or Ctrl-D ends.\n";
  while (true) {
    if (terminal && !session.json()) std::cout << "> " << std::flush;
    std::string line;
    if (!std::getline(std::cin, line) || line.empty()) break;
    messages.push_back({"user", line});
    protocol::Generate request = to_request(options);
    request.input.prompt.clear();
    request.input.messages = messages;
    Answer answer;
    const Status status = generate(session, std::move(request), !session.json(), !terminal, answer);
    // Ctrl-C at a terminal stops the answer; the conversation goes on with what came of it.
    const bool stopped = terminal && Interruptible::interrupted();
    if (!status.ok() && !stopped) return status;
    if (stopped) answer.last.finish = protocol::FinishReason::kCancelled;
    if (session.json())
      std::cout << answer.to_json(options.model).dump() << std::endl;
    else
      std::cout << "\n";
    if (stopped && answer.text.empty())
      messages.pop_back();  // nothing was said to this
    else
      messages.push_back({"assistant", answer.text});
  }
  return {};
}

}  // namespace tandem::tools
