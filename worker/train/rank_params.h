// The trainable state of one rank in any layout, LoRA or full: units of flat buffers (one per
// block, and the two ends of a full fine-tune), each with a master, gradients and Adam moments of
// the part that this rank updates.
//
// ZeRO 0: every data-parallel rank updates everything. 1: each updates its part of every unit and
// the parts are gathered. 2: gradients are also reduced to the parts as soon as they are complete:
// a block's after its backward, in the background where that exists, an embedding's and a head's
// that are not tied; through room that all of these share. 3: of a full fine-tune each rank keeps
// no weights of blocks but the masters of its part (GatheredWeights). The ends' packed weights stay
// whole, and with ZeRO 0 and 1, or tied, their gradients until the step's end.
//
// Sums over data-parallel ranks come first where gradients are reduced at once, then those over
// tensor-parallel ranks of tensors that all of these hold whole (FlatTensor::partial); of what
// stays whole it is the other way round. One device thread.
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
  void update(const protocol::TrainSettings& settings, double learning_rate, std::int64_t step,
              double grad_factor) override;
  [[nodiscard]] std::vector<StateTensor> export_tensors(bool weights_alone) const override;
  Status read_tensors(const StateSource& state) override;
  void take_tensors() override;
  void load_weights(const model::TensorSource& source) override;
  [[nodiscard]] std::shared_ptr<const model::AdapterWeights> snapshot() const override;
  [[nodiscard]] std::vector<model::HostAdapterTensor> host_adapter(DType dtype) const override;
  [[nodiscard]] model::FlatAdapter flat_adapter(DType dtype) const override;

 private:
  /// What is no block: the ends together, or what of them has no unit of its own; and those.
  static constexpr std::int64_t kEnds = -1, kHead = -2, kEmbedding = -3;
  /// Elements of a part that weight decay reaches, or does not.
  struct Span {
    std::int64_t begin = 0, end = 0;
    bool decays = true;
  };
  struct Unit {
    model::FlatLayout layout;
    std::int64_t layer = kEnds;  ///< or one of the above
    std::int64_t part = 0;       ///< elements that one rank updates
    std::int64_t begin = 0;    ///< of this rank's part; [begin, begin + part) of the padded buffer
    std::size_t turn = 0;      ///< a block's: which shared buffer
    bool fresh = true;         ///< written_first: the gradient holds nothing of this step yet
    kernels::Tensor gradient;  ///< whole; undefined where it is reduced block by block
    kernels::Tensor part_gradient;         ///< [part]; inside `gradient` where that exists
    kernels::Tensor master, m, v;          ///< [part]
    kernels::Tensor compute;               ///< LoRA: [padded] cd, what forward reads
    kernels::Tensor compute_part;          ///< LoRA: what is gathered of it: [part] cd
    std::vector<kernels::Tensor> counted;  ///< pieces of part_gradient that the norm counts
    std::vector<kernels::Tensor> partial;  ///< pieces that tensor-parallel ranks add up
    std::vector<Span> spans;               ///< of the part, in order, all of it
  };

  /// ZeRO 2 and 3: the gradient of the block in backward, and what becomes of the one before. An
  /// end's has the room of all.
  struct SharedGradient {
    kernels::Tensor whole;
    std::unique_ptr<comm::Pending> reducing;
  };

  RankParams(const SessionParts& parts, std::optional<model::LoraConfig> lora);
  Status open_weights();
  void plan_units();
  void allocate();
  void allocate_unit(Unit& unit);
  [[nodiscard]] model::FlatLayout lora_layout(std::int64_t layer) const;
  /// Values of a unit's part, in f32; moments zero.
  void set_values(Unit& unit, const std::vector<float>& whole);
  /// As the source has them; a dry run's has none.
  void set_weights(Unit& unit, const model::TensorSource& source);
  /// Makes forward see the masters: as they are now, or as `step` leaves them, whose update then
  /// writes what forward reads, or what is gathered for it, where that is plain memory.
  void publish(Unit& unit, const kernels::AdamWArgs* step = nullptr);
  void publish_part(Unit& unit, const kernels::AdamWArgs* step, const kernels::Tensor& to);
  /// A piece of a unit's part; `to` undefined: nothing but the master is written.
  void update_piece(const Unit& unit, const Span& span, const kernels::AdamWArgs& step,
                    const kernels::Tensor& to);
  static std::vector<Span> decay_spans(const Unit& unit);
  void update_plain(Unit& unit, const kernels::AdamWArgs& step);
  void unpack(Unit& unit, const kernels::Tensor& whole);
  /// Of the ends, what ranks of other groups have addends of.
  void sum_ends(Unit& unit);

  const model::BlockGrads* acquire(std::int64_t layer) override;
  void ready(std::int64_t layer) override;
  const model::EndGrads* ends() override;
  void acquire_end(model::End end) override;
  void ready_end(model::End end) override;
  /// Where a unit's gradient of this micro-batch goes, with what earlier ones left.
  kernels::Tensor begin_gradient(Unit& unit, SharedGradient& shared);
  void begin_reduction(Unit& unit, SharedGradient& shared);
  /// ZeRO 0: those of all units, which lie one behind another, as one tensor.
  [[nodiscard]] kernels::Tensor all_gradients() const;

  [[nodiscard]] int dp_size() const { return parts_.ranks ? parts_.ranks->layout.dp : 1; }
  [[nodiscard]] int zero() const { return parts_.ranks ? parts_.ranks->layout.zero : 0; }
  [[nodiscard]] bool full() const { return !lora_.has_value(); }
  /// Whether its gradient is reduced as soon as it is complete.
  [[nodiscard]] bool at_once(const Unit& unit) const { return zero() >= 2 && unit.layer != kEnds; }
  /// The first backward of a step writes its gradients; others are added to what was cleared.
  [[nodiscard]] bool written_first(const Unit& unit) const {
    return at_once(unit) || (full() && unit.layer >= 0);
  }
  [[nodiscard]] bool kept_in_parts(const Unit& unit) const {
    return full() && zero() == 3 && unit.layer >= 0;
  }
  [[nodiscard]] std::int64_t padded(const Unit& unit) const {
    return zero() == 0 ? unit.part : unit.part * dp_size();
  }
  [[nodiscard]] Unit& unit_of(std::int64_t layer);
  /// An end's unit of its own; null: it has none.
  [[nodiscard]] Unit* unit_of(model::End end);
  void wait_for(SharedGradient& shared);

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
  std::vector<SharedGradient> shared_;
  SharedGradient shared_by_ends_;
  kernels::Tensor squared_norm_;
  model::BlockGrads block_grads_;
  model::EndGrads end_grads_;
};

}  // namespace tandem::worker::train
