// What one rank holds of a model: a range of blocks (pipeline) and, of each tensor, a part
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
};

struct ModelShard {
  int tp_rank = 0, tp_size = 1;
  Stage stage;  ///< {0, 0}: all blocks

  [[nodiscard]] bool is_whole(const ModelConfig& config) const {
    return tp_size == 1 && stage_of(config).first == 0 && stage_of(config).last == config.layers;
  }
  [[nodiscard]] Stage stage_of(const ModelConfig& config) const {
    return stage.last == 0 ? Stage{0, config.layers} : stage;
  }
};

/// Stages of equal size, the first ones larger by one where the blocks do not divide: the last one
/// has the head.
Stage stage_at(std::int64_t layers, int pp_size, int pp_rank);

/// ok when heads, kv heads and mlp width divide by tp, the vocabulary has an entry for each rank
/// and every stage a block; else refused_error with the largest sizes that work.
Status check_shard(const ModelConfig& config, int tp_size, int pp_size);

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
