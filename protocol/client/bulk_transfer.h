// Chunks of at most 16 MiB to and from the coordinator's store, by SHA-256. Everything can be
// repeated: a lost reply is asked for again, and a chunk that is there already is not sent. One
// transfer at a time: calls from several threads wait for each other.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/digest.h"
#include "protocol/base/result.h"
#include "protocol/messages.h"
#include "protocol/transport.h"

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

namespace tandem::protocol::client {

inline constexpr std::int64_t kChunkBytes = kDigestLeafBytes;

/// What data.add and adapter.import want to know of an upload.
struct Upload {
  std::string id;  ///< the pin under which garbage collection spares its chunks
  Digest root;     ///< content root of all bytes
  std::int64_t bytes = 0;
  std::vector<Digest> chunks;
};

/// Bytes moved so far, of all.
using OnProgress = std::function<void(std::int64_t done, std::int64_t total)>;

struct BulkOptions {
  std::string endpoint_name;   ///< for messages
  TimeMs repeat_ms = 10'000;   ///< a request without a reply is sent again
  TimeMs give_up_ms = 60'000;  ///< without any reply: kUnavailable
};

class BulkTransfer {
 public:
  BulkTransfer(std::unique_ptr<ClientEndpoint> endpoint, BulkOptions options);

  /// Which of these the coordinator has, in order. Any number of digests.
  Result<std::vector<bool>> has(const std::vector<Digest>& digests);
  /// Stores one chunk (1 byte to 16 MiB); durable when ok.
  Status put(std::span<const std::byte> chunk, const std::string& pin);
  /// One chunk, its digest verified.
  Result<Bytes> get(const Digest& digest);
  /// A registered model's file by its content root, verified, to a new file.
  Status get_content(const Digest& root, const std::string& path);

  /// A file by chunks; those that are there already are not sent. kInvalid: cannot be read, or
  /// empty.
  Result<Upload> put_file(const std::string& path, const OnProgress& on_progress = {});
  /// Bytes from memory, alike.
  Result<Upload> put_bytes(std::span<const std::byte> bytes, const OnProgress& on_progress = {});

 private:
  struct Answer {
    BlobReply reply;
    Bytes payload;
  };
  Result<Answer> ask(BulkRequest request, std::span<const std::byte> payload);
  Status put_known(const Digest& digest, std::span<const std::byte> chunk, const std::string& pin);

  const std::unique_ptr<ClientEndpoint> endpoint_;
  const BulkOptions options_;
  std::mutex mutex_;  // one request under way
  std::uint64_t next_call_;
};

}  // namespace tandem::protocol::client
