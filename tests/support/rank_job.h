// One tiny job in any layout, for tests that hold layouts against one rank: every rank calls
// run_rank with its communicator, be it a thread's or a process's.
#pragma once

#include "worker/comm/layout.h"
#include "worker/model/model_config.h"
#include "worker/train/train_session.h"

#include <atomic>
#include <functional>
#include <string>
#include <vector>

namespace tandem::test {

struct RankJob {
  worker::comm::Layout layout;
  bool full = false;   ///< full fine-tuning instead of LoRA
  bool exact = false;  ///< in f64 (tests/support/exact_backend.h) instead of f32
  /// On this GPU of the process, over NCCL; -1: on the CPU.
  int gpu = -1;
  DType dtype = DType::kF32;  ///< unless exact
  /// Of a part of the residual stream's rows, where collectives go on in the background: as many
  /// parts as can be.
  std::int64_t stream_part_bytes = 1;
  /// On the CPU: makes as if they did (background_communicator.h), and counts what was begun.
  std::atomic<std::int64_t>* background = nullptr;
  bool tied = true, bias = true;
  bool qk_norm = false;  ///< as Qwen3; without biases
  std::int64_t steps = 30;
  double max_grad_norm = 1.0;
  double learning_rate_scale = 1.0;
  double lora_dropout = 0.0;
  std::string recompute = "none";
  bool eval = false;
  bool uniform = false;  ///< every micro-batch as large as the bounds
  bool publish = false;  ///< at the end what it trained is probed, as a full job of one rank is
  /// Starts from this whole state; null: from the beginning.
  const worker::train::TrainState* resume = nullptr;
  /// Stops (after a whole step) when so many are done; 0: at the end; -1: before the first.
  std::int64_t stop_after = 0;
};

struct RankResult {
  std::vector<double> losses, norms;  ///< of each step run; the same on every rank
  std::vector<double> eval_losses;
  worker::train::TrainState state;       ///< this rank's pieces
  std::vector<std::int64_t> peak_bytes;  ///< of the rank's ledger by MemoryKind, then the total
};

/// Sizes with nothing equal to another, and divisible by 4 only where tp needs it: 8 blocks,
/// vocabulary 97.
worker::model::ModelConfig rank_job_model(const RankJob& job);

/// The settings of the session, and the bounds of its batches.
protocol::TrainSettings rank_job_settings(const RankJob& job);
worker::train::BatchBounds rank_job_bounds(const RankJob& job);

RankResult run_rank(worker::comm::Communicator& gang, const RankJob& job);

/// Every layout that the project promises to hold against one rank, on CPU.
const std::vector<worker::comm::Layout>& tested_layouts();
/// "dp2_tp1_pp1_zero3".
std::string layout_name(const worker::comm::Layout& layout);

/// The same job on one rank.
RankResult as_one_rank(RankJob job);
/// All ranks as threads of this process, by rank.
std::vector<RankResult> run_as_threads(const RankJob& job);

/// One state of all ranks' pieces.
worker::train::TrainState merged_state(const std::vector<RankResult>& ranks);

/// Largest ||a - b|| / ||b|| over the state's tensors whose names end with `suffix`; tensors that
/// are zero in b must be zero in a.
double state_error(const worker::train::TrainState& a, const worker::train::TrainState& b,
                   const std::string& suffix);

}  // namespace tandem::test
