// Finds a base model's files on this host: at the path it was added with, or in the
// content-addressed cache, fetched by digest when it is neither, by one process at a time. Files
// are hashed once per host and trusted afterwards while inode, size and time stay the same. Task
// thread.
#pragma once

#include "protocol/messages.h"
#include "worker/runtime/bulk_client.h"

#include <string>

namespace tandem::worker::runtime {

/// The path to load from. Errors: corrupt_error (a file at the path has other content, naming both
/// digests), those of the transfer.
Result<std::string> locate_model(const protocol::ModelRef& model, const std::string& data_directory,
                                 BulkClient& bulk);

/// Whether the model's files lie at `path`, with the content they were added with; hashes all of
/// them. Any thread. Errors: corrupt_error as above.
Result<bool> model_is_at(const protocol::ModelRef& model, const std::string& path);

/// Removes copies of models (folders and files named by digest) from DATA/cache/models, the one
/// that was used longest ago first, until the disk has `free_bytes`; not `kept` and not what was
/// used within kModelSpareS: somebody may be reading it. Who needs one again fetches it again.
void trim_model_cache(const std::string& models, const Digest& kept, std::int64_t free_bytes);
/// The same until a tenth of the disk is free.
void trim_model_cache(const std::string& models, const Digest& kept);

inline constexpr std::int64_t kModelSpareS = 3600;

}  // namespace tandem::worker::runtime
