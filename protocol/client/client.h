// The client library: everything an application or the CLI asks of a coordinator. It says hello,
// repeats what was lost, goes on after the coordinator was restarted, and drops repeats, so that a
// caller sees each token and each reply once or an error that says what to do.
//
// One I/O thread inside owns the connection. Any thread may call; calls block their own thread, and
// callbacks run on the thread that called. Errors are Statuses as the coordinator gave them, plus
// kUnavailable (no coordinator there; the message names the endpoint), kTimeout and kBusy (retried
// until ClientOptions::busy_ms_max passed).
#pragma once

#include "protocol/base/result.h"
#include "protocol/client/bulk_transfer.h"
#include "protocol/messages.h"
#include "protocol/transport.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace tandem::protocol::client {

inline constexpr std::size_t kOpenOperationsMax = 4096;    ///< calls and generations at one time
inline constexpr std::size_t kUnreadRepliesMax = 1 << 12;  ///< of one operation; then asked again
inline constexpr int kRepeatsWithoutProgressMax = 50;

struct ClientOptions {
  std::string endpoint;       ///< "ipc:///DIR/NAME" or "tcp://HOST:PORT"
  std::string bulk_endpoint;  ///< "": asked of the coordinator (status) at the first transfer
  std::string key_file;       ///< needed for tcp: the owner's key file with secret and server
  std::string program = "tandem-client/0.1.0";
  // Times in milliseconds, each scaled by TANDEM_TIME_SCALE.
  TimeMs connect_ms = 5'000;     ///< connect(): until the coordinator's hello
  TimeMs reconnect_ms = 30'000;  ///< an open operation outlasts a coordinator that is away so long
  TimeMs repeat_ms = 5'000;      ///< a call without any reply is sent again
  TimeMs busy_ms_max = 60'000;   ///< total wait on "busy, retry after"
  /// While it is true, whoever waits for an answer gets kCancelled within a tenth of a second, also
  /// when nothing comes (a signal handler may set it). Null: nobody interrupts.
  const std::atomic<bool>* interrupted = nullptr;
};

struct CallOptions {
  TimeMs timeout_ms = 60'000;   ///< 0: none
  std::string idempotency_key;  ///< "": a random one; give your own to repeat a call later
};

/// All of an answer.
struct Generation {
  RequestId id;
  std::string text;
  std::vector<std::int32_t> tokens;
  std::vector<TokenLogprob> logprobs;
  std::vector<float> prompt_logprobs;  ///< where the request asked for them
  FinishReason finish = FinishReason::kNone;
  Usage usage;
  Digest model, adapter;
  bool cached = false;
  std::int64_t queue_us = 0, first_token_us = 0;
};

/// Each part of an answer as it comes, in order, without repeats. False: cancel the rest.
using OnChunk = std::function<bool(const GenerateChunk& chunk)>;
/// Each reply of a streaming call. False: no more of them.
using OnReply = std::function<bool(const std::string& result_json)>;

class Client {
 public:
  /// Connects and waits for the coordinator's hello. kUnavailable when nobody answers within
  /// connect_ms; kRefused when the versions do not fit or the key is not accepted.
  static Result<std::unique_ptr<Client>> connect(const ClientOptions& options);
  /// The same over given endpoints (tests; `bulk` may be null when nothing is transferred).
  static Result<std::unique_ptr<Client>> connect(std::unique_ptr<ClientEndpoint> endpoint,
                                                 std::unique_ptr<ClientEndpoint> bulk,
                                                 const ClientOptions& options);
  /// Open operations of other threads end with kCancelled; they must have returned before.
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  /// Runs one generation to its end. An empty id is replaced by a random one. Repeats itself with
  /// the same id and the next token's index when the connection or the coordinator was lost.
  /// kCancelled after cancel() or when on_chunk said so. The text so far came through on_chunk.
  Result<Generation> generate(Generate request, const OnChunk& on_chunk = {});
  /// Ends a running generate() with this id (another thread's). Unknown: nothing happens.
  void cancel(const RequestId& id);

  /// One method of the table in schema/client.capnp; params_json is an object. The result's JSON.
  Result<std::string> call(const std::string& method, const std::string& params_json,
                           const CallOptions& options = {});
  /// A streaming method (job.watch, job.logs): every reply once (known by its "seq", which an
  /// "after" in the parameters skips), also over reconnects, until the coordinator ends the stream,
  /// on_reply says false, or the time-out (default: none) passes.
  Status stream(const std::string& method, const std::string& params_json, const OnReply& on_reply,
                const CallOptions& options = {0, ""});

  /// Content-addressed chunks: upload files, fetch blobs.
  Result<BulkTransfer*> bulk();

  [[nodiscard]] ServerHello server() const;  ///< what the coordinator said last
  [[nodiscard]] Version version() const;     ///< spoken on this connection

  struct State;

 private:
  explicit Client(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tandem::protocol::client
