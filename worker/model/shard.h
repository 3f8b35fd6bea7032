// What one rank holds of a model: ranges of blocks (pipeline) and, of each tensor, a part
// (tensor parallelism). Pure arithmetic over names and shapes. Any thread.
//
// Tensor parallelism after Shoeybi et al. 2019: q, k, v, gate and up are cut by outputs (whole
// heads), o and down by inputs, embedding and head by vocabulary entries; norms are whole. So one
// sum over ranks follows o and down in forward, and the input gradients of qkv and gate_up in
// backward. Of a LoRA pair at a site cut by outputs B is cut alike and A is whole; at a site cut by
// inputs A is cut and B is whole. No further collective is needed in a block: the gradients of the
// whole ones are parts of sums, added up once per step.
#pragma once

#include "worker/model/model_config.h"

#include <string>
#include <vector>

namespace tandem::worker::model {

enum class Site : int;

/// Blocks [first, last) of a model: a pipeline stage. The whole model is the stage [0, layers).
struct Stage {
  std::int64_t first = 0, last = 0;
  [[nodiscard]] std::int64_t blocks() const { return last - first; }
  bool operator==(const Stage&) const = default;
};

struct ModelShard {
  int tp_rank = 0, tp_size = 1;
  /// Ascending; more than one: virtual stages of an interleaved pipeline. Empty: all blocks.
  std::vector<Stage> stages{};

  [[nodiscard]] std::vector<Stage> stages_of(const ModelConfig& config) const {
    return stages.empty() ? std::vector<Stage>{{0, config.layers}} : stages;
  }
  /// Of a rank with one stage.
  [[nodiscard]] Stage stage_of(const ModelConfig& config) const;
  [[nodiscard]] bool is_whole(const ModelConfig& config) const {
    return tp_size == 1 && blocks(config).size() == static_cast<std::size_t>(config.layers);
  }
  /// The first stage embeds, the last one has the head.
  [[nodiscard]] bool embeds(const ModelConfig& config) const {
    return stages_of(config).front().first == 0;
  }
  [[nodiscard]] bool has_head(const ModelConfig& config) const {
    return stages_of(config).back().last == config.layers;
  }
  /// Numbers of the blocks of all stages, ascending.
  [[nodiscard]] std::vector<std::int64_t> blocks(const ModelConfig& config) const;
};

/// Stages of equal size, the first ones larger by one where the blocks do not divide: the last one
/// has the head. What serving uses; cut_stages of PartCosts{} and one chunk is the same.
Stage stage_at(std::int64_t layers, int pp_size, int pp_rank);

/// What the parts of a model cost, in one unit. A stage costs the sum of its parts.
struct PartCosts {
  std::int64_t block = 1;      ///< each
  std::int64_t embedding = 0;  ///< on the first stage
  std::int64_t head = 0;       ///< on the last stage: vocabulary product and loss
};
/// Multiply-adds of a token: those of the matrices. Embedding is a look-up. Attention, whose share
/// grows with the sequence, is left out: the head then counts for a little too much.
PartCosts compute_costs(const ModelConfig& config);
/// Parameters, to which weights, gradients and optimizer state are in proportion. A tied embedding
/// lies on both ends. Activations are left out: what a rank holds of them is the schedule's.
PartCosts parameter_costs(const ModelConfig& config);

/// All `layers` blocks in ranks x chunks stages of one block at least, in order; a rank has every
/// ranks-th of them. The ranks take their stages of one chunk at about the same time and all wait
/// for the largest: the sum over chunks of the largest stage's cost is the least that it can be,
/// and of such cuts the sum of squared costs. Among equals the last stages are smallest.
std::vector<Stage> cut_stages(std::int64_t layers, int ranks, int chunks, const PartCosts& costs);

/// ok when heads, kv heads and mlp width divide by tp, the vocabulary has an entry for each rank
/// and every stage (virtual_pp on each pipeline rank) a block; else refused_error with the largest
/// sizes that work.
Status check_shard(const ModelConfig& config, int tp_size, int pp_size, int virtual_pp = 1);

/// The sizes that this rank's ops see: its heads, kv heads, mlp width and vocabulary entries;
/// layers and width stay (blocks keep their numbers).
ModelConfig local_config(const ModelConfig& config, const ModelShard& shard);

/// A rectangle of a logical tensor [n, i]; a vector [n] has i = 1 here.
struct TensorSlice {
  std::int64_t row = 0, rows = 0, column = 0, columns = 0;
  [[nodiscard]] std::int64_t elements() const { return rows * columns; }
};

/// Entries [row, row + rows) of the vocabulary.
TensorSlice vocab_slice(const ModelConfig& config, const ModelShard& shard);
/// W [n, i] of a site, its bias [n] and the adapter's A [r, i] and B [n, r].
TensorSlice weight_slice(const ModelConfig& config, Site site, const ModelShard& shard);
TensorSlice bias_slice(const ModelConfig& config, Site site, const ModelShard& shard);
TensorSlice lora_a_slice(const ModelConfig& config, Site site, std::int64_t rank,
                         const ModelShard& shard);
TensorSlice lora_b_slice(const ModelConfig& config, Site site, std::int64_t rank,
                         const ModelShard& shard);
/// True where outputs are cut (q, k, v, gate, up), false where inputs are (o, down).
bool cut_by_outputs(Site site);

}  // namespace tandem::worker::model
