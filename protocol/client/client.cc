#include "protocol/client/client.h"

#include "protocol/base/ids.h"
#include "protocol/base/json_nesting.h"
#include "protocol/base/str.h"
#include "protocol/client/session.h"
#include "protocol/codec.h"
#include "protocol/version.h"
#include "protocol/zmq_transport.h"

#include <nlohmann/json.hpp>

#include <mutex>

namespace tandem::protocol::client {
namespace {

constexpr int kRequestIdDigits = 32, kCallIdDigits = 16;

/// Closes an operation on every way out.
class OpenOperation {
 public:
  OpenOperation(Session& session, std::shared_ptr<Operation> operation)
      : session_(session), operation_(std::move(operation)) {}
  ~OpenOperation() { session_.close(operation_); }
  OpenOperation(const OpenOperation&) = delete;
  OpenOperation& operator=(const OpenOperation&) = delete;
  Operation& operator*() { return *operation_; }

 private:
  Session& session_;
  std::shared_ptr<Operation> operation_;
};

void append(Generation& all, const GenerateChunk& chunk) {
  all.text += chunk.text;
  all.tokens.insert(all.tokens.end(), chunk.tokens.begin(), chunk.tokens.end());
  all.logprobs.insert(all.logprobs.end(), chunk.logprobs.begin(), chunk.logprobs.end());
  all.prompt_logprobs.insert(all.prompt_logprobs.end(), chunk.prompt_logprobs.begin(),
                             chunk.prompt_logprobs.end());
  if (!chunk.model.empty()) {
    all.model = chunk.model;
    all.adapter = chunk.adapter;
  }
  all.cached = all.cached || chunk.cached;
  if (chunk.finish == FinishReason::kNone) return;
  all.finish = chunk.finish;
  all.usage = chunk.usage;
  all.queue_us = chunk.queue_us;
  all.first_token_us = chunk.first_token_us;
}

Status outcome(const GenerateChunk& last) {
  if (!last.status.ok()) return last.status;
  if (last.finish == FinishReason::kCancelled)
    return cancelled_error(str("request ", last.id, " was cancelled"));
  return last.finish == FinishReason::kError ? internal_error("the engine gave no reason")
                                             : Status();
}

Status check_params(const std::string& method, const std::string& params_json) {
  if (json_nests_too_deep(params_json))
    return invalid_error(
        str(method, ": the parameters may nest at most ", kJsonNestingMax, " levels deep"));
  if (static_cast<std::int64_t>(params_json.size()) > kCallJsonBytesMax)
    return refused_error(str(method, ": the parameters take ", params_json.size(),
                             " bytes, and a call may have ", kCallJsonBytesMax));
  if (nlohmann::json::parse(params_json, nullptr, false).is_object()) return {};
  return invalid_error(str(method, ": the parameters must be a JSON object"));
}

}  // namespace

struct Client::State {
  ClientOptions options;
  KeyFile key;  // no name: none
  std::unique_ptr<ZmqContext> context;
  std::unique_ptr<Session> session;
  std::mutex bulk_mutex;  // guards bulk
  std::unique_ptr<BulkTransfer> bulk;

  Result<std::unique_ptr<ClientEndpoint>> dial(const std::string& endpoint, SocketLimits limits,
                                               const char* purpose) {
    ZmqClientOptions zmq;
    zmq.endpoint = endpoint;
    zmq.limits = limits;
    zmq.routing_id = make_routing_id(key.name.empty() ? "local" : key.name, purpose);
    if (!key.name.empty() && endpoint.starts_with("tcp://")) {  // a socket's file takes no keys
      zmq.keys = CurveKeyPair{key.public_key, key.secret_key};
      zmq.server_public_key = key.server_key;
    }
    return context->connect(zmq);
  }
  void set_bulk(std::unique_ptr<ClientEndpoint> endpoint, const std::string& name) {
    BulkOptions bulk_options;
    bulk_options.endpoint_name = name;
    bulk = std::make_unique<BulkTransfer>(std::move(endpoint), bulk_options);
  }
};

Client::Client(std::unique_ptr<State> state) : state_(std::move(state)) {}
Client::~Client() = default;

Result<std::unique_ptr<Client>> Client::connect(const ClientOptions& options) {
  auto state = std::make_unique<State>();
  state->options = options;
  if (!options.key_file.empty()) {
    TANDEM_ASSIGN_OR_RETURN(state->key, read_key_file(options.key_file));
    if (state->key.secret_key.empty() || state->key.server_key.empty())
      return invalid_error(
          str("key file ", options.key_file,
              ": a client needs its secret and server lines too (tandem key create "
              "writes them into the owner's file)"));
  }
  TANDEM_ASSIGN_OR_RETURN(state->context, ZmqContext::create());
  TANDEM_ASSIGN_OR_RETURN(auto endpoint,
                          state->dial(options.endpoint, SocketLimits::control(), "client"));
  state->session = std::make_unique<Session>(std::move(endpoint), options);
  TANDEM_RETURN_IF_ERROR(state->session->wait_ready());
  return std::unique_ptr<Client>(new Client(std::move(state)));
}

Result<std::unique_ptr<Client>> Client::connect(std::unique_ptr<ClientEndpoint> endpoint,
                                                std::unique_ptr<ClientEndpoint> bulk,
                                                const ClientOptions& options) {
  auto state = std::make_unique<State>();
  state->options = options;
  if (bulk != nullptr) state->set_bulk(std::move(bulk), options.bulk_endpoint);
  state->session = std::make_unique<Session>(std::move(endpoint), options);
  TANDEM_RETURN_IF_ERROR(state->session->wait_ready());
  return std::unique_ptr<Client>(new Client(std::move(state)));
}

Result<Generation> Client::generate(Generate request, const OnChunk& on_chunk) {
  if (request.id.empty()) request.id = RequestId(random_id("", kRequestIdDigits));
  TANDEM_RETURN_IF_ERROR(check_encodable(ClientMessage(request)));
  Generation all;
  all.id = request.id;
  TANDEM_ASSIGN_OR_RETURN(auto opened, state_->session->open(std::move(request), false));
  OpenOperation operation(*state_->session, std::move(opened));
  while (true) {
    TANDEM_ASSIGN_OR_RETURN(const auto message, state_->session->next(*operation, 0));
    TANDEM_CHECK(message.has_value(), "a generation ended without a last chunk");
    const auto& chunk = std::get<GenerateChunk>(*message);
    append(all, chunk);
    const bool go_on = !on_chunk || on_chunk(chunk);
    if (chunk.finish != FinishReason::kNone) {
      TANDEM_RETURN_IF_ERROR(outcome(chunk));
      return all;
    }
    if (!go_on) return cancelled_error(str("request ", all.id, " was cancelled by its caller"));
  }
}

void Client::cancel(const RequestId& id) {
  state_->session->cancel(id);
}

Result<std::string> Client::call(const std::string& method, const std::string& params_json,
                                 const CallOptions& options) {
  TANDEM_RETURN_IF_ERROR(check_params(method, params_json));
  Call request{random_id("call-", kCallIdDigits), options.idempotency_key, method, params_json};
  if (request.idempotency_key.empty()) request.idempotency_key = random_id("", kRequestIdDigits);
  TANDEM_RETURN_IF_ERROR(check_encodable(ClientMessage(request)));
  const TimeMs deadline =
      options.timeout_ms == 0 ? 0 : state_->session->now() + scaled_ms(options.timeout_ms);
  TANDEM_ASSIGN_OR_RETURN(auto opened, state_->session->open(std::move(request), false));
  OpenOperation operation(*state_->session, std::move(opened));
  TANDEM_ASSIGN_OR_RETURN(auto message, state_->session->next(*operation, deadline));
  TANDEM_CHECK(message.has_value(), "a call ended without a reply");
  auto& reply = std::get<CallReply>(*message);
  TANDEM_RETURN_IF_ERROR(reply.status);
  return std::move(reply.result_json);
}

Status Client::stream(const std::string& method, const std::string& params_json,
                      const OnReply& on_reply, const CallOptions& options) {
  TANDEM_RETURN_IF_ERROR(check_params(method, params_json));
  Call request{random_id("call-", kCallIdDigits), options.idempotency_key, method, params_json};
  TANDEM_RETURN_IF_ERROR(check_encodable(ClientMessage(request)));
  const TimeMs deadline =
      options.timeout_ms == 0 ? 0 : state_->session->now() + scaled_ms(options.timeout_ms);
  TANDEM_ASSIGN_OR_RETURN(auto opened, state_->session->open(std::move(request), true));
  OpenOperation operation(*state_->session, std::move(opened));
  while (true) {
    TANDEM_ASSIGN_OR_RETURN(const auto message, state_->session->next(*operation, deadline));
    if (!message.has_value()) return {};
    const auto& reply = std::get<CallReply>(*message);
    TANDEM_RETURN_IF_ERROR(reply.status);
    const bool empty_end = !reply.more && reply.result_json.empty();
    if (!empty_end && !on_reply(reply.result_json)) return {};
    if (!reply.more) return {};
  }
}

Result<BulkTransfer*> Client::bulk() {
  std::lock_guard lock(state_->bulk_mutex);
  if (state_->bulk != nullptr) return state_->bulk.get();
  std::string endpoint = state_->options.bulk_endpoint;
  if (endpoint.empty()) {
    TANDEM_ASSIGN_OR_RETURN(const std::string status, call("status", "{}"));
    const auto json = nlohmann::json::parse(status, nullptr, false);
    const auto pointer = nlohmann::json::json_pointer("/endpoints/bulk");
    if (!json.is_object() || !json.contains(pointer) || !json[pointer].is_string())
      return unavailable_error(str("the coordinator at ", state_->options.endpoint,
                                   " names no bulk endpoint in its status"));
    endpoint = json[pointer].get<std::string>();
  }
  if (state_->context == nullptr)
    return unavailable_error("this client was made without a bulk endpoint");
  TANDEM_ASSIGN_OR_RETURN(auto dialled, state_->dial(endpoint, SocketLimits::bulk(), "bulk"));
  state_->set_bulk(std::move(dialled), endpoint);
  return state_->bulk.get();
}

ServerHello Client::server() const {
  return state_->session->server();
}

Version Client::version() const {
  return state_->session->server().version;
}

}  // namespace tandem::protocol::client
