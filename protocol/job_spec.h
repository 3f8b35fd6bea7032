// What a user asks of a job, as JSON or YAML with the field names of PEFT and the Hugging Face
// trainer. Parsed once by everybody (CLI, coordinator, worker): defaults, ranges and spelling live
// here only. An unknown field is refused with the nearest known name.
#pragma once

#include "protocol/base/result.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tandem::protocol {

/// Ranks of one job at most.
inline constexpr std::int64_t kRanksMax = 64;
/// Of an adapter's low-rank matrices, at most, trained or served.
inline constexpr std::int64_t kLoraRankMax = 512;

/// What happens to a row longer than max_length.
enum class OverLength { kRaise, kDrop, kTruncate };
enum class Schedule { kCosine, kLinear, kConstant };

/// Every field is settable under its own name; the comment gives the range that parse() enforces.
struct TrainSettings {
  std::string method = "lora";  ///< "lora", or "full": all weights, published as a model
  // -- lora (PEFT names)
  std::int64_t lora_r = 16;   ///< 1..kLoraRankMax
  double lora_alpha = 32.0;   ///< > 0
  double lora_dropout = 0.0;  ///< [0, 1)
  bool use_rslora = false;
  std::vector<std::string> target_modules{"all-linear"};
  // -- optimizer and schedule (Hugging Face trainer names)
  double learning_rate = 2e-4;  ///< > 0; method full: 2e-5 unless it is given
  /// >= 0; of matrices, embeddings among them: norms and biases do not decay
  double weight_decay = 0.0;
  double adam_beta1 = 0.9, adam_beta2 = 0.999;  ///< [0, 1)
  double adam_epsilon = 1e-8;                   ///< > 0
  double max_grad_norm = 1.0;                   ///< >= 0; 0: no clipping
  Schedule lr_scheduler_type = Schedule::kCosine;
  double warmup_ratio = 0.03;     ///< [0, 1]
  std::int64_t warmup_steps = 0;  ///< > 0 overrides warmup_ratio
  double num_train_epochs = 3.0;  ///< > 0
  std::int64_t max_steps = 0;     ///< > 0 overrides num_train_epochs
  std::int64_t seed = 42;
  // -- batches
  std::int64_t per_device_train_batch_size =
      4;  ///< rows' worth: a micro-batch packs up to this times max_length tokens
  std::int64_t gradient_accumulation_steps = 1;  ///< 1..4096
  std::int64_t max_length = 512;  ///< tokens per row, 8..1048576 and at most the model's context
  bool packing = true;            ///< false: one row per sequence slot, still never padded
  OverLength over_length = OverLength::kRaise;
  bool train_on_all_tokens = false;  ///< loss on prompts too; default: assistant tokens only
  // -- evaluation, checkpoints, reports
  double eval_split = 0.0;        ///< [0, 0.5]: share of rows held out when no eval file is given
  std::int64_t eval_steps = 0;    ///< 0: only at the end (when there is an eval set)
  std::int64_t save_steps = 100;  ///< 0: only at the end
  std::int64_t save_total_limit = 2;  ///< >= 1
  std::int64_t logging_steps = 1;     ///< >= 1
  // -- engine
  /// Compute dtype: "auto" (the worker's) | "f32" | "bf16" | "f16"; the dry run refuses another
  /// than the worker's.
  std::string dtype = "auto";
  /// Published dtype: "auto" (= compute) | "f32" | "bf16" | "f16"; of a full fine-tune, the new
  /// model's.
  std::string adapter_dtype = "auto";
  std::string recompute = "none";  ///< "none" | "elementwise" | "mlp" | "block"
  // -- layout: dp * tp * pp ranks, one worker each. It changes how the step is computed, not what:
  // gradient_accumulation_steps micro-batches make a step, dealt to the dp ranks.
  std::int64_t dp = 1, tp = 1, pp = 1;  ///< data-, tensor- and pipeline-parallel ranks, 1..64
  /// Elastic: the job starts, or goes on after a checkpoint, with as many data-parallel ranks as
  /// fit now: from dp_min to dp, of those that gradient_accumulation_steps is a multiple of. 0: dp
  /// alone.
  std::int64_t dp_min = 0;
  std::int64_t zero = 0;  ///< 0..3: optimizer (1), gradients (2), parameters (3) sharded over dp
  std::int64_t virtual_pipeline_size = 1;  ///< stages on each pipeline rank; 2 or more: interleaved
  std::string pipeline_balance = "compute";  ///< what stages share evenly: "compute" | "memory"
  bool sequence_parallel = true;  ///< tensor-parallel ranks share the rows between products
  /// "manual": as the numbers above say. "auto": the dry run chooses dp, tp, pp, zero and
  /// virtual_pipeline_size, the fastest that fits on at most ranks_max ranks (0: as many as the
  /// largest host has).
  std::string layout = "manual";
  std::int64_t ranks_max = 0;

  [[nodiscard]] std::int64_t ranks() const { return dp * tp * pp; }
  [[nodiscard]] bool full() const { return method == "full"; }
  /// The dp that the job may run with, the largest first; dp alone where it is not elastic.
  [[nodiscard]] std::vector<std::int64_t> dp_choices() const;

  /// Parses a JSON object; absent fields keep their defaults. invalid_error names field, range and
  /// value.
  static Result<TrainSettings> parse(const std::string& json);
  /// Whether the method and the other settings go together (refused_error names one that does not),
  /// and the layout (refused_error says what to change). parse() checks both; whether the model can
  /// be cut so is known by the dry run.
  [[nodiscard]] Status check_method() const;
  [[nodiscard]] Status check_layout() const;
  /// All fields: what a job record stores. parse(to_json()) == *this. Defaults are named too, but
  /// for fields that came after protocol 1.2, which older workers would refuse.
  [[nodiscard]] std::string to_json() const;
  /// A field's default as JSON; "" when there is no such field.
  static std::string default_of(const std::string& name);
  /// Known field names, for completion and for nearest-name messages.
  static const std::vector<std::string>& field_names();
};

/// One job as submitted.
struct JobSpec {
  std::string model;          ///< base model name, alias or digest
  std::string dataset;        ///< digest of an uploaded data set
  std::string eval_dataset;   ///< digest or ""
  std::string adapter;        ///< name to publish under; of a LoRA
  std::string name;           ///< name of the model that a full fine-tune publishes
  std::int32_t priority = 0;  ///< -100..100, higher first
  TrainSettings train;

  [[nodiscard]] const std::string& published_name() const { return train.full() ? name : adapter; }
  [[nodiscard]] bool evaluates() const { return !eval_dataset.empty() || train.eval_split > 0.0; }
  static Result<JobSpec> parse(const std::string& json);
  [[nodiscard]] std::string to_json() const;
};

}  // namespace tandem::protocol
