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
#include <vector>

namespace tandem::worker::runtime {

/// Bytes with their name; the bytes are the caller's.
struct BlobView {
  Digest digest;
  std::span<const std::byte> bytes;
};

class BulkClient {
 public:
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
  Status run(std::vector<Call>& calls, TimeMs deadline_ms);
  /// For each blob whether the coordinator has it.
  Result<std::vector<bool>> ask(std::span<const BlobView> blobs, TimeMs deadline_ms);
  void send_due(std::vector<Call>& calls, std::size_t& in_flight);

  std::unique_ptr<protocol::ClientEndpoint> endpoint_;
  const Clock& clock_;
  std::uint64_t next_call_ = 1;
  std::atomic<bool> cancelled_{false};
};

}  // namespace tandem::worker::runtime
