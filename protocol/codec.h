// Messages to bytes and back: Cap'n Proto, the only place that knows it (with the record codec).
// Decoding treats every byte as hostile: frame size, traversal, nesting, list and text lengths are
// bounded, enum values checked, texts are UTF-8, exceptions of the library end here as kCorrupt.
// Pure functions; any thread.
#pragma once

#include "protocol/base/result.h"
#include "protocol/messages.h"

#include <cstdint>
#include <span>
#include <vector>

namespace tandem::protocol {

using Bytes = std::vector<std::byte>;

/// Never fails. A Status message is made UTF-8 and cut to kStatusTextBytesMax; all else travels as
/// it is, and the receiver refuses what is over a limit (ask check_encodable() first about what a
/// user typed).
Bytes encode(const ClientMessage& message);
Bytes encode(const ServerMessage& message);
Bytes encode(const WorkerMessage& message);
Bytes encode(const ControlMessage& message);
Bytes encode(const BulkRequest& message);
Bytes encode(const BlobReply& message);

/// Longest Status message that travels.
inline constexpr std::int64_t kStatusTextBytesMax = 16 << 10;

/// Ok when the receiver would accept the message; kInvalid with field, limit and value when not.
Status check_encodable(const ClientMessage& message);

/// What became of decoded frames; the caller owns it (one per socket, say) and reports it.
struct DecodeCounters {
  std::uint64_t accepted = 0;
  std::uint64_t too_large = 0;   ///< the frame is longer than its kind allows
  std::uint64_t malformed = 0;   ///< not a message: truncated, cyclic, too deep, random
  std::uint64_t unknown = 0;     ///< a message or enum value that this version does not know
  std::uint64_t over_limit = 0;  ///< a text, list or number outside the limits of messages.h
  std::uint64_t bad_text = 0;    ///< a text that is not UTF-8
  [[nodiscard]] std::uint64_t refused() const {
    return too_large + malformed + unknown + over_limit + bad_text;
  }
};

/// Each: kCorrupt with what is wrong (field, limit, value), counted in `counters` when given.
Result<ClientMessage> decode_client(std::span<const std::byte> frame,
                                    DecodeCounters* counters = nullptr);
Result<ServerMessage> decode_server(std::span<const std::byte> frame,
                                    DecodeCounters* counters = nullptr);
Result<WorkerMessage> decode_worker(std::span<const std::byte> frame,
                                    DecodeCounters* counters = nullptr);
Result<ControlMessage> decode_control(std::span<const std::byte> frame,
                                      DecodeCounters* counters = nullptr);
Result<BulkRequest> decode_bulk(std::span<const std::byte> frame,
                                DecodeCounters* counters = nullptr);
Result<BlobReply> decode_blob_reply(std::span<const std::byte> frame,
                                    DecodeCounters* counters = nullptr);

}  // namespace tandem::protocol
