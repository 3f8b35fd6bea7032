// One argument struct per op. Letters, once for the whole engine:
//   T tokens (rows) of a packed batch · C model width · H query heads · K kv heads · D head dim ·
//   F mlp width · V vocabulary · S sequences · R lora rank · N, I a linear's outputs and inputs
// `cd` is the compute dtype of the engine (f32, bf16 or f16). All tensors are row-major and
// contiguous. Counts, offsets, tables and slots are device tensors (i32 unless said otherwise): the
// host knows only their bounds, so one captured graph can serve any batch.
#pragma once

#include "kernels/tensor.h"

#include <vector>

namespace tandem::kernels {

/// A frozen matrix in the backend's own packed layout: one copy that serves the forward product,
/// the input gradient and row lookup. Made by Ops::pack_weight; lives as long as the arena it came
/// from.
struct PackedWeight {
  Tensor storage;             ///< [bytes] u8, layout private to the backend
  DType dtype = DType::kF32;  ///< precision of the elements: the compute dtype
  std::int64_t n = 0, i = 0;  ///< logical W [n, i]
};

/// One adapter's pair at one linear site, as the device sees it. `rank` 0: the adapter has none
/// here.
struct LoraEntry {
  const void* a = nullptr;  ///< A [rank, I] cd
  const void* b = nullptr;  ///< B [site_n, rank] cd
  float* da = nullptr;      ///< f32 [rank, I], accumulated by backward; null: frozen
  float* db = nullptr;      ///< f32 [site_n, rank], accumulated by backward; null: frozen
  std::int32_t rank = 0;
  float scale = 0.0f;  ///< s in y += s B (A x): alpha / r, or alpha / sqrt(r) with rsLoRA
};

/// One named projection inside a fused linear: outputs [n_begin, n_begin + n) of it.
struct LoraSite {
  std::int64_t n_begin = 0, n = 0;
  /// Device array of LoraEntry, one per adapter slot (u8 [slots * sizeof(LoraEntry)]).
  Tensor entries;
  std::uint64_t dropout_stream = 0;  ///< distinct per site: masks of two sites are independent
};

/// Which adapter each row carries: the batch is cut into segments of consecutive rows, each with
/// one slot or none (-1). Inert rows may lie in any segment: what they give is never used, and
/// their gradients are zero. An adapter-free batch has one segment.
struct AdapterRows {
  Tensor segment_offsets;  ///< [segments_max + 1] i32, ascending; [0] = 0; unused tail repeats T
  Tensor segment_slots;    ///< [segments_max] i32; -1: no adapter
  std::int64_t segments_max = 0;
  std::int64_t rank_max = 0;  ///< no entry in any slot exceeds it; 0: no adapters at all
  float dropout = 0.0f;       ///< probability, training only; scales kept inputs by 1/(1-p)
  std::uint64_t dropout_seed =
      0;  ///< mask = f(seed, site stream, row, column); backward repeats it
};

struct EmbeddingArgs {
  Tensor ids;                 ///< [T] i32 in [0, V)
  const PackedWeight* table;  ///< [V, C]
  Tensor out;                 ///< [T, C] cd, overwritten
  /// A shard of the vocabulary: the table holds rows [first, first + table->n) of `vocab` (0: the
  /// table is whole); rows of `out` whose id lies outside are zero.
  std::int64_t first = 0, vocab = 0;
};
struct EmbeddingBackwardArgs {
  Tensor ids;                         ///< [T] i32
  Tensor dout;                        ///< [T, C] cd
  Tensor dtable;                      ///< [V, C] f32, accumulated in ascending order of rows
  std::int64_t first = 0, vocab = 0;  ///< as in forward: ids outside the shard add nothing
};

/// residual += delta (when defined); y = residual * rstd * weight, rstd = 1/sqrt(mean(residual^2) +
/// eps). Statistics in f32; y rounded once from f32(residual * rstd) * weight.
struct AddRmsNormArgs {
  Tensor residual;  ///< [T, C] cd, updated in place
  Tensor delta;     ///< [T, C] cd or undefined
  Tensor weight;    ///< [C] cd
  float eps;
  Tensor y;     ///< [T, C] cd, overwritten
  Tensor rstd;  ///< [T] f32, overwritten; may be undefined when no backward follows
};
struct RmsNormBackwardArgs {
  Tensor dy;         ///< [T, C] cd
  Tensor residual;   ///< [T, C] cd as the forward left it
  Tensor weight;     ///< [C] cd
  Tensor rstd;       ///< [T] f32
  Tensor dresidual;  ///< [T, C] cd, accumulated
  /// [C] f32, accumulated: the sum over rows of dy * (residual * rstd), in an order that is fixed;
  /// undefined: not wanted.
  Tensor dweight = {};
  bool overwrite = false;  ///< dweight held nothing: it is written instead
};

/// out = silu(gate) * up, with gate_up [T, 2F] = gate then up.
struct SiluMulArgs {
  Tensor gate_up;  ///< [T, 2F] cd
  Tensor out;      ///< [T, F] cd, overwritten
};
struct SiluMulBackwardArgs {
  Tensor dout;      ///< [T, F] cd
  Tensor gate_up;   ///< [T, 2F] cd
  Tensor dgate_up;  ///< [T, 2F] cd, overwritten; may be the same memory as gate_up
};

/// Rotates q and k inside qkv in place (rotate-half pairing: element d with d + D/2, the Hugging
/// Face layout) and, when a cache is given, writes k and v of each row to it. Angles in f32:
/// position * inv_freq[d], cos and sin times `attention_factor` (yarn; else 1).
/// With qk_norm each head of q and k is first normed, and rounded, as AddRmsNorm would.
struct KvCache {
  Tensor k, v;  ///< [blocks, K, block_size, D] cd each
  std::int64_t block_size = 0;
};
struct RopeArgs {
  Tensor qkv;        ///< [T, (H + 2K) * D] cd: q heads, then k heads, then v heads; in place
  Tensor positions;  ///< [T] i32
  Tensor inv_freq;   ///< [D/2] f32
  float attention_factor;
  std::int64_t heads, kv_heads, head_dim;
  const KvCache* cache;  ///< null in training
  Tensor cache_slots;    ///< [T] i32: block * block_size + offset; -1: do not write (inert rows)
  Tensor qk_norm = {};   ///< [2 * D] cd: weight of every q head, then of every k head; or undefined
  float norm_eps = 0.0f;
  /// With qk_norm, [T, (H + 2K) * D] cd: q, k and v before norm and rotation, read instead of qkv,
  /// which is then overwritten; undefined: in place.
  Tensor raw = {};
};
/// Largest head of a norm of q and k.
inline constexpr std::int64_t kQkNormDimMax = 1024;
/// The op that reads a linear's y, in place of the call that would follow: one at most.
struct LinearReader {
  SiluMulArgs silu_mul{};  ///< out defined: gate_up is y, whose contents are then undefined
  RopeArgs rope{};         ///< qkv defined: it is y
  [[nodiscard]] bool defined() const { return silu_mul.out.defined() || rope.qkv.defined(); }
};

/// y = x W^T + bias + sum over sites of s B (A dropout(x)).
struct LinearArgs {
  Tensor x;                     ///< [T, I] cd; with make_x overwritten
  const PackedWeight* weight;   ///< [N, I]
  Tensor bias;                  ///< [N] cd or undefined
  std::vector<LoraSite> sites;  ///< empty: plain linear
  const AdapterRows* adapters;  ///< null: plain linear
  Tensor y;                     ///< [T, N] cd, or f32 whatever cd is (logits), overwritten
  /// [T, sites * rank_max] cd, overwritten: s A dropout(x) of each site in turn, zeros where a row
  /// has no adapter or a smaller rank; saved for backward. May be undefined (serving).
  Tensor u;
  /// gate_up defined: x is its out, made to the op's bits on the way to u, if the backend can; else
  /// by its op, before.
  SiluMulArgs make_x{};
  /// Made of the sums, rounded as y is, if the backend can; else by its op, after.
  LinearReader then{};
};
/// The op that made a linear's x, without its output: backward makes x once more, to the same bits.
/// At most one is given.
struct LinearInputRecipe {
  AddRmsNormArgs norm{};   ///< residual defined: x is its y; no delta, rstd as the forward left it
  SiluMulArgs silu_mul{};  ///< gate_up defined: x is its out
  [[nodiscard]] bool defined() const {
    return norm.residual.defined() || silu_mul.gate_up.defined();
  }
};
/// dA of the linear that read silu * up, left to the op that makes the gradient of gate and up.
struct LeftFactorGrad {
  Tensor du;  ///< [T, sites * rank_max] cd, as that linear's backward left it
  std::vector<LoraSite> sites;
};
/// dx = dy W + sum over sites of dropout'(s (dy B) A); dA += s (dy B)^T dropout(x); dB += dy^T u.
/// Inputs that the caller has not are made where they are read, if the backend can; else by their
/// op, before: x in scratch, and only where there are adapters.
struct LinearBackwardArgs {
  Tensor dy;  ///< [T, N] cd; with make_dy overwritten
  Tensor x;   ///< [T, I] cd, as in forward; undefined with make_x
  const PackedWeight* weight;
  std::vector<LoraSite> sites;
  const AdapterRows* adapters;
  Tensor u;   ///< as saved by forward; undefined: recomputed
  Tensor dx;  ///< [T, I] cd, overwritten; undefined: only dA and dB are wanted
  LinearInputRecipe make_x{};
  SiluMulBackwardArgs make_dy{};  ///< dout defined: dy is its dgate_up
  /// [T, sites * rank_max] cd, overwritten: s dy B; dA is then left to who takes it in `left`.
  /// Both are mlp_backward's to give.
  Tensor du{};
  LeftFactorGrad left{};
};
/// linear_backward(down), then linear_backward(gate_up), whose make_dy has down's dx as dout. dA of
/// down is made in the pass over gate and up that makes their gradient, if the backend can.
struct MlpBackwardArgs {
  LinearBackwardArgs down, gate_up;
};
/// dW += dy^T x, db += sum of dy's rows: full fine-tuning. The sums over T are taken in a fixed
/// order.
struct LinearWeightGradArgs {
  Tensor dy;               ///< [T, N] cd
  Tensor x;                ///< [T, I] cd, as in forward
  Tensor dweight;          ///< [N, I] f32, accumulated
  Tensor dbias;            ///< [N] f32, accumulated; undefined: no bias
  bool overwrite = false;  ///< dweight and dbias held nothing: they are written instead
};
/// Writes new values into a packed weight of the same shape: after an optimizer step, or when a
/// gathered block arrives.
struct RepackWeightArgs {
  Tensor rows;           ///< [n, i] f32 or the weight's dtype, rounded to it
  PackedWeight* weight;  ///< overwritten
};

/// Inverse rotation of dq and dk in place; with qk_norm then the norm's backward, in place too: of
/// the rotated-back gradient as it is rounded. The norm's statistics are made of `raw` once more.
struct RopeBackwardArgs {
  Tensor dqkv;  ///< [T, (H + 2K) * D] cd, in place
  Tensor positions, inv_freq;
  float attention_factor;
  std::int64_t heads, kv_heads, head_dim;
  Tensor qk_norm = {};  ///< [2 * D] cd, as in forward; undefined: none
  float norm_eps = 0.0f;
  Tensor raw = {};  ///< with qk_norm: [T, (H + 2K) * D] cd, as forward read it
  /// [2 * D] f32, accumulated: the sum over rows and heads, of q and of k, in an order that is
  /// fixed; undefined: not wanted.
  Tensor dqk_norm = {};
  bool overwrite = false;  ///< dqk_norm held nothing: it is written instead
};

/// What the mathematics of attention is; the same for training, prefill and decode.
struct AttentionSpec {
  std::int64_t heads, kv_heads, head_dim;
  float scale;              ///< usually 1/sqrt(D)
  std::int64_t window = 0;  ///< keys j with position - j < window; 0: all
  float soft_cap = 0.0f;    ///< cap * tanh(score / cap); 0: none
};
/// Causal attention inside each sequence of a packed batch.
struct AttentionArgs {
  AttentionSpec spec;
  Tensor qkv;          ///< [T, (H + 2K) * D] cd, rotated
  Tensor seq_offsets;  ///< [S + 1] i32; rows beyond the last offset are inert: out rows zeroed
  std::int64_t seq_len_max;  ///< host bound
  Tensor out;                ///< [T, H * D] cd, overwritten
  Tensor lse;  ///< [T, H] f32, overwritten (inert rows zeroed); undefined when no backward follows
};
struct AttentionBackwardArgs {
  AttentionSpec spec;
  Tensor dout;           ///< [T, H * D] cd
  Tensor qkv, out, lse;  ///< as forward saw and left them
  Tensor seq_offsets;
  std::int64_t seq_len_max;
  Tensor dqkv;  ///< [T, (H + 2K) * D] cd, overwritten (inert rows zeroed)
};
/// Attention of new rows against a paged cache that already holds their own k and v. Sequence s
/// owns rows [q_offsets[s], q_offsets[s+1]); its last row attends to keys 0 .. kv_lens[s]-1,
/// earlier rows to one less each. Key j lies in block block_tables[s][j / block_size] at j %
/// block_size. Keys before a sequence's new rows are older than the last upload on the queue.
/// kInvariant: a row's bits equal those of AttentionArgs over the same sequence.
struct PagedAttentionArgs {
  AttentionSpec spec;
  Tensor qkv;           ///< [T, (H + 2K) * D] cd, rotated; only q is read
  Tensor q_offsets;     ///< [S + 1] i32; rows beyond the last are inert: out rows zeroed
  Tensor kv_lens;       ///< [S] i32
  Tensor block_tables;  ///< [S, blocks_max] i32
  const KvCache* cache;
  std::int64_t kv_len_max;  ///< host bound
  Tensor out;               ///< [T, H * D] cd, overwritten
};

/// Rows of x by index: out[j] = x[index[j]].
struct GatherRowsArgs {
  Tensor x;      ///< [T, C] cd
  Tensor index;  ///< [S] i32 in [0, T)
  Tensor out;    ///< [S, C] cd, overwritten
};

/// to[:, first .. first + n) = from; the other columns are left.
struct PlaceColumnsArgs {
  Tensor from;  ///< [T, n]
  Tensor to;    ///< [T, N], same dtype
  std::int64_t first = 0;
};

/// Negative log-likelihood of each row's label under softmax(x W^T), and its gradient, in chunks of
/// rows: [T, V] never exists. Rows with label < 0 are ignored (loss 0, gradient 0).
inline constexpr std::int64_t kIgnoreLabel = -100;
struct LinearCrossEntropyArgs {
  Tensor x;                    ///< [T, C] cd
  const PackedWeight* weight;  ///< [V, C]
  Tensor labels;               ///< [T] i32
  float gradient_scale;  ///< dx = gradient_scale * d(sum of losses)/dx, e.g. 1 / trained tokens of
                         ///< the step
  Tensor loss;           ///< [T] f32, overwritten
  Tensor correct;        ///< [T] f32: 1 where argmax is the label; or undefined
  Tensor dx;             ///< [T, C] cd, overwritten; undefined: no backward (evaluation)
};
/// The same loss where the logits lie in chunks of their own (full fine-tuning, which needs the
/// gradient of the head too) or in shards of the vocabulary (tensor parallelism). First each
/// shard's statistics, which are then gathered; then loss and gradient from everybody's.
struct CrossEntropyStatsArgs {
  Tensor logits;  ///< [T, V] f32: vocabulary entries [first, first + V)
  Tensor labels;  ///< [T] i32, of the whole vocabulary; negative: ignored
  std::int64_t first = 0;
  /// [T, 4] f32, overwritten: the largest logit, the sum of exp(logit - largest), the label's logit
  /// (0 where it lies in another shard), the index of the largest (in the whole vocabulary).
  Tensor stats;
};
struct CrossEntropyArgs {
  Tensor logits;  ///< [T, V] f32, as above; destroyed when dlogits is asked for
  Tensor labels;
  std::int64_t first = 0;
  Tensor stats;          ///< [shards, T, 4] f32, in the order of the vocabulary
  float gradient_scale;  ///< as in LinearCrossEntropyArgs
  Tensor loss;           ///< [T] f32, overwritten
  Tensor correct;        ///< [T] f32: 1 where argmax is the label; or undefined
  Tensor dlogits;        ///< [T, V] cd, overwritten; undefined: no backward
};
/// Log-probability of ids under softmax(logits); the same reduction as LinearCrossEntropy, so a
/// server's logprob of a token equals the trainer's bit for bit where the logits do.
struct LogprobArgs {
  Tensor logits;   ///< [S, V] f32
  Tensor ids;      ///< [S] i32
  Tensor logprob;  ///< [S] f32, overwritten
};

/// Per-row sampling parameters, all device tensors of S rows. Order of operations: penalties, then
/// temperature, top-k, top-p, min-p, then the draw u = random_uniform(seed, 0, position).
struct SampleArgs {
  Tensor logits;        ///< [S, V] f32; penalties modify it in place
  Tensor temperature;   ///< [S] f32; 0: greedy (ties: the lowest id)
  Tensor top_k;         ///< [S] i32; 0: off
  Tensor top_p, min_p;  ///< [S] f32; 1 and 0: off
  Tensor seed;          ///< [S] i64
  Tensor position;      ///< [S] i64: index of the token in its sequence (prompt included)
  Tensor repetition_penalty, presence_penalty, frequency_penalty;  ///< [S] f32; 1, 0, 0: off
  /// Tokens that penalties see: of row s, history entries [history_offsets[s],
  /// history_offsets[s+1]); count of prompt occurrences only matters to repetition (any > 0), of
  /// output ones to all three.
  Tensor history_offsets;  ///< [S + 1] i32, or undefined: no penalties in this batch
  Tensor history_ids;      ///< [n] i32, distinct per row
  Tensor history_prompt_counts, history_output_counts;  ///< [n] i32
  Tensor ids;                                           ///< [S] i32, overwritten: the drawn tokens
  Tensor logprob;  ///< [S] f32, overwritten: of the drawn token under the unmodified logits
  std::int64_t top_logprobs = 0;  ///< n
  Tensor top_ids;                 ///< [S, n] i32, overwritten when n > 0: most likely first
  Tensor top_logprob;             ///< [S, n] f32
};

/// Sum of squares of many f32 tensors into one f32 (accumulated in f64, fixed order): the global
/// norm.
struct SquaredNormArgs {
  std::vector<Tensor> tensors;  ///< f32 each
  Tensor out;                   ///< [1] f32, overwritten
};
/// AdamW (Loshchilov & Hutter 2019), decoupled decay as torch.optim.AdamW orders it. The gradient
/// is first multiplied by min(1, max_norm / (sqrt(squared_norm) + 1e-6)) when max_norm > 0.
struct AdamWArgs {
  Tensor param;         ///< f32 master, updated
  Tensor grad;          ///< f32, same shape
  Tensor m, v;          ///< f32 moments, updated
  Tensor param_cd;      ///< param rounded to the compute dtype, overwritten; undefined: not wanted
  Tensor squared_norm;  ///< [1] f32 from SquaredNorm of `grad`; undefined: no clipping
  float max_norm;       ///< of the gradient, which is grad_factor * grad
  float lr, beta1, beta2, eps, weight_decay;
  std::int64_t step;         ///< 1 for the first update: bias corrections use beta^step
  float grad_factor = 1.0f;  ///< 1 / the loss scale that `grad` was computed with
};

}  // namespace tandem::kernels
