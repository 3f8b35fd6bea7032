#include "worker/model/transformer.h"

#include "worker/model/stream_rows.h"
#include "worker/model/vocab_loss.h"

#include <cmath>

namespace tandem::worker::model {

/// The residual stream: the sum of both tensors.
struct ResidualStream {
  kernels::Tensor before{};  ///< may be undefined
  kernels::Tensor stream{};
  bool addend = false;  ///< `stream` is this rank's addend of what it stands for
  PartsPending sums{};  ///< what `stream` waits for
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

/// What every part of a block needs: who runs, on what, with which weights and adapters.
/// With sequence parallelism (stream_rows.h) products of rows that are gathered or summed go part
/// by part, attention and gradients of weights over all rows at once.
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
  std::int64_t parts = stream_parts(ctx, batch.tokens(), stream_rows);

  [[nodiscard]] Tensor part(const Tensor& x, std::int64_t p) const {
    return stream_part(x, p, parts);
  }
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
  /// This rank's rows of the residual stream in a tensor of all rows, which is one part.
  [[nodiscard]] Tensor mine(const Tensor& all) const {
    return sequence_parallel() ? all.rows(ctx.comm.rank() * stream_rows, stream_rows) : all;
  }
  /// Collectives read what lies in ctx.room.
  [[nodiscard]] bool in_room() const { return sequence_parallel() && ctx.room != nullptr; }
  /// Where rows lie that are gathered to `all`.
  [[nodiscard]] Tensor to_gather(const Tensor& all) const {
    return in_room() ? ctx.room->normed.rows(0, stream_rows) : mine(all);
  }
  /// Where addends lie that are summed for the stream: in the room, or in new memory.
  [[nodiscard]] Tensor addends() const {
    return in_room() ? ctx.room->addends.rows(0, batch.tokens()) : rows(config.width);
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
  /// Whose adapters a product has over these rows: all of them, or a part.
  [[nodiscard]] const kernels::AdapterRows* adapter_rows(const Tensor& y) const {
    if (!has_adapters()) return nullptr;
    return has_all_rows(y) ? &batch.adapters : &batch.part_adapters;
  }
  /// x is read or, where `make_x` says something, written; `then` follows.
  void linear(Fused fused, const Tensor& x, const kernels::PackedWeight& weight, const Tensor& bias,
              const Tensor& y, const Tensor& u, const kernels::SiluMulArgs& make_x = {},
              const kernels::LinearReader& then = {}) const {
    ctx.ops.linear_forward(ctx.exec,
                           {x, &weight, bias, sites(fused), adapter_rows(y), y, u, make_x, then});
  }
  /// x undefined: by its recipe; dy as `make_dy` says, where that says something.
  [[nodiscard]] kernels::LinearBackwardArgs backward_of(
      Fused fused, const Tensor& dy, const Tensor& x, const kernels::PackedWeight& weight,
      const Tensor& u, const Tensor& dx, const kernels::LinearInputRecipe& make_x = {},
      const kernels::SiluMulBackwardArgs& make_dy = {}) const {
    return {dy,
            x,
            &weight,
            sites(fused),
            adapter_rows(dy),
            u,
            dx,
            x.defined() ? kernels::LinearInputRecipe{} : make_x,
            make_dy};
  }
  void linear_backward(const kernels::LinearBackwardArgs& args) const {
    ctx.ops.linear_backward(ctx.exec, args);
  }
  /// Gradients of a weight, where they are wanted: see BlockGrads.
  void weight_grad(const Tensor& dy, const Tensor& x, Tensor BlockGrads::*weight,
                   const Tensor& dbias = {}) const {
    if (grads != nullptr)
      ctx.ops.linear_weight_grad(ctx.exec, {dy, x, grads->*weight, dbias, grads->fresh});
  }
  /// The norm's backward, as the sums over ranks that are its `dy` come. dresidual, which it adds
  /// to, goes on its way to `next`, where that is given.
  void norm_backward(const Tensor& dy, PartsPending& sums, const Tensor& residual,
                     const Tensor& weight, const Tensor& rstd, const Tensor& dresidual,
                     Tensor BlockGrads::*dweight, GatheredRows* next) const {
    for (std::int64_t p = 0; p < parts; ++p) {
      wait_part(ctx, sums, p);
      ctx.ops.rms_norm_backward(
          ctx.exec, {part(dy, p), part(residual, p), weight, part(rstd, p), part(dresidual, p),
                     grads != nullptr ? grads->*dweight : Tensor{},
                     grads != nullptr && grads->fresh && p == 0});
      if (next != nullptr) gather_part(dresidual, *next, p);
    }
  }
  /// Each rank of a tensor-parallel group has an addend [T, C]; their sum, or this rank's rows of
  /// it, comes to `to`, which is a part of x or elsewhere. Part p begins now; the one before, which
  /// went on beside the product of this one, is taken.
  void sum_part(const Tensor& x, const Tensor& to, PartsPending& sums, std::int64_t p) const {
    if (ctx.comm.size() == 1) return;
    if (!sequence_parallel()) return ctx.comm.all_reduce_sum(ctx.exec, x);
    sums.push_back(ctx.comm.start_reduce_scatter_sum(ctx.exec, part(x, p), part(to, p)));
    if (p > 0) wait_part(ctx, sums, p - 1);
  }
  /// A product whose sum over ranks is the stream `to`. Where `to` has all rows, the sum is left to
  /// the norm that reads it (has_addend()).
  [[nodiscard]] PartsPending linear_to_stream(Fused fused, const Tensor& x,
                                              const kernels::PackedWeight& weight, const Tensor& to,
                                              const Tensor& u, const Tensor& all,
                                              const kernels::SiluMulArgs& make_x = {}) const {
    PartsPending sums;
    const Tensor addend = sequence_parallel() ? all : to;
    for (std::int64_t p = 0; p < parts; ++p) {
      linear(fused, part(x, p), weight, {}, part(addend, p), part(u, p),
             {part(make_x.gate_up, p), part(make_x.out, p)});
      if (sequence_parallel()) sum_part(addend, to, sums, p);
    }
    return sums;
  }
  /// What linear_to_stream leaves is this rank's addend of the stream.
  [[nodiscard]] bool has_addend() const { return ctx.comm.size() > 1 && !sequence_parallel(); }
  /// Part p of the stream's rows x (which may be a part of `to.all`) goes to all ranks; nothing to
  /// do where x has all rows.
  void gather_part(const Tensor& x, GatheredRows& to, std::int64_t p) const {
    if (sequence_parallel())
      to.pending.push_back(ctx.comm.start_all_gather(ctx.exec, part(x, p), part(to.all, p)));
  }
  [[nodiscard]] GatheredRows gather(const Tensor& x, const Tensor& all) const {
    GatheredRows gathered{all, {}};
    for (std::int64_t p = 0; p < parts; ++p) gather_part(x, gathered, p);
    return gathered;
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

/// `raw` defined: from there to qkv.
kernels::RopeArgs rope_of(const BlockRun& run, const Tensor& qkv, const Tensor& raw = {}) {
  const PagedKv* paged = run.batch.paged;
  return {qkv,
          run.batch.positions,
          run.base.inv_freq(),
          run.base.rope_attention_factor(),
          run.config.heads,
          run.config.kv_heads,
          run.config.head_dim,
          cache_of(run),
          paged ? paged->cache_slots : Tensor{},
          run.weights.qk_norm,
          run.config.norm_eps,
          raw};
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

/// All rows of the norm of a stream, whose parts are taken as they come. They are left in `kept` as
/// far as it goes, and in `all` where it does not hold them all.
GatheredRows norm_all_rows(const BlockRun& run, ResidualStream& in, const Tensor& weight,
                           const Tensor& kept, const Tensor& all, const Tensor& rstd) {
  GatheredRows normed{run.has_all_rows(kept) ? kept : all, {}};
  const bool keeps_own = kept.defined() && !run.has_all_rows(kept);
  const Tensor mine = keeps_own && !run.in_room() ? kept : run.to_gather(normed.all);
  for (std::int64_t p = 0; p < run.parts; ++p) {
    wait_part(run.ctx, in.sums, p);
    add_and_norm(run.ctx, run.config,
                 {run.part(in.before, p), run.part(in.stream, p), in.addend, {}}, weight,
                 run.part(mine, p), run.part(rstd, p));
    run.gather_part(mine, normed, p);
    if (keeps_own && run.in_room())
      run.ctx.ops.copy(run.ctx.exec, run.part(mine, p), run.part(kept, p));
  }
  return normed;
}

/// One block. On entry the residual stream is `in`, of which s.x is the stream and then holds the
/// whole. On return it is s.residual_attention (memory given by the caller, as is `mlp_out`) +
/// mlp_out, which waits for what is returned and is an addend where run.has_addend(). Everything
/// else that `keep` names is allocated here.
PartsPending block_forward(const BlockRun& run, SavedBlock& s, ResidualStream& in,
                           const Tensor& mlp_out, const Keep& keep) {
  allocate_kept(run, s, keep);
  const ArenaScope scope(run.ctx.activations);
  SavedBlock b = s;
  // All rows of what is not kept with all of them: a norm's output, then a product's addend.
  const bool keeps_rows =
      keep.normed && (!run.sequence_parallel() || (keep.gathered && run.in_room()));
  const Tensor all = keeps_rows ? Tensor{} : run.rows(run.config.width);
  const Tensor addends = run.in_room() ? run.addends() : all;
  GatheredRows normed =
      norm_all_rows(run, in, run.weights.attention_norm, b.normed_attention, all, b.rstd_attention);
  // Backward of a norm wants its input: what is rotated lies elsewhere, and is not kept.
  const bool apart = keep.for_backward && run.config.qk_norm;
  const Tensor rotated = apart ? run.rows(run.qkv_width()) : b.qkv;
  const kernels::RopeArgs rope = rope_of(run, rotated, apart ? b.qkv : Tensor{});
  const bool joins = run.parts == 1 && !apart;
  for (std::int64_t p = 0; p < run.parts; ++p)
    run.linear(Fused::kQkv, normed.part(run.ctx, p, run.parts), run.weights.qkv,
               run.weights.qkv_bias, run.part(b.qkv, p), run.part(b.u[0], p), {},
               {.rope = joins ? rope : kernels::RopeArgs{}});
  if (!joins) run.ctx.ops.rope_forward(run.ctx.exec, rope);
  attend(run, rotated, b.attention_out, b.lse);
  ResidualStream stream{b.x, b.residual_attention, run.has_addend(),
                        run.linear_to_stream(Fused::kO, b.attention_out, run.weights.o,
                                             b.residual_attention, b.u[1], addends)};
  normed = norm_all_rows(run, stream, run.weights.mlp_norm, b.normed_mlp, all, b.rstd_mlp);
  if (!keep.gate_up) b.gate_up = run.rows(2 * run.config.mlp_width);
  if (!keep.act) b.act = run.rows(run.config.mlp_width);
  // Adapters' products take silu's output as they read it; else the product before leaves it.
  const bool before = !keep.for_backward && !run.has_adapters();
  for (std::int64_t p = 0; p < run.parts; ++p) {
    const Tensor gate_up = run.part(b.gate_up, p);
    run.linear(Fused::kGateUp, normed.part(run.ctx, p, run.parts), run.weights.gate_up, {}, gate_up,
               run.part(b.u[2], p), {},
               {.silu_mul = before ? kernels::SiluMulArgs{gate_up, run.part(b.act, p)}
                                   : kernels::SiluMulArgs{}});
  }
  return run.linear_to_stream(
      Fused::kDown, b.act, run.weights.down, mlp_out, b.u[3], addends,
      before ? kernels::SiluMulArgs{} : kernels::SiluMulArgs{b.gate_up, b.act});
}

// -- backward
// ----------------------------------------------------------------------------------------

/// dqkv: of the qkv that the product made, before norm and rotation.
void attention_and_rope_backward(const BlockRun& run, const SavedBlock& s, const Tensor& dattention,
                                 const Tensor& dqkv) {
  const ArenaScope scope(run.ctx.activations);
  kernels::Ops& ops = run.ctx.ops;
  Tensor rotated = s.qkv;
  if (run.config.qk_norm) {
    rotated = run.rows(run.qkv_width());
    ops.rope_forward(run.ctx.exec, rope_of(run, rotated, s.qkv));
  }
  ops.attention_backward(run.ctx.exec,
                         {attention_spec(run.config), dattention, rotated, s.attention_out, s.lse,
                          run.batch.seq_offsets, run.batch.seq_len_max, dqkv});
  kernels::RopeBackwardArgs rope{dqkv,
                                 run.batch.positions,
                                 run.base.inv_freq(),
                                 run.base.rope_attention_factor(),
                                 run.config.heads,
                                 run.config.kv_heads,
                                 run.config.head_dim};
  if (run.config.qk_norm) {
    rope.qk_norm = run.weights.qk_norm;
    rope.norm_eps = run.config.norm_eps;
    rope.raw = s.qkv;
    if (run.grads != nullptr) rope.dqk_norm = run.grads->qk_norm, rope.overwrite = run.grads->fresh;
  }
  ops.rope_backward(run.ctx.exec, rope);
}

/// dresidual, of the stream's rows: on entry the gradient of the block's output stream, on return
/// that of its input stream (`want_dx` false: nobody asks for it, dresidual is then left half way).
/// `dstream`: all rows of it, on entry on their way; on return again, if the block before is to
/// come (`more`). Gradients of weights stand where they hide collectives: the first product's
/// beside the sum of the second's dx, the second's beside the gather of what the norm makes of it.
void block_backward(const BlockRun& run, const SavedBlock& s, const Tensor& dresidual,
                    GatheredRows& dstream, bool want_dx, bool more) {
  ArenaScope scope(run.ctx.activations);
  kernels::Ops& ops = run.ctx.ops;
  const Tensor dnormed_all = run.addends();
  const Tensor dnormed = run.in_room() ? run.stream() : run.mine(dnormed_all);
  // Gradients of weights are the only other readers of a linear's x: without them, x that was not
  // kept is made by the product's backward.
  const bool by_recipe = run.grads == nullptr;
  const auto norm_recipe = [&](const Tensor& stream, const Tensor& weight, const Tensor& rstd) {
    return kernels::LinearInputRecipe{.norm = {stream, {}, weight, run.config.norm_eps, {}, rstd}};
  };
  // The norm of a stream that is whole already: undefined with its recipe; else once more, where it
  // was not kept; and all its rows, which arrive beside the product that comes first.
  const auto normed = [&](const Tensor& kept, const Tensor& stream, const Tensor& weight) {
    if (run.has_all_rows(kept)) return GatheredRows{kept, {}};
    if (by_recipe && !run.sequence_parallel()) return GatheredRows{};
    const Tensor all = run.rows(run.config.width);
    const Tensor mine = kept.defined() && !run.in_room() ? kept : run.to_gather(all);
    if (!kept.defined())
      add_and_norm(run.ctx, run.config, {{}, stream}, weight, mine, {});
    else if (run.in_room())
      ops.copy(run.ctx.exec, kept, mine);
    return run.gather(mine, all);
  };
  {
    ArenaScope mlp(run.ctx.activations);
    SavedBlock again = s;
    GatheredRows normed_mlp = normed(s.normed_mlp, s.residual_attention, run.weights.mlp_norm);
    if (!s.gate_up.defined()) {
      again.gate_up = run.rows(2 * run.config.mlp_width);
      for (std::int64_t p = 0; p < run.parts; ++p)
        run.linear(Fused::kGateUp, normed_mlp.part(run.ctx, p, run.parts), run.weights.gate_up, {},
                   run.part(again.gate_up, p), run.part(s.u[2], p));
    }
    if (!s.act.defined() && !by_recipe) {
      again.act = run.rows(run.config.mlp_width);
      ops.silu_mul_forward(run.ctx.exec, {again.gate_up, again.act});
    }
    const Tensor dact = run.rows(run.config.mlp_width);
    const auto down = [&](std::int64_t p) {
      return run.backward_of(Fused::kDown, dstream.part(run.ctx, p, run.parts),
                             run.part(again.act, p), run.weights.down, run.part(s.u[3], p),
                             run.part(dact, p), {.silu_mul = {run.part(again.gate_up, p), {}}});
    };
    const auto gate_up = [&](std::int64_t p) {
      // The gradient takes gate_up's memory: nobody reads that again.
      const Tensor both = run.part(again.gate_up, p);
      return run.backward_of(Fused::kGateUp, both, normed_mlp.part(run.ctx, p, run.parts),
                             run.weights.gate_up, run.part(s.u[2], p), run.part(dnormed_all, p),
                             norm_recipe(s.residual_attention, run.weights.mlp_norm, s.rstd_mlp),
                             {run.part(dact, p), both, both});
    };
    PartsPending sums;
    if (run.ctx.comm.size() == 1) {
      ops.mlp_backward(run.ctx.exec, {down(0), gate_up(0)});
      run.sum_part(dnormed_all, dnormed, sums, 0);
    } else {  // all of one first: what the other waits for arrives beside it
      for (std::int64_t p = 0; p < run.parts; ++p) run.linear_backward(down(p));
      for (std::int64_t p = 0; p < run.parts; ++p) {
        run.linear_backward(gate_up(p));
        run.sum_part(dnormed_all, dnormed, sums, p);
      }
    }
    run.weight_grad(dstream.all, again.act, &BlockGrads::down);
    dstream.pending.clear();
    run.norm_backward(dnormed, sums, s.residual_attention, run.weights.mlp_norm, s.rstd_mlp,
                      dresidual, &BlockGrads::mlp_norm, &dstream);
    run.weight_grad(again.gate_up, normed_mlp.all, &BlockGrads::gate_up);
  }
  GatheredRows normed_attention = normed(s.normed_attention, s.x, run.weights.attention_norm);
  const Tensor dattention = run.rows(run.config.heads * run.config.head_dim);
  for (std::int64_t p = 0; p < run.parts; ++p)
    run.linear_backward(run.backward_of(Fused::kO, dstream.part(run.ctx, p, run.parts),
                                        run.part(s.attention_out, p), run.weights.o,
                                        run.part(s.u[1], p), run.part(dattention, p)));
  const Tensor dqkv = run.rows(run.qkv_width());
  attention_and_rope_backward(run, s, dattention, dqkv);
  PartsPending sums;
  for (std::int64_t p = 0; p < run.parts; ++p) {
    run.linear_backward(run.backward_of(
        Fused::kQkv, run.part(dqkv, p), normed_attention.part(run.ctx, p, run.parts),
        run.weights.qkv, run.part(s.u[0], p), want_dx ? run.part(dnormed_all, p) : Tensor{},
        norm_recipe(s.x, run.weights.attention_norm, s.rstd_attention)));
    if (want_dx) run.sum_part(dnormed_all, dnormed, sums, p);
  }
  run.weight_grad(dstream.all, s.attention_out, &BlockGrads::o);
  dstream.pending.clear();
  if (want_dx)
    run.norm_backward(dnormed, sums, s.x, run.weights.attention_norm, s.rstd_attention, dresidual,
                      &BlockGrads::attention_norm, more ? &dstream : nullptr);
  run.weight_grad(dqkv, normed_attention.all, &BlockGrads::qkv,
                  run.grads != nullptr ? run.grads->qkv_bias : Tensor{});
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
  if (split) sum_stream(ctx, all, stream);
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
    PartsPending sums =
        block_forward(run, s, streams, mlp_out, keep_of(saved != nullptr, recompute));
    streams = {s.residual_attention, mlp_out, run.has_addend(), std::move(sums)};
    if (!keep_blocks) {
      ctx.activations.reset(block_mark);
      const Tensor x = s.x;
      s = {};
      s.x = x;
    }
    if (saved != nullptr) saved->blocks.push_back(std::move(s));
    weights_.release(layer, Phase::kForward);
  }
  wait_parts(ctx, streams.sums);
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
  const std::int64_t rows = dhidden.dim(0);
  const bool split = rows != batch.tokens();
  // Where all ranks can read it.
  const auto room = [&] {
    return split && ctx.room != nullptr ? ctx.room->gradients.rows(0, rows) : Tensor{};
  };
  Tensor dresidual = room();
  if (stage_.last == config().layers) {
    if (!dresidual.defined()) dresidual = ctx.activations.alloc(dhidden.shape, ctx.compute_dtype);
    ctx.ops.fill_zero(ctx.exec, dresidual);
    ctx.ops.rms_norm_backward(
        ctx.exec, {dhidden, saved.final_residual, base.final_norm(), saved.final_rstd, dresidual,
                   ends != nullptr ? ends->final_norm : Tensor{}});
  } else if (dresidual.defined()) {
    ctx.ops.copy(ctx.exec, dhidden, dresidual);
  } else {
    dresidual = dhidden;
  }
  const std::int64_t parts = stream_parts(ctx, batch.tokens(), rows);
  GatheredRows dstream{dresidual, {}};
  if (split) {
    dstream.all = ctx.activations.alloc({batch.tokens(), config().width}, ctx.compute_dtype);
    for (std::int64_t p = 0; p < parts; ++p)
      dstream.pending.push_back(ctx.comm.start_all_gather(
          ctx.exec, stream_part(dresidual, p, parts), stream_part(dstream.all, p, parts)));
  }
  const bool embeds = stage_.first == 0 && ends != nullptr;
  for (std::int64_t layer = stage_.last; layer-- > stage_.first;) {
    const BlockRun run{ctx,
                       batch,
                       config(),
                       base,
                       weights_.acquire(layer, Phase::kBackward),
                       adapters_,
                       layer,
                       rows,
                       sink.acquire(layer)};
    const SavedBlock& s = saved.blocks.at(static_cast<std::size_t>(layer - stage_.first));
    const bool more = layer > stage_.first || embeds;
    const bool want_dx = more || din.defined();
    if (recompute == Recompute::kBlock) {
      ArenaScope block(ctx.activations);
      SavedBlock again;
      again.x = s.x;  // already the whole stream
      again.residual_attention = run.stream();
      ResidualStream in{{}, again.x};
      PartsPending unused = block_forward(run, again, in, run.stream(), kKeepAll);
      wait_parts(ctx, unused);
      block_backward(run, again, dresidual, dstream, want_dx, more);
    } else {
      block_backward(run, s, dresidual, dstream, want_dx, more);
    }
    weights_.release(layer, Phase::kBackward);
    sink.ready(layer);
  }
  if (din.defined()) ctx.ops.copy(ctx.exec, dresidual, din);
  if (embeds) {
    const VocabShard shard = vocab_shard(base);
    const Tensor dout = dstream.wait(ctx);
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
