#include "worker/train/pipeline_run.h"

#include <algorithm>

namespace tandem::worker::train {

namespace {

using kernels::ArenaScope;
using kernels::Tensor;

constexpr std::int64_t kReserveBytes = std::int64_t{1} << 40;  ///< address space of an arena

}  // namespace

/// What travels, of one step.
struct PipelineRunner::Buffers {
  std::vector<std::int64_t> rows;  ///< of the stream here, by micro-batch
  Ring streams, gradients;         ///< received
  Tensor gradient_out;

  [[nodiscard]] Tensor part(const Tensor& whole, const PipelineUnit& unit) const {
    return whole.rows(0, rows[static_cast<std::size_t>(unit.micro_batch)]);
  }
};

PipelineRunner::PipelineRunner(kernels::Allocator& allocator, kernels::MemoryLedger& ledger,
                               const model::Context& context, model::WeightSource& weights,
                               const model::AdapterTable& adapters, const Ranks& ranks,
                               model::Recompute recompute)
    : allocator_(allocator), ledger_(ledger), ctx_(context), ranks_(ranks), recompute_(recompute) {
  for (const model::Stage& stage : weights.base().shard().stages)
    chunks_.emplace_back(weights, &adapters, stage);
}

double PipelineRunner::run(const Step& step) {
  const PipelineSchedule schedule =
      pipeline_schedule(ranks_.layout.pp, static_cast<int>(chunks_.size()), ranks_.pp_rank(),
                        static_cast<int>(step.rows.size()), step.whole);
  while (flights_.size() < static_cast<std::size_t>(schedule.slots)) {
    flights_.emplace_back();
    flights_.back().arena =
        std::make_unique<kernels::Arena>(allocator_, ledger_, kernels::MemoryKind::kActivations,
                                         "micro-batch in flight", kReserveBytes);
  }
  ArenaScope scope(ctx_.activations);
  Buffers buffers;
  for (const std::int64_t rows : step.rows) buffers.rows.push_back(ranks_.stream_rows(rows));
  const std::int64_t rows = *std::max_element(buffers.rows.begin(), buffers.rows.end());
  const auto buffer = [&] {
    return ctx_.activations.alloc({rows, chunks_[0].config().width}, ctx_.compute_dtype);
  };
  for (int b = 0; b < schedule.streams_waiting; ++b) buffers.streams.buffers.push_back(buffer());
  for (int b = 0; b < schedule.gradients_waiting; ++b)
    buffers.gradients.buffers.push_back(buffer());
  if (schedule.sends_gradients) buffers.gradient_out = buffer();
  double loss = 0.0;
  for (const PipelineAction& action : schedule.actions) {
    const PipelineUnit& unit = action.unit;
    switch (action.kind) {
      case PipelineAction::Kind::kForward:
        forward(step, action,
                first(unit.chunk) ? Tensor{} : buffers.part(buffers.streams.use(), unit));
        break;
      case PipelineAction::Kind::kBackward:
        loss += backward(step, action,
                         last(unit.chunk) ? Tensor{} : buffers.part(buffers.gradients.use(), unit),
                         first(unit.chunk) ? Tensor{} : buffers.part(buffers.gradient_out, unit));
        break;
      case PipelineAction::Kind::kExchange:
        exchange(action, buffers);
        break;
    }
  }
  return loss;
}

void PipelineRunner::exchange(const PipelineAction& action, Buffers& buffers) {
  // Of two ranks both neighbours are one: streams before gradients on both sides.
  std::vector<comm::Message> sends, receives;
  if (action.send_stream.any())
    sends.push_back({flights_[static_cast<std::size_t>(action.slot)].hidden, next()});
  if (action.send_gradient.any())
    sends.push_back({buffers.part(buffers.gradient_out, action.send_gradient), previous()});
  if (action.receive_stream.any())
    receives.push_back({buffers.part(buffers.streams.fill(), action.receive_stream), previous()});
  if (action.receive_gradient.any())
    receives.push_back({buffers.part(buffers.gradients.fill(), action.receive_gradient), next()});
  ranks_.groups.pp->exchange_all(ctx_.exec, sends, receives);
}

void PipelineRunner::forward(const Step& step, const PipelineAction& action, Tensor in) {
  Flight& f = flights_[static_cast<std::size_t>(action.slot)];
  const model::Transformer& chunk = chunks_[static_cast<std::size_t>(action.unit.chunk)];
  f.arena->reset(0);
  model::Context ctx{ctx_.ops, ctx_.exec, ctx_.comm, *f.arena, ctx_.compute_dtype, ctx_.room};
  f.batch = step.upload(ctx, static_cast<std::size_t>(action.unit.micro_batch));
  f.hidden = f.arena->alloc({ranks_.stream_rows(f.batch.tokens.tokens()), chunk.config().width},
                            ctx.compute_dtype);
  f.saved = {};
  chunk.forward(ctx, f.batch.tokens, in, f.hidden, &f.saved, recompute_);
}

double PipelineRunner::backward(const Step& step, const PipelineAction& action, Tensor received,
                                Tensor din) {
  Flight& f = flights_[static_cast<std::size_t>(action.slot)];
  const model::Transformer& chunk = chunks_[static_cast<std::size_t>(action.unit.chunk)];
  ArenaScope scope(ctx_.activations);
  double sum = 0.0;
  Tensor dhidden = received;
  if (last(action.unit.chunk)) {
    dhidden = ctx_.activations.alloc(f.hidden.shape, ctx_.compute_dtype);
    const Tensor loss =
        ctx_.activations.alloc({f.batch.labels.dim(0)}, sum_dtype(ctx_.compute_dtype));
    chunk.loss(ctx_, f.hidden, f.batch.labels, step.gradient_scale, loss, {}, dhidden, &step.sink);
    sum = sum_rows(ctx_, loss);
  }
  chunk.backward(ctx_, f.batch.tokens, dhidden, f.saved, recompute_, din, step.sink);
  return sum;
}

void PipelineRunner::forward_only(const DeviceBatch& batch, Tensor hidden) {
  ArenaScope scope(ctx_.activations);
  comm::Communicator& pp = *ranks_.groups.pp;
  Tensor received{};
  for (int c = 0; c < static_cast<int>(chunks_.size()); ++c) {
    if (!first(c)) {
      if (!received.defined()) received = ctx_.activations.alloc(hidden.shape, ctx_.compute_dtype);
      pp.exchange(ctx_.exec, {}, 0, received, previous());
    }
    chunks_[static_cast<std::size_t>(c)].forward(ctx_, batch.tokens, first(c) ? Tensor{} : received,
                                                 hidden, nullptr, recompute_);
    if (!last(c)) pp.exchange(ctx_.exec, hidden, next(), {}, 0);
  }
}

}  // namespace tandem::worker::train
