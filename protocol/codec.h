// Messages to bytes and back: Cap'n Proto, the only place that knows it (with the record codec).
// Decoding treats every byte as hostile: frame size, traversal, nesting, list and text lengths are
// bounded, enum values checked, exceptions of the library end here as kCorrupt. Pure functions; any
// thread.
#pragma once

#include "protocol/base/result.h"
#include "protocol/messages.h"

#include <span>
#include <vector>

namespace tandem::protocol {

using Bytes = std::vector<std::byte>;

Bytes encode(const ClientMessage& message);
Bytes encode(const ServerMessage& message);
Bytes encode(const WorkerMessage& message);
Bytes encode(const ControlMessage& message);
Bytes encode(const BulkRequest& message);
Bytes encode(const BlobReply& message);

Result<ClientMessage> decode_client(std::span<const std::byte> frame);
Result<ServerMessage> decode_server(std::span<const std::byte> frame);
Result<WorkerMessage> decode_worker(std::span<const std::byte> frame);
Result<ControlMessage> decode_control(std::span<const std::byte> frame);
Result<BulkRequest> decode_bulk(std::span<const std::byte> frame);
Result<BlobReply> decode_blob_reply(std::span<const std::byte> frame);

}  // namespace tandem::protocol
