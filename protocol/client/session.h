// Private to the client library: the connection's state machine and the thread that runs it.
// Operations are opened and closed by calling threads; the I/O thread sends what is due, takes what
// arrives, and hands replies over through each operation's queue. One mutex guards all of it; it is
// never held while a callback runs or while the thread waits for the network.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/client/client.h"
#include "protocol/codec.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <variant>

namespace tandem::protocol::client {

/// One generation or call that is under way. All fields are guarded by the session's mutex.
struct Operation {
  std::variant<Generate, Call> request;
  bool streaming = false;  // a call that has many replies
  TimeMs opened_ms = 0;
  TimeMs deadline_ms = 0;  // of a generation; 0: none

  std::deque<ServerMessage> unread;  // what the caller has not taken yet
  bool ended = false;                // the last reply is in `unread` (or was taken)
  std::optional<Status> failed;      // ended by this side
  bool resync = false;  // replies were dropped; ask again when the caller has caught up
  std::condition_variable changed;

  TimeMs due_ms = 0;     // when to send it (again); 0: at once
  TimeMs repeat_ms = 0;  // the next silence that makes it due
  TimeMs busy_since_ms = -1;
  int repeats = 0;                            // without progress
  std::int64_t next_index = 0, last_seq = 0;  // how far a generation, a stream came

  [[nodiscard]] const std::string& id() const;
};

class Session {
 public:
  Session(std::unique_ptr<ClientEndpoint> endpoint, const ClientOptions& options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Waits for the first hello's answer.
  Status wait_ready();
  /// Refused when too many are open, or the connection can never work.
  Result<std::shared_ptr<Operation>> open(std::variant<Generate, Call> request, bool streaming);
  /// The next reply; waits until `deadline_ms` (0: for ever). Nothing: the stream has ended.
  Result<std::optional<ServerMessage>> next(Operation& operation, TimeMs deadline_ms);
  /// The caller wants no more; tells the coordinator when it has not ended.
  void close(const std::shared_ptr<Operation>& operation);
  /// Ends the generation of this id with kCancelled.
  void cancel(const RequestId& id);

  [[nodiscard]] ServerHello server() const;
  [[nodiscard]] TimeMs now() const { return clock_.now_ms(); }

 private:
  void run();
  /// Cancels that were said last go out before the connection is closed.
  void say_farewells();
  [[nodiscard]] TimeMs wait_ms() const;
  // All below with mutex_ held, on the I/O thread.
  void follow_connection();
  void say_hello();
  void take(const Envelope& envelope);
  void take_hello(const ServerHello& hello);
  void take_chunk(GenerateChunk chunk);
  void take_reply(CallReply reply);
  bool retry_busy(Operation& operation, const Status& status, std::int64_t retry_after_ms);
  void deliver(Operation& operation, ServerMessage message, bool last);
  void watch_silence();
  void send_due();
  bool send_operation(Operation& operation);
  void fail(Operation& operation, Status status);
  void make_due(Operation& operation, TimeMs when_ms);
  [[nodiscard]] Status unreachable() const;

  const std::unique_ptr<ClientEndpoint> endpoint_;
  const ClientOptions options_;
  SystemClock clock_;

  mutable std::mutex mutex_;
  std::condition_variable ready_changed_;
  std::map<std::string, std::shared_ptr<Operation>> open_;
  std::deque<ClientMessage> farewells_;  // cancels: lost ones do no harm
  std::uint64_t connections_seen_ = 0;
  bool ready_ = false;           // hello answered on this connection
  std::optional<Status> fatal_;  // the coordinator will not talk to this client
  Version saying_;               // version of the next hello
  Status trouble_;               // of the connection, while there is none
  ServerHello server_;
  TimeMs hello_sent_ms_ = -1, away_since_ms_ = 0, heard_ms_ = 0, pinged_ms_ = 0;
  TimeMs last_farewell_ms_ = -1;
  TimeMs next_due_ms_ = 0;

  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace tandem::protocol::client
