// One fine-tuning job (LoRA or full) on one rank, in slices that the runtime interleaves with
// serving. The session owns what training adds to a served base (f32 masters, gradients, Adam
// moments, the compute-dtype adapter in its table slot); base weights, slots, activations and
// workspace are the engine's and shared. One device thread calls everything.
//
// Between two slices the activation arena is as the session found it, so serving may use it.
// Determinism: a step is a pure function of (state, settings, batches), so a session that was
// stopped at any moment and continued from export_state() ends with the same bits (same backend,
// threads and layout).
#pragma once

#include "kernels/ops.h"
#include "protocol/job_spec.h"
#include "worker/model/adapter_layout.h"
#include "worker/model/context.h"
#include "worker/model/transformer.h"
#include "worker/train/batch_source.h"
#include "worker/train/loss_scaler.h"

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

namespace tandem::worker::train {

struct Ranks;
class StateSource;

/// What the engine lends. All must outlive the session.
struct SessionParts {
  kernels::Allocator& allocator;
  kernels::MemoryLedger& ledger;
  model::Context context;
  model::WeightSource& weights;
  model::AdapterTable& adapters;
  std::int64_t slot = 0;  ///< the session's own until it is destroyed (it clears the slot)
  /// A job of several ranks: this one's place (`context.comm` is its tensor-parallel group, and
  /// `weights` hold its shard). Every rank makes the same calls. Null: one rank.
  const Ranks* ranks = nullptr;
  /// Full fine-tuning: where the base's values come from.
  const model::TensorSource* source = nullptr;
  /// Full fine-tuning: called before each block of the session's own weights is used; may be null.
  const std::function<void()>* on_block = nullptr;
};

// -- what a slice did --------------------------------------------------------------------------
/// A micro-batch of a step that is not complete yet, or of an evaluation.
struct Progress {
  std::int64_t step = 0;  ///< optimizer steps done
};
/// An optimizer step was taken.
struct StepDone {
  std::int64_t step = 0, total_steps = 0;  ///< step counts from 1
  double epoch = 0.0;                      ///< passes over the data so far
  double loss = 0.0;                       ///< mean over the step's trained tokens, before the step
  double learning_rate = 0.0;              ///< used by this step
  double grad_norm = 0.0;                  ///< before clipping
  std::int64_t trained_tokens = 0, tokens = 0;
  double seconds = 0.0;  ///< time inside the step's slices
  /// In f16 (loss_scaler.h), else 1 and 0: what the step's gradients were scaled by, whether they
  /// overflowed, so that nothing was updated (grad_norm is not finite then), and how many did.
  double loss_scale = 1.0;
  bool skipped = false;
  std::int64_t skipped_steps = 0;
};
struct EvalDone {
  std::int64_t step = 0;  ///< optimizer steps done; 0 with `base`: before training
  bool base = false;      ///< of the base model without any adapter
  double loss = 0.0;      ///< mean over trained tokens
  double accuracy = 0.0;  ///< share of trained tokens that are the most likely one
  std::int64_t trained_tokens = 0;
  double seconds = 0.0;
};
/// export_state() is due (every save_steps, and at the end). Ignoring it harms nothing.
struct CheckpointDue {
  std::int64_t step = 0;
  bool last = false;
};
/// Nothing is left to do; every further slice says so again.
struct Finished {
  std::int64_t step = 0;
};
using SliceEvent = std::variant<Progress, StepDone, EvalDone, CheckpointDue, Finished>;

// -- state -------------------------------------------------------------------------------------
/// A logical host tensor: independent of ranks and layout. Names are PEFT's parameter path plus
/// ".param", ".exp_avg" or ".exp_avg_sq", e.g. "model.layers.0.self_attn.q_proj.lora_A.param".
struct StateTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> values;
  /// One rank's piece of it: a rectangle (rows 0: everything) and, of its row-major elements, those
  /// from `first` on. merge_states (state_pieces.h) makes whole tensors of all ranks' pieces.
  model::TensorSlice slice{};
  std::int64_t first = 0;
};
struct TrainState {
  std::string json;  ///< {"version","step","seed","settings",...}; in f16 "loss_scale" too
  std::vector<StateTensor> tensors;
};

struct SessionOptions {
  protocol::TrainSettings settings;
  /// Evaluate the base (no adapter) before the first step, when there is an evaluation set.
  bool eval_base_first = true;
  /// Start from this adapter instead of a fresh one; must fit rank and target_modules.
  const std::vector<model::HostAdapterTensor>* initial = nullptr;
  /// As the compute dtype needs it, unless given.
  std::optional<LossScaling> loss_scaling;
};

/// Tokens of a probe's prompt at most. Two different ones are the fewest that do: each token passes
/// every tensor, but of one token attention's weights are 1 whatever q and k are, and of two equal
/// ones the values that are weighed are equal.
inline constexpr std::int64_t kProbeTokens = 2;
/// The first token of a document and the first other one (any other, where there is none).
[[nodiscard]] std::vector<std::int32_t> probe_prompt(std::span<const std::int32_t> document);

class TrainSession {
 public:
  /// Allocates and initialises. A is kaiming-uniform(a = sqrt(5)), i.e. uniform in +-1/sqrt(I), as
  /// PEFT initialises it, from (seed, site); B is zero. Errors: unknown target_modules, settings
  /// that this build refuses, an initial adapter that does not fit. Throws DeviceError when memory
  /// is out.
  static Result<std::unique_ptr<TrainSession>> create(const SessionParts& parts,
                                                      const SessionOptions& options,
                                                      std::unique_ptr<BatchSource> batches);
  ~TrainSession();
  TrainSession(const TrainSession&) = delete;
  TrainSession& operator=(const TrainSession&) = delete;

  /// Does the next bounded piece of work: one micro-batch (forward, loss, backward) and, after a
  /// step's last one, the optimizer step; or one evaluation micro-batch. Errors come from the
  /// data source, or say that the loss is not finite (the step number and what to lower), or that
  /// activations overflowed f16.
  Result<SliceEvent> run_slice();

  [[nodiscard]] std::int64_t step() const;  ///< optimizer steps done
  [[nodiscard]] std::int64_t total_steps() const;
  [[nodiscard]] bool finished() const;
  [[nodiscard]] const model::LoraConfig& lora() const;

  /// The state after the last complete optimizer step; may be called between any two slices. Of
  /// several ranks: this one's pieces.
  [[nodiscard]] TrainState export_state() const;
  /// Continues from a whole state, saved in any layout. Only on a session that has run no slice.
  /// corrupt_error / conflict_error name what is missing, has another shape, or which setting
  /// differs from the state's.
  Status import_state(const TrainState& state);
  /// The same in two steps, for ranks that read for themselves: each reads the values that it holds
  /// (any thread, while no other uses the session), and when all have, all take them up at once.
  Status read_state(const std::string& json, const StateSource& tensors);
  void take_state();

  /// A frozen copy of the adapter as of the last step, in compute dtype, made on the device (no
  /// host copy): what serving shows as the job's latest and what is served after the publish.
  [[nodiscard]] std::shared_ptr<const model::AdapterWeights> snapshot_adapter() const;
  /// The adapter on the host: masters rounded to `dtype` (f32, bf16 or f16).
  [[nodiscard]] std::vector<model::HostAdapterTensor> host_adapter(DType dtype) const;
  /// The same values for publishing: one buffer of `dtype`, as few copies as the device allows.
  [[nodiscard]] model::FlatAdapter flat_adapter(DType dtype) const;
  /// Elements of flat_adapter(); 0 where the session has none (several ranks, full fine-tuning).
  [[nodiscard]] std::int64_t flat_elements() const;

  /// Largest absolute difference between the logits after `prompt` (kProbeTokens tokens) with the
  /// trained adapter and with `other`, in one pass over both; 0 when the published dtype keeps the
  /// compute dtype's bits. Of the last position alone: its row passes every tensor of every block
  /// itself, and the first position's k and v reach it through attention.
  double probe(const std::vector<std::int32_t>& prompt,
               std::shared_ptr<const model::AdapterWeights> other);

  // -- full fine-tuning
  /// This rank's pieces of the trained weights, in f32, named as in checkpoints (".param").
  [[nodiscard]] std::vector<StateTensor> export_weights() const;
  /// Of one rank, when training is over: the weights become those of `published`. Returns the
  /// largest absolute difference that this makes to the logits of every position of `prompt` (1 to
  /// kProbeTokens tokens).
  double probe_published(const std::vector<std::int32_t>& prompt,
                         const model::TensorSource& published);

  /// Nanoseconds of this thread so far, by phase: what the training bench prints. (A device that
  /// works behind the thread's back shows up where the thread waits for it: in `optimizer`.)
  struct PhaseTimes {
    std::int64_t data = 0, forward = 0, loss = 0, backward = 0, optimizer = 0;
  };
  [[nodiscard]] const PhaseTimes& phase_times() const;

 private:
  class Impl;
  explicit TrainSession(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::worker::train
