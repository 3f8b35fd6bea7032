// Models that are real in everything but what they say: random weights of a known shape and a
// tokenizer of single bytes. For benches and tests, where nothing can be downloaded.
#pragma once

#include "worker/model/model_loader.h"

#include <string>

namespace tandem::tools {

/// A byte-level tokenizer without merges: 256 bytes, <|im_start|> (256) and <|im_end|> (257), and a
/// ChatML template.
worker::model::TokenizerFiles byte_tokenizer();

}  // namespace tandem::tools
