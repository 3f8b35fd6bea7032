#include "tools/cli/session.h"

#include <filesystem>

namespace tandem::tools {
namespace {

constexpr TimeMs kConnectMs = 1500;  ///< a person waits; a coordinator that is there answers in one

Result<Json> parse_reply(const std::string& method, const std::string& text) {
  Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded())
    return corrupt_error(str("the coordinator answered ", method, " with malformed JSON"));
  return json;
}

}  // namespace

Result<protocol::client::Client*> Session::client() {
  if (!client_) {
    protocol::client::ClientOptions options;
    options.endpoint = settings_.endpoint("clients");
    options.bulk_endpoint = settings_.get("coordinator").empty() ? settings_.endpoint("bulk")
                                                                 : settings_.get("listen_bulk");
    options.key_file = settings_.get("key_file");
    options.program = "tandem-cli/" TANDEM_VERSION;
    options.connect_ms = kConnectMs;
    TANDEM_ASSIGN_OR_RETURN(client_, protocol::client::Client::connect(options));
  }
  return client_.get();
}

Result<Json> Session::call(const std::string& method, const Json& params) {
  TANDEM_ASSIGN_OR_RETURN(auto* const connected, client());
  TANDEM_ASSIGN_OR_RETURN(const std::string reply, connected->call(method, params.dump()));
  return parse_reply(method, reply);
}

Status Session::stream(const std::string& method, const Json& params,
                       const std::function<bool(const Json&)>& on_event) {
  TANDEM_ASSIGN_OR_RETURN(auto* const connected, client());
  return connected->stream(method, params.dump(), [&](const std::string& reply) {
    const auto event = parse_reply(method, reply);
    return event.ok() && on_event(*event);
  });
}

Result<protocol::client::BulkTransfer*> Session::bulk() {
  TANDEM_ASSIGN_OR_RETURN(auto* const connected, client());
  return connected->bulk();
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
