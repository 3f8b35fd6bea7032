// Models that are real in everything but what they say: random weights of a known shape and a
// tokenizer of single bytes. For benches and tests, where nothing can be downloaded.
#pragma once

#include "worker/model/model_loader.h"

#include <string>

namespace tandem::tools {

/// A byte-level tokenizer without merges: 256 bytes, <|im_start|> (256) and <|im_end|> (257), and a
/// ChatML template.
worker::model::TokenizerFiles byte_tokenizer();

/// Writes a model of the Llama family as a Hugging Face folder (made when missing): its weights,
/// rounded to bf16, and byte_tokenizer(). All processors fill the file, which is not synced: a
/// crash of the machine may lose it. Errors: a folder that cannot be written, a full disk.
Status write_model(const std::string& folder, const worker::model::ModelConfig& config,
                   const worker::model::TensorSource& source);

}  // namespace tandem::tools
