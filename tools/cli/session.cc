#include "tools/cli/session.h"

#include <atomic>
#include <csignal>
#include <filesystem>
#include <iostream>

namespace tandem::tools {
namespace {

std::atomic<bool> g_interrupted{false};
void on_signal(int) {
  g_interrupted = true;
}
void handle(bool ending, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART | static_cast<int>(SA_RESETHAND);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP})
    if (ending || signal == SIGINT) ::sigaction(signal, &action, nullptr);
}

constexpr TimeMs kConnectMs = 1500;  ///< a person waits; a coordinator that is there answers in one

/// Parameters as they travel; text that is not UTF-8 cannot.
Result<std::string> to_text(const std::string& method, const Json& params) {
  try {
    return params.dump();
  } catch (const Json::exception&) {
    return invalid_error(str(method, ": a name or text on the command line is not valid UTF-8"));
  }
}

Result<Json> parse_reply(const std::string& method, const std::string& text) {
  Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded())
    return corrupt_error(str("the coordinator answered ", method, " with malformed JSON"));
  return json;
}

}  // namespace

Interruptible::Interruptible(bool ending) : ending_(ending) {
  g_interrupted = false;
  handle(ending_, on_signal);
}
Interruptible::~Interruptible() {
  handle(ending_, SIG_DFL);
}
bool Interruptible::interrupted() {
  return g_interrupted;
}

void Session::print_json(const Json& value) {
  std::cout << value.dump() << "\n";
  printed_json_ = true;
}

Result<protocol::client::Client*> Session::client() {
  if (!client_) {
    protocol::client::ClientOptions options;
    options.endpoint = settings_.endpoint("clients");
    options.bulk_endpoint = settings_.get("coordinator").empty() ? settings_.endpoint("bulk")
                                                                 : settings_.get("listen_bulk");
    options.key_file = settings_.get("key_file");
    options.program = "tandem-cli/" TANDEM_VERSION;
    options.connect_ms = kConnectMs;
    options.interrupted = &g_interrupted;
    TANDEM_ASSIGN_OR_RETURN(client_, protocol::client::Client::connect(options));
  }
  return client_.get();
}

Result<Json> Session::call(const std::string& method, const Json& params) {
  TANDEM_ASSIGN_OR_RETURN(const std::string text, to_text(method, params));
  TANDEM_ASSIGN_OR_RETURN(auto* const connected, client());
  TANDEM_ASSIGN_OR_RETURN(const std::string reply, connected->call(method, text));
  return parse_reply(method, reply);
}

Status Session::stream(const std::string& method, const Json& params,
                       const std::function<bool(const Json&)>& on_event) {
  TANDEM_ASSIGN_OR_RETURN(const std::string text, to_text(method, params));
  TANDEM_ASSIGN_OR_RETURN(auto* const connected, client());
  return connected->stream(method, text, [&](const std::string& reply) {
    const auto event = parse_reply(method, reply);
    return event.ok() && on_event(*event);
  });
}

Result<protocol::client::BulkTransfer*> Session::bulk() {
  TANDEM_ASSIGN_OR_RETURN(auto* const connected, client());
  return connected->bulk();
}

Result<Json> Session::manifest(const std::string& adapter) {
  TANDEM_ASSIGN_OR_RETURN(Json shown, call("adapter.manifest", {{"adapter", adapter}}));
  if (shown.value("manifest", "").empty()) {
    TANDEM_ASSIGN_OR_RETURN(const Digest digest, Digest::parse(shown.value("digest", "")));
    TANDEM_ASSIGN_OR_RETURN(auto* const transfer, bulk());
    TANDEM_ASSIGN_OR_RETURN(const auto bytes, transfer->get(digest));
    shown["manifest"] = std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  return shown;
}

Result<Json> Session::upload_file(const std::string& path) {
  if (!std::filesystem::exists(path)) return not_found_error(str("no file ", path));
  TANDEM_ASSIGN_OR_RETURN(auto* const transfer, bulk());
  TANDEM_ASSIGN_OR_RETURN(const auto upload, transfer->put_file(path));
  Json chunks = Json::array();
  for (const Digest& chunk : upload.chunks) chunks.push_back(chunk.hex());
  return Json{{"digest", upload.root.hex()},
              {"bytes", upload.bytes},
              {"chunks", chunks},
              {"upload", upload.id}};
}

}  // namespace tandem::tools
