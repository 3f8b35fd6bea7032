// The one forward path: packed tokens through a range of blocks, for training rows, prefill chunks
// and decode tokens alike; they differ only in the attention they ask for. Backward by hand, in
// reverse order of forward. Stateless but for weights and adapters it refers to; one device thread.
//
// Over tensor-parallel ranks the residual stream is either whole on every rank, or each has some of
// its rows (sequence parallelism, stream_rows.h): S = T or T / ranks, as `hidden` says. The sums
// are the same bits.
#pragma once

#include "worker/model/adapter.h"
#include "worker/model/context.h"

namespace tandem::worker::model {

/// Paged attention instead of packed attention (serving). All device tensors, see
/// kernels/op_args.h.
struct PagedKv {
  std::vector<kernels::KvCache> caches;  ///< [layers]
  kernels::Tensor cache_slots;           ///< [T] i32
  kernels::Tensor q_offsets, kv_lens;    ///< [S + 1], [S] i32
  kernels::Tensor block_tables;          ///< [S, blocks_max] i32
  std::int64_t kv_len_max = 0;
};

/// One batch. T may exceed the real tokens: inert rows have id 0, position 0, slot -1, and lie at
/// the end.
struct TokenBatch {
  kernels::Tensor ids;        ///< [T] i32
  kernels::Tensor positions;  ///< [T] i32
  kernels::AdapterRows adapters;
  kernels::AdapterRows part_adapters;  ///< of stream_part()s of the rows, training only
  kernels::Tensor seq_offsets;         ///< [S + 1] i32, training only
  std::int64_t seq_len_max = 0;        ///< training only
  const PagedKv* paged = nullptr;      ///< serving only
  [[nodiscard]] std::int64_t tokens() const { return ids.dim(0); }
};

/// What is recomputed in backward instead of kept: nothing; the norms' outputs and silu(gate) * up
/// (cheap: where a product's backward reads them); gate_up and what follows from it (a product);
/// whole blocks. With sequence parallelism all but the first gather the norms' outputs once more.
enum class Recompute : int { kNone = 0, kMlp = 1, kBlock = 2, kElementwise = 3 };

/// What one block keeps for its backward (cd unless noted). Recomputed tensors are absent: normed_*
/// and act with Recompute::kElementwise, gate_up and act with kMlp, all but `x` with kBlock.
struct SavedBlock {
  kernels::Tensor x;                         ///< [S, C] residual stream as the block received it
  kernels::Tensor residual_attention;        ///< [S, C] stream entering the mlp norm
  kernels::Tensor rstd_attention, rstd_mlp;  ///< [S] f32
  kernels::Tensor normed_attention, normed_mlp;  ///< [T, C] with Recompute::kNone, else [S, C]
  /// [T, (H + 2K) * D] rotated; of a model with qk_norm as the product left it, before the norm:
  /// backward norms and rotates it once more.
  kernels::Tensor qkv;
  kernels::Tensor attention_out;     ///< [T, H * D]
  kernels::Tensor lse;               ///< [T, H] f32
  kernels::Tensor gate_up;           ///< [T, 2F]
  kernels::Tensor act;               ///< [T, F] silu(gate) * up
  std::array<kernels::Tensor, 4> u;  ///< lora inputs A x of the four fused linears
};
struct Saved {
  std::vector<SavedBlock> blocks;
  kernels::Tensor final_residual;  ///< [S, C]
  kernels::Tensor final_rstd;      ///< [S] f32
};

struct ResidualStream;  // of transformer.cc

class Transformer {
 public:
  Transformer(WeightSource& weights, const AdapterTable* adapters, Stage stage);

  /// hidden [S, C] cd = final-norm output (last stage) or the residual stream (others). `in` is the
  /// residual stream from the stage before, undefined on the first stage (ids are embedded).
  /// `saved` null: serving or evaluation; else filled with tensors from ctx.activations, which the
  /// caller frees after backward by resetting the arena.
  void forward(Context& ctx, const TokenBatch& batch, kernels::Tensor in, kernels::Tensor hidden,
               Saved* saved, Recompute recompute) const;
  /// dhidden [S, C] cd is consumed (overwritten); adapter gradients accumulate through the table's
  /// trainable slots; din [S, C] cd (undefined on the first stage) receives the gradient of `in`.
  void backward(Context& ctx, const TokenBatch& batch, kernels::Tensor dhidden, const Saved& saved,
                Recompute recompute, kernels::Tensor din, GradSink& sink) const;
  /// logits [S, V] f32 of hidden rows [S, C], the whole vocabulary's on every tensor-parallel rank.
  void logits(Context& ctx, kernels::Tensor hidden, kernels::Tensor logits) const;
  /// Chunked head and loss of hidden [S, C] against labels [T], see LinearCrossEntropyArgs; dhidden
  /// undefined: evaluation. `sink`: where the head's gradient goes, if anywhere.
  void loss(Context& ctx, kernels::Tensor hidden, kernels::Tensor labels, float gradient_scale,
            kernels::Tensor loss, kernels::Tensor correct, kernels::Tensor dhidden,
            GradSink* sink = nullptr) const;
  [[nodiscard]] const ModelConfig& config() const;

 private:
  /// The final norm of the stream, or the stream itself on a stage that is not the last.
  void finish_forward(Context& ctx, const ResidualStream& x, kernels::Tensor hidden,
                      Saved* saved) const;

  WeightSource& weights_;
  const AdapterTable* adapters_;
  const Stage stage_;
};

}  // namespace tandem::worker::model
