#include "worker/model/vocab_loss.h"

#include "kernels/workspace.h"
#include "worker/model/stream_rows.h"

#include <algorithm>

namespace tandem::worker::model {

using kernels::ArenaScope;
using kernels::Tensor;

VocabShard vocab_shard(const BaseWeights& base) {
  if (base.shard().tp_size == 1) return {};
  return {vocab_slice(base.whole_config(), base.shard()).row, base.whole_config().vocab};
}

void vocab_loss(Context& ctx, const BaseWeights& base, const VocabLossArgs& args) {
  const kernels::PackedWeight& head = base.lm_head();
  const DType sums = sum_dtype(ctx.compute_dtype);
  const std::int64_t t = args.labels.dim(0), first = vocab_shard(base).first;
  const ArenaScope whole(ctx.activations);
  const bool split = args.hidden.dim(0) != t;
  Tensor hidden = args.hidden, dhidden = args.dhidden;
  if (split) {
    const kernels::Shape shape{t, hidden.dim(1)};
    hidden = ctx.activations.alloc(shape, ctx.compute_dtype);
    gather_stream(ctx, args.hidden, hidden);
    if (dhidden.defined()) dhidden = ctx.activations.alloc(shape, ctx.compute_dtype);
  }
  const std::int64_t chunk = std::max(
      kVocabLossRowsMin, kernels::logits_chunk_bytes(ctx.ops.profile()) /
                             (dtype_bytes(sums) * head.n) / kVocabLossRowsMin * kVocabLossRowsMin);
  for (std::int64_t row = 0; row < t; row += chunk) {
    ArenaScope scope(ctx.activations);
    const std::int64_t rows = std::min(chunk, t - row);
    const Tensor x = hidden.rows(row, rows), labels = args.labels.rows(row, rows);
    const Tensor logits = ctx.activations.alloc({rows, head.n}, sums);
    const Tensor mine = ctx.activations.alloc({rows, 4}, sums);
    Tensor stats = mine.reshaped({1, rows, 4});
    ctx.ops.linear_forward(ctx.exec, {x, &head, {}, {}, nullptr, logits, {}});
    ctx.ops.cross_entropy_stats(ctx.exec, {logits, labels, first, mine});
    if (ctx.comm.size() > 1) {
      stats = ctx.activations.alloc({ctx.comm.size(), rows, 4}, sums);
      ctx.comm.all_gather(ctx.exec, mine, stats);
    }
    Tensor dlogits{};
    if (dhidden.defined()) dlogits = ctx.activations.alloc(logits.shape, ctx.compute_dtype);
    ctx.ops.cross_entropy(
        ctx.exec, {logits, labels, first, stats, args.gradient_scale, args.loss.rows(row, rows),
                   args.correct.defined() ? args.correct.rows(row, rows) : Tensor{}, dlogits});
    if (!dhidden.defined()) continue;
    ctx.ops.linear_backward(ctx.exec,
                            {dlogits, x, &head, {}, nullptr, {}, dhidden.rows(row, rows)});
    if (args.dhead.defined()) ctx.ops.linear_weight_grad(ctx.exec, {dlogits, x, args.dhead, {}});
  }
  if (!dhidden.defined() || ctx.comm.size() == 1) return;
  if (split)
    sum_stream(ctx, dhidden, args.dhidden);
  else
    ctx.comm.all_reduce_sum(ctx.exec, dhidden);
}

}  // namespace tandem::worker::model
