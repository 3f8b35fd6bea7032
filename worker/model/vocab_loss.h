// The head and its loss where one fused op cannot do it: the vocabulary is cut over
// tensor-parallel ranks, or the head's own gradient is wanted. In chunks of rows, so that [T, V]
// never exists.
#pragma once

#include "worker/model/base_weights.h"
#include "worker/model/context.h"

namespace tandem::worker::model {

/// What the embedding ops are told about this rank's part of the vocabulary; all zero: the whole.
struct VocabShard {
  std::int64_t first = 0, vocab = 0;
};
VocabShard vocab_shard(const BaseWeights& base);

/// A chunk of logits has at least, and a multiple of, so many rows; at most so many that it is of
/// logits_chunk_bytes().
inline constexpr std::int64_t kVocabLossRowsMin = 16;

struct VocabLossArgs {
  /// [T, C] cd, the same on every tensor-parallel rank, or this rank's rows of it [T / ranks, C]
  kernels::Tensor hidden;
  kernels::Tensor labels;  ///< [T] i32, of the whole vocabulary
  float gradient_scale;
  kernels::Tensor loss, correct;  ///< [T] f32; correct may be undefined
  kernels::Tensor dhidden;        ///< cd, of hidden's rows, overwritten; undefined: evaluation
  kernels::Tensor dhead;          ///< [V of this rank, C] f32, accumulated; undefined: frozen
};
void vocab_loss(Context& ctx, const BaseWeights& base, const VocabLossArgs& args);

}  // namespace tandem::worker::model
