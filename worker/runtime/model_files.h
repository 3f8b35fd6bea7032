// Finds a base model's files on this host: at the path it was added with, or in the
// content-addressed cache, fetched by digest when it is neither. Files are hashed once per host and
// trusted afterwards while inode, size and time stay the same. Task thread.
#pragma once

#include "protocol/messages.h"
#include "worker/runtime/bulk_client.h"

#include <string>

namespace tandem::worker::runtime {

/// The path to load from. Errors: corrupt_error (a file at the path has other content, naming both
/// digests), those of the transfer.
Result<std::string> locate_model(const protocol::ModelRef& model, const std::string& data_directory,
                                 BulkClient& bulk);

}  // namespace tandem::worker::runtime
