// A micro-batch on the device, in the activation arena: it dies with the caller's scope.
#pragma once

#include "worker/model/transformer.h"
#include "worker/train/batch_source.h"

namespace tandem::worker::train {

/// Tokens of a micro-batch are rounded up to a multiple of this with inert rows, so that few
/// different shapes exist (products are set up once per shape).
inline constexpr std::int64_t kTokenBucket = 64;
/// Of batches that are bounded below kTokenBucket.
inline constexpr std::int64_t kSmallBucket = 16;

struct DeviceBatch {
  model::TokenBatch tokens;  ///< T rows, all in one slot
  kernels::Tensor labels;    ///< [T] i32
  std::int64_t real_tokens = 0;
};

/// Rows of a micro-batch's device tensors: a multiple of `parts`, so that ranks can share them
/// equally (then plain collectives do; inert rows are there anyway).
std::int64_t device_rows(std::int64_t tokens, const BatchBounds& bounds, std::int64_t parts);

/// Uploads a micro-batch with all its rows in `slot` (-1: no adapter) of at most `rank_max`. Shapes
/// depend on the number of tokens, on `bounds` and on `parts` (of device_rows) alone.
DeviceBatch upload_batch(model::Context& ctx, const data::MicroBatch& batch,
                         const BatchBounds& bounds, std::int64_t slot, std::int64_t rank_max,
                         std::int64_t parts = 1);

/// The same document twice, without labels: its first copy in slot 0, its second in slot 1.
model::TokenBatch upload_twice(model::Context& ctx, const std::vector<std::int32_t>& tokens,
                               std::int64_t rank_max);

/// The sum of an f32 vector, in order, in f64. Waits for the device.
double sum_rows(model::Context& ctx, const kernels::Tensor& x);

}  // namespace tandem::worker::train
