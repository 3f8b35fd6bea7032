// Content-addressed bytes to and from the coordinator, by digest. Blocks its thread (the engine's
// task thread) and outlasts a coordinator that is away: a call is sent again until it is answered,
// the caller's deadline passes, or cancel() is called. Putting a chunk twice is harmless, so
// repeats need no care.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/messages.h"
#include "protocol/transport.h"

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace tandem::worker::runtime {

/// Bytes with their name; the bytes are the caller's.
struct BlobView {
  Digest digest;
  std::span<const std::byte> bytes;
};

class BulkClient {
 public:
  class Upload;
  BulkClient(std::unique_ptr<protocol::ClientEndpoint> endpoint, const Clock& clock);

  /// Makes every blob durable at the coordinator. What is large asks first which are missing; what
  /// is small is sent at once, which takes no longer than the answer.
  /// `deadline_ms` 0: for as long as it takes. Errors: kTimeout, kCancelled, or what the
  /// coordinator said (full disk).
  Status put(std::span<const BlobView> blobs, const std::string& pin, TimeMs deadline_ms = 0);
  /// The blobs, in order. not_found_error names the first that the coordinator does not have;
  /// corrupt_error when bytes do not match their digest.
  Result<std::vector<std::vector<std::byte>>> get(std::span<const Digest> digests,
                                                  TimeMs deadline_ms = 0);
  /// Copies a model file (known by its content root) to `path`, in 16 MiB pieces, and verifies it.
  Status fetch_file(const Digest& root, const std::string& path, TimeMs deadline_ms = 0);
  /// Ends a waiting call and all later ones with kCancelled. Any thread.
  void cancel() { cancelled_ = true; }
  [[nodiscard]] bool cancelled() const { return cancelled_; }

 private:
  struct Call {
    protocol::BulkRequest request;
    std::vector<std::span<const std::byte>> parts;  ///< of the payload, one after another
    std::int64_t bytes = 0;                         ///< of all parts
    protocol::BlobReply reply;
    std::vector<std::byte> data;
    bool done = false;
    TimeMs sent_ms = -1;
  };
  /// Gives the calls their numbers, one after another.
  void number(std::vector<Call>& calls);
  /// Until every call is answered. Their numbers are the newest.
  Status run(std::vector<Call>& calls, TimeMs deadline_ms);
  /// For each blob whether the coordinator has it.
  Result<std::vector<bool>> ask(std::span<const BlobView> blobs, TimeMs deadline_ms);
  /// False when the socket had no room for one of them.
  bool send_due(std::span<Call> calls);

  std::unique_ptr<protocol::ClientEndpoint> endpoint_;
  const Clock& clock_;
  std::uint64_t next_call_ = 1;
  std::atomic<bool> cancelled_{false};
};

/// A put whose first bytes travel while the last are still being made. The client does nothing else
/// until finish(); blobs live until then.
class BulkClient::Upload {
 public:
  Upload(BulkClient& client, std::string pin) : client_(client), pin_(std::move(pin)) {}
  /// Small blobs travel together: one message and one commit for a stretch of an adapter, not one
  /// for each tensor. Sends what is complete; never waits.
  void add(const BlobView& blob);
  /// Sends all that was added so far; never waits.
  void send();
  /// Sends the rest and waits until all of it is durable. Errors as put().
  Status finish(TimeMs deadline_ms = 0);

 private:
  BulkClient& client_;
  const std::string pin_;
  std::vector<Call> calls_;
  bool open_ = false;  ///< the last call takes more
};

}  // namespace tandem::worker::runtime
