// Models on their way out: a base's texts beside new weights, and a folder's files as blobs. Any
// thread.
#pragma once

#include "worker/model/model_loader.h"
#include "worker/runtime/adapter_codec.h"

#include <string>

namespace tandem::worker::runtime {

/// Writes config.json (naming `dtype`), tokenizer and chat template of a base at `path`, a Hugging
/// Face folder or a GGUF file, into the Hugging Face folder `folder`, which exists. Errors: refused
/// (a GGUF model that config.json cannot describe), and those of the file system.
Status write_model_texts(const model::LoadedModel& base, const std::string& path,
                         const std::string& folder, DType dtype);

/// A folder's files as blobs of 16 MiB, and the manifest that names them (kind model, each file a
/// u8 tensor): what a full fine-tune publishes. Files stay mapped while it lives.
Result<PackedObject> pack_model(const std::string& folder);

}  // namespace tandem::worker::runtime
