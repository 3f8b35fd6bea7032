// Messages with every field set to something that is not its default, from a seed. One function per
// direction; `kind` is the message's index in its variant.
#pragma once

#include "protocol/base/random.h"
#include "protocol/messages.h"

#include <cstddef>
#include <variant>

namespace tandem::protocol {

ClientMessage random_client_message(std::size_t kind, Random& random);
ServerMessage random_server_message(std::size_t kind, Random& random);
WorkerMessage random_worker_message(std::size_t kind, Random& random);
ControlMessage random_control_message(std::size_t kind, Random& random);
BulkRequest random_bulk_request(std::size_t kind, Random& random);
BlobReply random_blob_reply(Random& random);

inline constexpr std::size_t kClientKinds = std::variant_size_v<ClientMessage>;
inline constexpr std::size_t kServerKinds = std::variant_size_v<ServerMessage>;
inline constexpr std::size_t kWorkerKinds = std::variant_size_v<WorkerMessage>;
inline constexpr std::size_t kControlKinds = std::variant_size_v<ControlMessage>;
inline constexpr std::size_t kBulkKinds = std::variant_size_v<BulkRequest>;

}  // namespace tandem::protocol
