// The places that BaseWeights::load reads from. Every source is immutable: any thread may read.
#pragma once

#include "storage/gguf.h"
#include "storage/safetensors.h"
#include "worker/model/base_weights.h"

#include <memory>

namespace tandem::worker::model {

/// Tensors of a Hugging Face folder (f32, bf16 or f16), already opened and checked by storage.
std::unique_ptr<TensorSource> make_safetensors_source(storage::Safetensors tensors);

/// A GGUF file: names translated, values dequantized to f32 row by row, the rows of q and k put
/// back into the Hugging Face order. invalid_error: a q or k of which the heads do not divide the
/// rows.
Result<std::unique_ptr<TensorSource>> make_gguf_source(storage::Gguf file,
                                                       const ModelConfig& config);

/// Weights from a seed: matrices normal with deviation 1/sqrt(i), norms near 1, biases small.
/// Tests and benches.
std::unique_ptr<TensorSource> make_random_source(const ModelConfig& config, std::uint64_t seed);

/// All zeros without a byte of memory: for the meta backend, which reads nothing.
std::unique_ptr<TensorSource> make_zero_source();

}  // namespace tandem::worker::model
