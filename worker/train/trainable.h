// What a job trains, as its session sees it: the pair of an adapter's matrices at every site, or
// all weights. Owns masters, gradients and optimizer state. One device thread. Over several ranks
// every call that reduces or gathers is made by all of them, in the same order.
#pragma once

#include "worker/train/state_pieces.h"
#include "worker/train/train_session.h"

#include <memory>
#include <vector>

namespace tandem::worker::train {

class Trainable {
 public:
  virtual ~Trainable() = default;

  /// Random (LoRA) or from the base's own values (full), from `seed`; moments zero.
  virtual void initialise(std::uint64_t seed) = 0;
  virtual Status initialise_from(const std::vector<model::HostAdapterTensor>& tensors) = 0;

  /// The door that the transformer takes its blocks from: the engine's, or this job's own.
  virtual model::WeightSource& weights() = 0;
  /// Points an adapter slot at what is trained.
  virtual void attach(model::AdapterTable& table, std::int64_t slot) = 0;
  /// Largest rank of an adapter in the batch; 0: no adapter.
  [[nodiscard]] virtual std::int64_t rank_max() const = 0;
  /// What backward reports to, and asks where gradients of weights go.
  virtual model::GradSink& sink() = 0;

  virtual void zero_gradients() = 0;
  /// Sums over ranks what belongs together, then the square of the norm of the whole gradient into
  /// `squared_norm()`, on the device: the same on every rank.
  virtual void measure_gradients() = 0;
  [[nodiscard]] virtual const kernels::Tensor& squared_norm() const = 0;
  /// One AdamW update of everything, by grad_factor times the gradients; `step` counts from 1.
  virtual void update(const protocol::TrainSettings& settings, double learning_rate,
                      std::int64_t step, double grad_factor) = 0;

  /// This rank's part of the state; merge_states makes one of all ranks' parts. `weights_alone`:
  /// without the optimizer's moments.
  [[nodiscard]] virtual std::vector<StateTensor> export_tensors(bool weights_alone) const = 0;
  /// Reads this rank's part of a state that any layout saved; touches no device and no other rank.
  virtual Status read_tensors(const StateSource& state) = 0;
  /// Takes up what was read; all ranks at once.
  virtual void take_tensors() = 0;

  /// Full fine-tuning: the weights become those of `source`, the moments stay.
  virtual void load_weights(const model::TensorSource& source) = 0;

  /// LoRA on one rank only, see TrainSession.
  [[nodiscard]] virtual std::shared_ptr<const model::AdapterWeights> snapshot() const = 0;
  [[nodiscard]] virtual std::vector<model::HostAdapterTensor> host_adapter(DType dtype) const = 0;
  [[nodiscard]] virtual model::FlatAdapter flat_adapter(DType dtype) const = 0;
  /// Elements of flat_adapter(); 0 where there is none.
  [[nodiscard]] virtual std::int64_t flat_elements() const { return 0; }
};

/// AdamW's arguments but for the tensors.
kernels::AdamWArgs adamw_args(const protocol::TrainSettings& settings, double learning_rate,
                              std::int64_t step, double grad_factor,
                              const kernels::Tensor& squared_norm);

}  // namespace tandem::worker::train
