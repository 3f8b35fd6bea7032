#include "worker/train/device_batch.h"

#include "protocol/base/units.h"
#include "worker/model/stream_rows.h"

#include <algorithm>

namespace tandem::worker::train {

namespace {

kernels::Tensor upload_padded(model::Context& ctx, std::vector<std::int32_t> values,
                              std::int64_t size, std::int32_t padding) {
  TANDEM_CHECK_LE(static_cast<std::int64_t>(values.size()), size);
  values.resize(static_cast<std::size_t>(size), padding);
  const kernels::Tensor tensor = ctx.activations.alloc({size}, DType::kI32);
  ctx.ops.upload(ctx.exec, std::as_bytes(std::span(values)), tensor);
  return tensor;
}

}  // namespace

std::int64_t device_rows(std::int64_t tokens, const BatchBounds& bounds, std::int64_t parts) {
  const std::int64_t bucket =
      std::min(kTokenBucket, round_up(bounds.micro_batch_tokens, kSmallBucket));
  return round_up(round_up(tokens, bucket), parts);
}

DeviceBatch upload_batch(model::Context& ctx, const data::MicroBatch& batch,
                         const BatchBounds& bounds, std::int64_t slot, std::int64_t rank_max,
                         std::int64_t parts) {
  const auto real = static_cast<std::int64_t>(batch.tokens.size());
  const auto end = static_cast<std::int32_t>(real);
  const std::int64_t rows = device_rows(real, bounds, parts);
  DeviceBatch device;
  device.real_tokens = real;
  device.tokens.ids = upload_padded(ctx, batch.tokens, rows, 0);
  device.tokens.positions = upload_padded(ctx, batch.positions, rows, 0);
  device.labels = upload_padded(ctx, batch.labels, rows, kernels::kIgnoreLabel);
  // Sequences beyond the real ones are empty; rows beyond the last offset are inert.
  device.tokens.seq_offsets =
      upload_padded(ctx, batch.cu_seqlens, bounds.micro_batch_sequences + 1, end);
  device.tokens.seq_len_max = std::min(bounds.sequence_tokens, rows);
  kernels::AdapterRows& adapters = device.tokens.adapters;
  // One segment, inert rows in it: their gradients are exact zeros, and products may then take the
  // low-rank part along.
  adapters.segments_max = 1;
  adapters.rank_max = rank_max;
  adapters.segment_offsets = upload_padded(ctx, {0, static_cast<std::int32_t>(rows)}, 2, 0);
  adapters.segment_slots = upload_padded(ctx, {static_cast<std::int32_t>(slot)}, 1, -1);
  device.tokens.part_adapters = adapters;
  const std::int64_t cut = model::stream_parts(ctx, rows, rows / parts);
  if (cut > 1)
    device.tokens.part_adapters.segment_offsets =
        upload_padded(ctx, {0, static_cast<std::int32_t>(rows / cut)}, 2, 0);
  return device;
}

model::TokenBatch upload_twice(model::Context& ctx, const std::vector<std::int32_t>& tokens,
                               std::int64_t rank_max) {
  const auto count = static_cast<std::int32_t>(tokens.size());
  const std::int64_t rows = 2 * count;
  std::vector<std::int32_t> ids, positions;
  for (int copy = 0; copy < 2; ++copy)
    for (std::int32_t at = 0; at < count; ++at) {
      ids.push_back(tokens[static_cast<std::size_t>(at)]);
      positions.push_back(at);
    }
  model::TokenBatch batch;
  batch.ids = upload_padded(ctx, std::move(ids), rows, 0);
  batch.positions = upload_padded(ctx, std::move(positions), rows, 0);
  batch.seq_offsets = upload_padded(ctx, {0, count, 2 * count}, 3, 0);
  batch.seq_len_max = count;
  batch.adapters.segments_max = 2;
  batch.adapters.rank_max = rank_max;
  batch.adapters.segment_offsets = batch.seq_offsets;
  batch.adapters.segment_slots = upload_padded(ctx, {0, 1}, 2, -1);
  return batch;
}

double sum_rows(model::Context& ctx, const kernels::Tensor& x) {
  double sum = 0.0;
  if (x.dtype == DType::kF64) {
    std::vector<double> host(static_cast<std::size_t>(x.elements()));
    ctx.ops.download(ctx.exec, x, std::as_writable_bytes(std::span(host)));
    for (double value : host) sum += value;
    return sum;
  }
  std::vector<float> host(static_cast<std::size_t>(x.elements()));
  ctx.ops.download(ctx.exec, x, std::as_writable_bytes(std::span(host)));
  for (float value : host) sum += static_cast<double>(value);
  return sum;
}

}  // namespace tandem::worker::train
