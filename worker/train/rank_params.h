// The trainable state of one rank in any layout, LoRA or full: units of flat buffers (one per
// block, and the two ends of a full fine-tune), each with a master, gradients and Adam moments of
// the part that this rank updates.
//
// ZeRO 0: every data-parallel rank updates everything. 1: each updates its part of every unit and
// the parts are gathered. 2: a block's gradients are also reduced to the parts as soon as its
// backward is done, through one buffer that all blocks share. 3: of a full fine-tune each rank
// keeps only its part of the blocks' weights too (GatheredWeights). The ends' gradients stay whole
// until the step's end, and their packed weights always.
//
// Of a block, sums over data-parallel ranks come first, then those over tensor-parallel ranks of
// tensors that all of these hold whole (FlatTensor::partial); of the ends it is the other way
// round. One device thread.
#pragma once

#include "worker/model/flat_layout.h"
#include "worker/model/weight_door.h"
#include "worker/train/ranks.h"
#include "worker/train/trainable.h"

#include <array>
#include <memory>
#include <optional>
#include <vector>

namespace tandem::worker::train {

class RankParams final : public Trainable, private model::GradSink {
 public:
  /// LoRA (`lora` given) over the engine's weights; else all weights, read from parts.source.
  /// Errors as BaseWeights::load.
  static Result<std::unique_ptr<RankParams>> create(const SessionParts& parts,
                                                    std::optional<model::LoraConfig> lora);

  void initialise(std::uint64_t seed) override;
  Status initialise_from(const std::vector<model::HostAdapterTensor>& tensors) override;
  model::WeightSource& weights() override { return *weights_; }
  void attach(model::AdapterTable& table, std::int64_t slot) override;
  [[nodiscard]] std::int64_t rank_max() const override { return lora_ ? lora_->r : 0; }
  model::GradSink& sink() override { return *this; }
  void zero_gradients() override;
  void measure_gradients() override;
  [[nodiscard]] const kernels::Tensor& squared_norm() const override { return squared_norm_; }
  void update(const protocol::TrainSettings& settings, double learning_rate,
              std::int64_t step) override;
  [[nodiscard]] std::vector<StateTensor> export_tensors(bool weights_alone) const override;
  Status read_tensors(const StateSource& state) override;
  void take_tensors() override;
  void load_weights(const model::TensorSource& source) override;
  [[nodiscard]] std::shared_ptr<const model::AdapterWeights> snapshot() const override;
  [[nodiscard]] std::vector<model::HostAdapterTensor> host_adapter(DType dtype) const override;
  [[nodiscard]] model::FlatAdapter flat_adapter(DType dtype) const override;

 private:
  struct Unit {
    model::FlatLayout layout;
    std::int64_t layer = -1;   ///< -1: the ends
    std::int64_t part = 0;     ///< elements that one rank updates
    std::int64_t begin = 0;    ///< of this rank's part; [begin, begin + part) of the padded buffer
    kernels::Tensor gradient;  ///< whole; undefined where it is reduced block by block
    kernels::Tensor part_gradient;         ///< [part]; inside `gradient` where that exists
    kernels::Tensor master, m, v;          ///< [part]
    kernels::Tensor compute;               ///< LoRA: [padded] cd, what forward reads
    kernels::Tensor compute_part;          ///< what is gathered: [part] cd (full, ZeRO 3: kept)
    std::vector<kernels::Tensor> counted;  ///< pieces of part_gradient that the norm counts
    std::vector<kernels::Tensor> partial;  ///< pieces that tensor-parallel ranks add up
  };

  RankParams(const SessionParts& parts, std::optional<model::LoraConfig> lora);
  Status open_weights();
  void plan_units();
  void allocate();
  void allocate_unit(Unit& unit);
  [[nodiscard]] model::FlatLayout lora_layout(std::int64_t layer) const;
  /// Values of a unit's part, in f32; moments zero.
  void set_values(Unit& unit, const std::vector<float>& whole);
  /// Makes forward see the masters: as they are now, or as `step` leaves them, whose update then
  /// writes what forward reads, or what is gathered for it, where that is plain memory.
  void publish(Unit& unit, const kernels::AdamWArgs* step = nullptr);
  void publish_part(Unit& unit, const kernels::AdamWArgs* step, const kernels::Tensor& to);
  void update_plain(Unit& unit, const kernels::AdamWArgs& step);
  void unpack(Unit& unit, const kernels::Tensor& whole);
  /// Of the ends, what ranks of other groups have addends of.
  void sum_ends(Unit& unit);

  const model::BlockGrads* acquire(std::int64_t layer) override;
  void ready(std::int64_t layer) override;
  const model::EndGrads* ends() override;

  [[nodiscard]] int dp_size() const { return parts_.ranks ? parts_.ranks->layout.dp : 1; }
  [[nodiscard]] int zero() const { return parts_.ranks ? parts_.ranks->layout.zero : 0; }
  [[nodiscard]] bool full() const { return !lora_.has_value(); }
  [[nodiscard]] bool by_block(const Unit& unit) const { return zero() >= 2 && unit.layer >= 0; }
  [[nodiscard]] bool kept_in_parts(const Unit& unit) const {
    return full() && zero() == 3 && unit.layer >= 0;
  }
  [[nodiscard]] std::int64_t padded(const Unit& unit) const {
    return zero() == 0 ? unit.part : unit.part * dp_size();
  }
  [[nodiscard]] Unit& unit_of(std::int64_t layer);

  SessionParts parts_;
  const std::optional<model::LoraConfig> lora_;
  const DType cd_, sums_;
  model::ModelConfig whole_config_;
  model::ModelShard shard_;
  std::vector<Unit> units_;  ///< this rank's blocks in order, then the ends of a full fine-tune
  std::unique_ptr<kernels::Arena> weight_arena_, compute_arena_, gradient_arena_, optimizer_arena_;
  std::unique_ptr<model::WeightSource> own_weights_;
  model::WeightSource* weights_ = nullptr;
  model::GatheredWeights* gathered_ = nullptr;
  std::vector<std::array<std::vector<float>, 3>> read_;  ///< per unit, until they are taken
  kernels::Tensor shared_gradient_;                      ///< ZeRO 2 and 3: of the block in backward
  kernels::Tensor squared_norm_;
  model::BlockGrads block_grads_;
  model::EndGrads end_grads_;
};

}  // namespace tandem::worker::train
