#include "worker/model/transformer.h"

#include "worker/model/vocab_loss.h"

#include <cmath>

namespace tandem::worker::model {

/// The residual stream: the sum of both tensors.
struct ResidualStream {
  kernels::Tensor before{};  ///< may be undefined
  kernels::Tensor stream{};
  bool addend = false;  ///< `stream` is this rank's addend of what it stands for
};

namespace {

using kernels::ArenaScope;
using kernels::Tensor;
using Fused = AdapterTable::Fused;

kernels::AttentionSpec attention_spec(const ModelConfig& config) {
  return {config.heads,    config.kv_heads,
          config.head_dim, 1.0f / std::sqrt(static_cast<float>(config.head_dim)),
          config.window,   0.0f};
}

/// All rows of a tensor, on their way from the ranks until wait().
struct Gathered {
  Tensor all;
  std::unique_ptr<comm::Pending> pending;  ///< null: they are here

  const Tensor& wait(Context& ctx) {
    if (pending) pending->wait(ctx.exec);
    pending.reset();
    return all;
  }
};

/// What every part of a block needs: who runs, on what, with which weights and adapters.
///
/// Sequence parallelism (Korthikanti et al. 2022): the residual stream and its norms have only this
/// rank's rows, products and attention all of them. Gathers stand before qkv and gate_up, and the
/// sums behind o and down leave each rank its own rows; in backward the other way round.
struct BlockRun {
  Context& ctx;
  const TokenBatch& batch;
  const ModelConfig& config;
  const BaseWeights& base;
  const BlockWeights& weights;
  const AdapterTable* adapters;
  std::int64_t layer;
  std::int64_t stream_rows;           ///< T, or with sequence parallelism T / ranks
  const BlockGrads* grads = nullptr;  ///< full fine-tuning, in backward

  [[nodiscard]] bool has_adapters() const {
    return adapters != nullptr && batch.adapters.rank_max > 0;
  }
  [[nodiscard]] std::vector<kernels::LoraSite> sites(Fused fused) const {
    return has_adapters() ? adapters->sites(layer, fused) : std::vector<kernels::LoraSite>{};
  }
  [[nodiscard]] Tensor rows(std::int64_t width) const {
    return ctx.activations.alloc({batch.tokens(), width}, ctx.compute_dtype);
  }
  [[nodiscard]] Tensor stream() const {
    return ctx.activations.alloc({stream_rows, config.width}, ctx.compute_dtype);
  }
  [[nodiscard]] bool sequence_parallel() const { return stream_rows != batch.tokens(); }
  [[nodiscard]] bool has_all_rows(const Tensor& x) const {
    return x.defined() && x.dim(0) == batch.tokens();
  }
  /// This rank's rows of the residual stream in a tensor of all rows.
  [[nodiscard]] Tensor mine(const Tensor& all) const {
    return sequence_parallel() ? all.rows(ctx.comm.rank() * stream_rows, stream_rows) : all;
  }
  [[nodiscard]] Tensor row_scalars(std::int64_t width) const {
    return ctx.activations.alloc({batch.tokens(), width}, sum_dtype(ctx.compute_dtype));
  }
  [[nodiscard]] std::int64_t qkv_width() const {
    return (config.heads + 2 * config.kv_heads) * config.head_dim;
  }
  /// A x of a fused linear, kept for backward; undefined without adapters.
  [[nodiscard]] Tensor lora_inputs(Fused fused) const {
    const auto count = static_cast<std::int64_t>(sites(fused).size());
    return count == 0 ? Tensor{} : rows(count * batch.adapters.rank_max);
  }
  /// x is read or, where `make_x` says something, written; `then` follows.
  void linear(Fused fused, const Tensor& x, const kernels::PackedWeight& weight, const Tensor& bias,
              const Tensor& y, const Tensor& u, const kernels::SiluMulArgs& make_x = {},
              const kernels::LinearReader& then = {}) const {
    ctx.ops.linear_forward(
        ctx.exec, {x, &weight, bias, sites(fused), has_adapters() ? &batch.adapters : nullptr, y, u,
                   make_x, then});
  }
  /// x undefined: by its recipe; dy as `make_dy` says, where that says something.
  void linear_backward(Fused fused, const Tensor& dy, const Tensor& x,
                       const kernels::PackedWeight& weight, const Tensor& u, const Tensor& dx,
                       const kernels::LinearInputRecipe& make_x = {},
                       const kernels::SiluMulBackwardArgs& make_dy = {}) const {
    ctx.ops.linear_backward(
        ctx.exec, {dy, x, &weight, sites(fused), has_adapters() ? &batch.adapters : nullptr, u, dx,
                   x.defined() ? kernels::LinearInputRecipe{} : make_x, make_dy});
  }
  /// Gradients of a weight, where they are wanted: see BlockGrads.
  void weight_grad(const Tensor& dy, const Tensor& x, Tensor BlockGrads::*weight,
                   const Tensor& dbias = {}) const {
    if (grads != nullptr)
      ctx.ops.linear_weight_grad(ctx.exec, {dy, x, grads->*weight, dbias, grads->fresh});
  }
  void norm_backward(const Tensor& dy, const Tensor& residual, const Tensor& weight,
                     const Tensor& rstd, const Tensor& dresidual,
                     Tensor BlockGrads::*dweight) const {
    ctx.ops.rms_norm_backward(ctx.exec, {dy, residual, weight, rstd, dresidual,
                                         grads != nullptr ? grads->*dweight : Tensor{},
                                         grads != nullptr && grads->fresh});
  }
  /// Each rank of a tensor-parallel group has an addend [T, C]; their sum, or this rank's rows of
  /// it, comes to `to`, which is a part of x or elsewhere.
  void sum_over_ranks(const Tensor& x, const Tensor& to) const {
    if (ctx.comm.size() == 1) return;
    if (sequence_parallel())
      ctx.comm.reduce_scatter_sum(ctx.exec, x, to);
    else
      ctx.comm.all_reduce_sum(ctx.exec, x);
  }
  /// The same, done when it is waited for; null: nothing to wait for.
  [[nodiscard]] std::unique_ptr<comm::Pending> start_sum_over_ranks(const Tensor& x,
                                                                    const Tensor& to) const {
    if (sequence_parallel()) return ctx.comm.start_reduce_scatter_sum(ctx.exec, x, to);
    sum_over_ranks(x, to);
    return nullptr;
  }
  void wait(const std::unique_ptr<comm::Pending>& pending) const {
    if (pending) pending->wait(ctx.exec);
  }
  /// A product whose sum over ranks is the stream `to`; `all` holds the addend where `to` has not
  /// all rows. Where it has, the sum is left to the norm that reads it (has_addend()).
  void linear_to_stream(Fused fused, const Tensor& x, const kernels::PackedWeight& weight,
                        const Tensor& to, const Tensor& u, const Tensor& all,
                        const kernels::SiluMulArgs& make_x = {}) const {
    const Tensor addend = sequence_parallel() ? all : to;
    linear(fused, x, weight, {}, addend, u, make_x);
    if (sequence_parallel()) sum_over_ranks(addend, to);
  }
  /// What linear_to_stream leaves is this rank's addend of the stream.
  [[nodiscard]] bool has_addend() const { return ctx.comm.size() > 1 && !sequence_parallel(); }
  /// x (which may be a part of `all`) to `all`; nothing to do where x has all rows.
  void gather(const Tensor& x, const Tensor& all) const {
    if (sequence_parallel()) ctx.comm.all_gather(ctx.exec, x, all);
  }
  [[nodiscard]] Gathered start_gather(const Tensor& x, const Tensor& all) const {
    return {all, sequence_parallel() ? ctx.comm.start_all_gather(ctx.exec, x, all) : nullptr};
  }
};

// -- forward
// -----------------------------------------------------------------------------------------

/// `stream` holds the part of the residual stream that is fresh memory, `before` the part that must
/// survive: their sum is left in `stream`. Addition commutes, so neither is copied.
void add_and_norm(Context& ctx, const ModelConfig& config, const ResidualStream& x,
                  const Tensor& weight, const Tensor& y, const Tensor& rstd) {
  const kernels::AddRmsNormArgs args{x.stream, x.before, weight, config.norm_eps, y, rstd};
  if (x.addend) {
    // A norm that comes with the sum adds up a row's squares in another order than one that does
    // not, and not all batches have one.
    if (ctx.exec.numerics != kernels::Numerics::kInvariant && ctx.comm.sum_and_norm(ctx.exec, args))
      return;
    ctx.comm.all_reduce_sum(ctx.exec, x.stream);
  }
  ctx.ops.add_rms_norm_forward(ctx.exec, args);
}

const kernels::KvCache* cache_of(const BlockRun& run) {
  const PagedKv* paged = run.batch.paged;
  return paged ? &paged->caches.at(static_cast<std::size_t>(run.layer)) : nullptr;
}

kernels::RopeArgs rope_of(const BlockRun& run, const Tensor& qkv) {
  const PagedKv* paged = run.batch.paged;
  return {qkv,
          run.batch.positions,
          run.base.inv_freq(),
          run.base.rope_attention_factor(),
          run.config.heads,
          run.config.kv_heads,
          run.config.head_dim,
          cache_of(run),
          paged ? paged->cache_slots : Tensor{}};
}

void attend(const BlockRun& run, const Tensor& qkv, const Tensor& out, const Tensor& lse) {
  const kernels::AttentionSpec spec = attention_spec(run.config);
  if (const PagedKv* paged = run.batch.paged; paged != nullptr)
    run.ctx.ops.paged_attention_forward(
        run.ctx.exec, {spec, qkv, paged->q_offsets, paged->kv_lens, paged->block_tables,
                       cache_of(run), paged->kv_len_max, out});
  else
    run.ctx.ops.attention_forward(
        run.ctx.exec, {spec, qkv, run.batch.seq_offsets, run.batch.seq_len_max, out, lse});
}

/// Which tensors of a block outlive its forward; `gathered`: the norms' outputs with all rows.
struct Keep {
  bool for_backward = false, normed = false, gathered = false, gate_up = false, act = false;
};
Keep keep_of(bool saved, Recompute recompute) {
  if (!saved || recompute == Recompute::kBlock) return {};
  const bool all = recompute == Recompute::kNone;
  return {true, recompute != Recompute::kElementwise, all, recompute != Recompute::kMlp, all};
}
constexpr Keep kKeepAll{true, true, true, true, true};

/// Rows of the loss that are issued together: a head is as much work as several blocks, and nobody
/// else gets in before the end of what was issued.
constexpr std::int64_t kLossRows = 1024;

/// What is kept, first; what is not lies behind it and is given back at the end of the block.
void allocate_kept(const BlockRun& run, SavedBlock& s, const Keep& keep) {
  s.qkv = run.rows(run.qkv_width());
  s.attention_out = run.rows(run.config.heads * run.config.head_dim);
  if (keep.for_backward) {
    const DType sums = sum_dtype(run.ctx.compute_dtype);
    s.rstd_attention = run.ctx.activations.alloc({run.stream_rows}, sums);
    s.rstd_mlp = run.ctx.activations.alloc({run.stream_rows}, sums);
    s.lse = run.row_scalars(run.config.heads);
    s.u[0] = run.lora_inputs(Fused::kQkv);
    s.u[1] = run.lora_inputs(Fused::kO);
    s.u[2] = run.lora_inputs(Fused::kGateUp);
    s.u[3] = run.lora_inputs(Fused::kDown);
  }
  if (keep.normed) {
    s.normed_attention = keep.gathered ? run.rows(run.config.width) : run.stream();
    s.normed_mlp = keep.gathered ? run.rows(run.config.width) : run.stream();
  }
  if (keep.gate_up) s.gate_up = run.rows(2 * run.config.mlp_width);
  if (keep.act) s.act = run.rows(run.config.mlp_width);
}

/// All rows of a norm's output: `norm` writes this rank's. They are left in `kept` as far as it
/// goes, and in `all` where it does not hold them all.
template <class Norm>
Tensor norm_all_rows(const BlockRun& run, const Tensor& kept, const Tensor& all, const Norm& norm) {
  const Tensor to = run.has_all_rows(kept) ? kept : all;
  const Tensor mine = kept.defined() && !run.has_all_rows(kept) ? kept : run.mine(to);
  norm(mine);
  run.gather(mine, to);
  return to;
}

/// One block. On entry the residual stream is `in`, of which s.x is the stream and then holds the
/// whole. On return it is s.residual_attention (memory given by the caller, as is `mlp_out`) +
/// mlp_out, which is an addend where run.has_addend(). Everything else that `keep` names is
/// allocated here.
void block_forward(const BlockRun& run, SavedBlock& s, const ResidualStream& in,
                   const Tensor& mlp_out, const Keep& keep) {
  allocate_kept(run, s, keep);
  const ArenaScope scope(run.ctx.activations);
  SavedBlock b = s;
  // All rows of what is not kept with all of them: a norm's output, then a product's addend.
  const Tensor all =
      keep.normed && !run.sequence_parallel() ? Tensor{} : run.rows(run.config.width);
  const Tensor normed_attention = norm_all_rows(run, b.normed_attention, all, [&](const Tensor& y) {
    add_and_norm(run.ctx, run.config, in, run.weights.attention_norm, y, b.rstd_attention);
  });
  run.linear(Fused::kQkv, normed_attention, run.weights.qkv, run.weights.qkv_bias, b.qkv, b.u[0],
             {}, {.rope = rope_of(run, b.qkv)});
  attend(run, b.qkv, b.attention_out, b.lse);
  run.linear_to_stream(Fused::kO, b.attention_out, run.weights.o, b.residual_attention, b.u[1],
                       all);
  const Tensor normed_mlp = norm_all_rows(run, b.normed_mlp, all, [&](const Tensor& y) {
    add_and_norm(run.ctx, run.config, {b.x, b.residual_attention, run.has_addend()},
                 run.weights.mlp_norm, y, b.rstd_mlp);
  });
  if (!keep.gate_up) b.gate_up = run.rows(2 * run.config.mlp_width);
  if (!keep.act) b.act = run.rows(run.config.mlp_width);
  // Adapters' products take silu's output as they read it; else the product before leaves it.
  const kernels::SiluMulArgs silu_mul{b.gate_up, b.act};
  const bool before = !keep.for_backward && !run.has_adapters();
  run.linear(Fused::kGateUp, normed_mlp, run.weights.gate_up, {}, b.gate_up, b.u[2], {},
             {.silu_mul = before ? silu_mul : kernels::SiluMulArgs{}});
  run.linear_to_stream(Fused::kDown, b.act, run.weights.down, mlp_out, b.u[3], all,
                       before ? kernels::SiluMulArgs{} : silu_mul);
}

// -- backward
// ----------------------------------------------------------------------------------------

/// dresidual, of the stream's rows: on entry the gradient of the block's output stream, on return
/// that of its input stream (`want_dx` false: nobody asks for it, dresidual is then left half way).
void block_backward(const BlockRun& run, const SavedBlock& s, const Tensor& dresidual,
                    bool want_dx) {
  ArenaScope scope(run.ctx.activations);
  kernels::Ops& ops = run.ctx.ops;
  const Tensor dnormed_all = run.rows(run.config.width), dnormed = run.mine(dnormed_all);
  // The gradient of what o and down gave, which is all rows.
  const Tensor dstream = run.sequence_parallel() ? run.rows(run.config.width) : dresidual;
  // Gradients of weights are the only other readers of a linear's x: without them, x that was not
  // kept is made by the product's backward.
  const bool by_recipe = run.grads == nullptr;
  const auto norm_recipe = [&](const Tensor& stream, const Tensor& weight, const Tensor& rstd) {
    return kernels::LinearInputRecipe{.norm = {stream, {}, weight, run.config.norm_eps, {}, rstd}};
  };
  // The norm of a stream that is whole already: undefined with its recipe; else once more, where it
  // was not kept; and all its rows, which arrive beside the product that comes first.
  const auto normed = [&](const Tensor& kept, const Tensor& stream, const Tensor& weight) {
    if (run.has_all_rows(kept)) return Gathered{kept, nullptr};
    if (by_recipe && !run.sequence_parallel()) return Gathered{};
    const Tensor all = run.rows(run.config.width);
    const Tensor mine = kept.defined() ? kept : run.mine(all);
    if (!kept.defined()) add_and_norm(run.ctx, run.config, {{}, stream}, weight, mine, {});
    return run.start_gather(mine, all);
  };
  {
    ArenaScope mlp(run.ctx.activations);
    SavedBlock again = s;
    Gathered arriving = run.start_gather(dresidual, dstream);
    Gathered normed_mlp = normed(s.normed_mlp, s.residual_attention, run.weights.mlp_norm);
    if (!s.gate_up.defined()) {
      again.gate_up = run.rows(2 * run.config.mlp_width);
      run.linear(Fused::kGateUp, normed_mlp.wait(run.ctx), run.weights.gate_up, {}, again.gate_up,
                 s.u[2]);
    }
    if (!s.act.defined() && !by_recipe) {
      again.act = run.rows(run.config.mlp_width);
      ops.silu_mul_forward(run.ctx.exec, {again.gate_up, again.act});
    }
    const Tensor dact = run.rows(run.config.mlp_width);
    arriving.wait(run.ctx);
    run.linear_backward(Fused::kDown, dstream, again.act, run.weights.down, s.u[3], dact,
                        {.silu_mul = {again.gate_up, {}}});
    run.weight_grad(dstream, again.act, &BlockGrads::down);
    const Tensor& x = normed_mlp.wait(run.ctx);
    // The gradient takes gate_up's memory: nobody reads that again.
    run.linear_backward(Fused::kGateUp, again.gate_up, x, run.weights.gate_up, s.u[2], dnormed_all,
                        norm_recipe(s.residual_attention, run.weights.mlp_norm, s.rstd_mlp),
                        {dact, again.gate_up, again.gate_up});
    const auto summing = run.start_sum_over_ranks(dnormed_all, dnormed);
    run.weight_grad(again.gate_up, x, &BlockGrads::gate_up);
    run.wait(summing);
  }
  run.norm_backward(dnormed, s.residual_attention, run.weights.mlp_norm, s.rstd_mlp, dresidual,
                    &BlockGrads::mlp_norm);
  Gathered arriving = run.start_gather(dresidual, dstream);
  Gathered normed_attention = normed(s.normed_attention, s.x, run.weights.attention_norm);
  const Tensor dattention = run.rows(run.config.heads * run.config.head_dim);
  arriving.wait(run.ctx);
  run.linear_backward(Fused::kO, dstream, s.attention_out, run.weights.o, s.u[1], dattention);
  run.weight_grad(dstream, s.attention_out, &BlockGrads::o);
  const Tensor dqkv = run.rows(run.qkv_width());
  ops.attention_backward(run.ctx.exec,
                         {attention_spec(run.config), dattention, s.qkv, s.attention_out, s.lse,
                          run.batch.seq_offsets, run.batch.seq_len_max, dqkv});
  ops.rope_backward(run.ctx.exec, {dqkv, run.batch.positions, run.base.inv_freq(),
                                   run.base.rope_attention_factor(), run.config.heads,
                                   run.config.kv_heads, run.config.head_dim});
  const Tensor& x = normed_attention.wait(run.ctx);
  run.linear_backward(Fused::kQkv, dqkv, x, run.weights.qkv, s.u[0],
                      want_dx ? dnormed_all : Tensor{},
                      norm_recipe(s.x, run.weights.attention_norm, s.rstd_attention));
  const auto summing = want_dx ? run.start_sum_over_ranks(dnormed_all, dnormed) : nullptr;
  run.weight_grad(dqkv, x, &BlockGrads::qkv, run.grads != nullptr ? run.grads->qkv_bias : Tensor{});
  if (!want_dx) return;
  run.wait(summing);
  run.norm_backward(dnormed, s.x, run.weights.attention_norm, s.rstd_attention, dresidual,
                    &BlockGrads::attention_norm);
}

/// x of the stream's rows with all T rows: x itself, or in `all`.
Tensor all_rows(Context& ctx, const Tensor& x, std::int64_t t) {
  if (x.dim(0) == t) return x;
  const Tensor all = ctx.activations.alloc({t, x.dim(1)}, x.dtype);
  ctx.comm.all_gather(ctx.exec, x, all);
  return all;
}

/// Leaves an addend where the stream has all rows.
void embed(Context& ctx, const TokenBatch& batch, const BaseWeights& base, const Tensor& stream) {
  const ArenaScope scope(ctx.activations);
  const bool split = stream.dim(0) != batch.tokens();
  const Tensor all =
      split ? ctx.activations.alloc({batch.tokens(), stream.dim(1)}, stream.dtype) : stream;
  const VocabShard shard = vocab_shard(base);
  ctx.ops.embedding_forward(ctx.exec,
                            {batch.ids, &base.embedding(), all, shard.first, shard.vocab});
  if (split) ctx.comm.reduce_scatter_sum(ctx.exec, all, stream);
}

}  // namespace

Transformer::Transformer(WeightSource& weights, const AdapterTable* adapters, Stage stage)
    : weights_(weights), adapters_(adapters), stage_(stage) {
  TANDEM_CHECK(stage.first >= 0 && stage.first < stage.last && stage.last <= config().layers,
               "blocks [", stage.first, ", ", stage.last, ") of ", config().layers);
}

const ModelConfig& Transformer::config() const {
  return weights_.base().config();
}

void Transformer::forward(Context& ctx, const TokenBatch& batch, Tensor in, Tensor hidden,
                          Saved* saved, Recompute recompute) const {
  const BaseWeights& base = weights_.base();
  const std::int64_t stream_rows = hidden.dim(0);
  TANDEM_CHECK(stream_rows == batch.tokens() || stream_rows * ctx.comm.size() == batch.tokens(),
               stream_rows, " rows of ", batch.tokens(), " on each of ", ctx.comm.size(), " ranks");
  const auto rows = [&] {
    return ctx.activations.alloc({stream_rows, config().width}, ctx.compute_dtype);
  };
  const std::int64_t mark = ctx.activations.mark();
  ResidualStream streams{{}, rows()};
  if (stage_.first == 0) {
    TANDEM_CHECK(!in.defined(), "the first stage embeds ids itself");
    embed(ctx, batch, base, streams.stream);
    streams.addend = ctx.comm.size() > 1 && stream_rows == batch.tokens();
  } else {
    ctx.ops.copy(ctx.exec, in, streams.stream);
  }
  // Without a block's own tensors kept, one buffer serves the attention stream of all blocks: it
  // lives until the next block has made the sum.
  const bool keep_blocks = saved != nullptr && recompute != Recompute::kBlock;
  const Tensor shared = keep_blocks ? Tensor{} : rows();

  for (std::int64_t layer = stage_.first; layer < stage_.last; ++layer) {
    const BlockRun run{ctx,       batch, config(),   base, weights_.acquire(layer, Phase::kForward),
                       adapters_, layer, stream_rows};
    SavedBlock s;
    s.x = streams.stream;
    // Where x must survive for backward the block's output is fresh memory; else it takes x's own,
    // which is free once attention's sum has been made.
    const Tensor mlp_out = saved != nullptr ? rows() : streams.stream;
    s.residual_attention = keep_blocks ? rows() : shared;
    const std::int64_t block_mark = ctx.activations.mark();
    block_forward(run, s, streams, mlp_out, keep_of(saved != nullptr, recompute));
    streams = {s.residual_attention, mlp_out, run.has_addend()};
    if (!keep_blocks) {
      ctx.activations.reset(block_mark);
      const Tensor x = s.x;
      s = {};
      s.x = x;
    }
    if (saved != nullptr) saved->blocks.push_back(std::move(s));
    weights_.release(layer, Phase::kForward);
  }
  finish_forward(ctx, streams, hidden, saved);
  if (saved == nullptr) ctx.activations.reset(mark);
}

void Transformer::finish_forward(Context& ctx, const ResidualStream& x, Tensor hidden,
                                 Saved* saved) const {
  if (stage_.last == config().layers) {
    Tensor rstd{};
    if (saved != nullptr)
      rstd = ctx.activations.alloc({hidden.dim(0)}, sum_dtype(ctx.compute_dtype));
    add_and_norm(ctx, config(), x, weights_.base().final_norm(), hidden, rstd);
    if (saved != nullptr) {
      saved->final_residual = x.stream;
      saved->final_rstd = rstd;
    }
    return;
  }
  // The next stage wants the stream as one tensor; the norm of the sum is a by-product nobody
  // reads.
  ArenaScope scope(ctx.activations);
  ctx.ops.copy(ctx.exec, x.stream, hidden);
  add_and_norm(ctx, config(), {x.before, hidden, x.addend}, weights_.base().final_norm(),
               ctx.activations.alloc(hidden.shape, ctx.compute_dtype), {});
}

void Transformer::backward(Context& ctx, const TokenBatch& batch, Tensor dhidden,
                           const Saved& saved, Recompute recompute, Tensor din,
                           GradSink& sink) const {
  TANDEM_CHECK(batch.paged == nullptr, "backward needs packed attention");
  ArenaScope scope(ctx.activations);
  const BaseWeights& base = weights_.base();
  const EndGrads* ends = sink.ends();
  Tensor dresidual = dhidden;
  if (stage_.last == config().layers) {
    dresidual = ctx.activations.alloc(dhidden.shape, ctx.compute_dtype);
    ctx.ops.fill_zero(ctx.exec, dresidual);
    ctx.ops.rms_norm_backward(
        ctx.exec, {dhidden, saved.final_residual, base.final_norm(), saved.final_rstd, dresidual,
                   ends != nullptr ? ends->final_norm : Tensor{}});
  }
  for (std::int64_t layer = stage_.last; layer-- > stage_.first;) {
    const BlockRun run{ctx,
                       batch,
                       config(),
                       base,
                       weights_.acquire(layer, Phase::kBackward),
                       adapters_,
                       layer,
                       dhidden.dim(0),
                       sink.acquire(layer)};
    const SavedBlock& s = saved.blocks.at(static_cast<std::size_t>(layer - stage_.first));
    const bool want_dx = layer > stage_.first || din.defined() || ends != nullptr;
    if (recompute == Recompute::kBlock) {
      ArenaScope block(ctx.activations);
      SavedBlock again;
      again.x = s.x;  // already the whole stream
      again.residual_attention = run.stream();
      block_forward(run, again, {{}, again.x}, run.stream(), kKeepAll);
      block_backward(run, again, dresidual, want_dx);
    } else {
      block_backward(run, s, dresidual, want_dx);
    }
    weights_.release(layer, Phase::kBackward);
    sink.ready(layer);
  }
  if (din.defined()) ctx.ops.copy(ctx.exec, dresidual, din);
  if (stage_.first == 0 && ends != nullptr) {
    const VocabShard shard = vocab_shard(base);
    const Tensor dout = all_rows(ctx, dresidual, batch.tokens());
    sink.acquire_end(End::kEmbedding);
    ctx.ops.embedding_backward(ctx.exec,
                               {batch.ids, dout, sink.ends()->embedding, shard.first, shard.vocab});
    sink.ready_end(End::kEmbedding);
  }
}

void Transformer::logits(Context& ctx, Tensor hidden, Tensor logits) const {
  const kernels::PackedWeight& head = weights_.base().lm_head();
  if (ctx.comm.size() == 1)
    return ctx.ops.linear_forward(ctx.exec, {hidden, &head, {}, {}, nullptr, logits, {}});
  // Each rank has a part of the vocabulary. Where not all are equally large, or nobody gathers
  // columns: a sum with zeros changes no logit.
  const ArenaScope scope(ctx.activations);
  const Tensor part = ctx.activations.alloc({hidden.dim(0), head.n}, logits.dtype);
  ctx.ops.linear_forward(ctx.exec, {hidden, &head, {}, {}, nullptr, part, {}});
  if (logits.elements() == part.elements() * ctx.comm.size() &&
      ctx.comm.gather_columns(ctx.exec, part, logits))
    return;
  ctx.ops.fill_zero(ctx.exec, logits);
  ctx.ops.place_columns(ctx.exec, {part, logits, vocab_shard(weights_.base()).first});
  ctx.comm.all_reduce_sum(ctx.exec, logits);
}

void Transformer::loss(Context& ctx, Tensor hidden, Tensor labels, float gradient_scale,
                       Tensor loss, Tensor correct, Tensor dhidden, GradSink* sink) const {
  if (sink != nullptr) sink->acquire_end(End::kHead);
  const EndGrads* ends = sink != nullptr ? sink->ends() : nullptr;
  if (ctx.comm.size() > 1 || ends != nullptr) {
    vocab_loss(ctx, weights_.base(),
               {hidden, labels, gradient_scale, loss, correct, dhidden,
                ends != nullptr ? ends->head : Tensor{}});
    if (sink != nullptr) sink->ready_end(End::kHead);
    return;
  }
  const auto part = [](const Tensor& x, std::int64_t begin, std::int64_t rows) {
    return x.defined() ? x.rows(begin, rows) : x;
  };
  const std::int64_t t = hidden.dim(0);
  for (std::int64_t begin = 0; begin < t; begin += kLossRows) {
    const std::int64_t rows = std::min(kLossRows, t - begin);
    if (begin > 0) weights_.yield();
    ctx.ops.linear_cross_entropy(
        ctx.exec, {part(hidden, begin, rows), &weights_.base().lm_head(), part(labels, begin, rows),
                   gradient_scale, part(loss, begin, rows), part(correct, begin, rows),
                   part(dhidden, begin, rows)});
  }
}

}  // namespace tandem::worker::model
