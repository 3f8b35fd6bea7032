// A model whose files lie in the blob store, as a full fine-tune publishes it: what it is named by,
// read from its chunks. Belongs on a background thread: it reads every byte.
//
// The publish's manifest is of kind model and lists files, not weights: a tensor of dtype u8 for
// each, named like the file in a Hugging Face folder. From these the identity is made exactly as of
// a folder on disk, so that an exported model which is added again is the same model.
#pragma once

#include "coordinator/effects.h"
#include "protocol/base/result.h"
#include "storage/blob_store.h"

namespace tandem::coordinator {

/// Errors: invalid or corrupt (the list, config.json, a weights' file), refused (the family),
/// not_found (a chunk that is not durable).
Result<ModelHashed> describe_stored_model(const std::string& files_manifest,
                                          storage::BlobStore& blobs);

}  // namespace tandem::coordinator
