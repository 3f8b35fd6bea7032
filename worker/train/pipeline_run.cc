#include "worker/train/pipeline_run.h"

#include "worker/train/pipeline_schedule.h"

#include <algorithm>

namespace tandem::worker::train {

namespace {

using kernels::ArenaScope;
using kernels::Tensor;

constexpr std::int64_t kReserveBytes = std::int64_t{1} << 40;  ///< address space of an arena

}  // namespace

PipelineRunner::Flight& PipelineRunner::flight(int micro_batch) {
  return flights_[static_cast<std::size_t>(micro_batch) % flights_.size()];
}

double PipelineRunner::run(const Step& step) {
  const auto count = static_cast<int>(step.rows.size());
  const int stage = ranks_.pp_rank(), stages = ranks_.layout.pp;
  const auto held = static_cast<std::size_t>(in_flight_max(stages, stage, count));
  while (flights_.size() < held) {
    flights_.emplace_back();
    flights_.back().arena =
        std::make_unique<kernels::Arena>(allocator_, ledger_, kernels::MemoryKind::kActivations,
                                         "micro-batch in flight", kReserveBytes);
  }
  ArenaScope scope(ctx_.activations);
  const std::int64_t rows = *std::max_element(step.rows.begin(), step.rows.end());
  const auto buffer = [&](bool wanted) {
    return wanted ? ctx_.activations.alloc({rows, transformer_.config().width}, ctx_.compute_dtype)
                  : Tensor{};
  };
  const Tensor stream_in = buffer(!first()), gradient_out = buffer(!first());
  const Tensor gradient_in = buffer(!last());
  const auto part = [&](const Tensor& whole, int m) {
    return m < 0 || !whole.defined() ? Tensor{}
                                     : whole.rows(0, step.rows[static_cast<std::size_t>(m)]);
  };
  comm::Communicator& pp = *ranks_.groups.pp;
  double loss = 0.0;
  for (const PipelineAction& action : schedule_1f1b(stages, stage, count)) switch (action.kind) {
      case PipelineAction::Kind::kForward:
        forward(step, action.micro_batch, part(stream_in, action.micro_batch));
        break;
      case PipelineAction::Kind::kBackward:
        loss += backward(step, action.micro_batch, part(gradient_in, action.micro_batch),
                         part(gradient_out, action.micro_batch));
        break;
      case PipelineAction::Kind::kTalkNext:
        pp.exchange(ctx_.exec, action.send < 0 ? Tensor{} : flight(action.send).hidden, stage + 1,
                    part(gradient_in, action.receive), stage + 1);
        break;
      case PipelineAction::Kind::kTalkPrevious:
        pp.exchange(ctx_.exec, part(gradient_out, action.send), stage - 1,
                    part(stream_in, action.receive), stage - 1);
        break;
    }
  return loss;
}

void PipelineRunner::forward(const Step& step, int m, Tensor in) {
  Flight& f = flight(m);
  f.arena->reset(0);
  model::Context ctx{ctx_.ops, ctx_.exec, ctx_.comm, *f.arena, ctx_.compute_dtype};
  f.batch = step.upload(ctx, static_cast<std::size_t>(m));
  f.hidden =
      f.arena->alloc({f.batch.tokens.tokens(), transformer_.config().width}, ctx.compute_dtype);
  f.saved = {};
  transformer_.forward(ctx, f.batch.tokens, in, f.hidden, &f.saved, recompute_);
}

double PipelineRunner::backward(const Step& step, int m, Tensor received, Tensor din) {
  Flight& f = flight(m);
  ArenaScope scope(ctx_.activations);
  double sum = 0.0;
  Tensor dhidden = received;
  if (last()) {
    dhidden = ctx_.activations.alloc(f.hidden.shape, ctx_.compute_dtype);
    const Tensor loss = ctx_.activations.alloc({f.hidden.dim(0)}, sum_dtype(ctx_.compute_dtype));
    transformer_.loss(ctx_, f.hidden, f.batch.labels, step.gradient_scale, loss, {}, dhidden,
                      &step.sink);
    sum = sum_rows(ctx_, loss);
  }
  transformer_.backward(ctx_, f.batch.tokens, dhidden, f.saved, recompute_, din, step.sink);
  return sum;
}

void PipelineRunner::forward_only(const DeviceBatch& batch, Tensor hidden) {
  ArenaScope scope(ctx_.activations);
  comm::Communicator& pp = *ranks_.groups.pp;
  const int stage = ranks_.pp_rank();
  Tensor in{};
  if (!first()) {
    in = ctx_.activations.alloc(hidden.shape, ctx_.compute_dtype);
    pp.exchange(ctx_.exec, {}, 0, in, stage - 1);
  }
  transformer_.forward(ctx_, batch.tokens, in, hidden, nullptr, recompute_);
  if (!last()) pp.exchange(ctx_.exec, hidden, stage + 1, {}, 0);
}

}  // namespace tandem::worker::train
