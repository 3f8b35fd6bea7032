// A complete tiny model on disk, for tests that start real processes: a Hugging Face folder with
// random weights, a byte-level tokenizer without merges and a ChatML template; and data sets
// that it can read.
#pragma once

#include <cstdint>
#include <string>

namespace tandem::test {

/// Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json into `folder`
/// (made when missing): width 64, four heads over two kv heads, 260 tokens, context 512; `family`:
/// "llama", "mistral", "qwen2" or "qwen3". A function of what is given.
void write_tiny_model(const std::string& folder, std::uint64_t seed, std::int64_t layers = 2,
                      const std::string& family = "llama");

/// Writes `rows` short chat rows as JSON lines; a function of `seed`.
void write_tiny_dataset(const std::string& path, int rows, std::uint64_t seed);

}  // namespace tandem::test
