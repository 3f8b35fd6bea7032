// The trainable state of one LoRA: f32 masters, gradients and Adam moments as flat tensors over one
// AdapterLayout, and the compute-dtype copy that the forward pass reads. One device thread.
#pragma once

#include "kernels/ops.h"
#include "worker/model/adapter.h"
#include "worker/model/adapter_layout.h"
#include "worker/train/trainable.h"

#include <array>
#include <memory>
#include <string>
#include <vector>

namespace tandem::worker::train {

class LoraParams final : public Trainable, private model::GradSink {
 public:
  /// Every target site of every layer at the config's rank. Allocates; contents undefined until
  /// initialise() or a load.
  LoraParams(const SessionParts& parts, const model::LoraConfig& lora);

  /// A uniform in +-1/sqrt(I) from (seed, site), B zero, moments zero.
  void initialise(std::uint64_t seed) override;
  /// Starts from given values, moments zero. invalid_error: another rank, scale or set of sites.
  Status initialise_from(const std::vector<model::HostAdapterTensor>& tensors) override;
  model::WeightSource& weights() override { return parts_.weights; }
  model::GradSink& sink() override { return *this; }

  void zero_gradients() override;
  /// Norm of the whole gradient into `squared_norm()`, on the device.
  void measure_gradients() override;
  [[nodiscard]] const kernels::Tensor& squared_norm() const override { return squared_norm_; }
  /// One AdamW update of everything; `step` counts from 1.
  void update(const protocol::TrainSettings& settings, double learning_rate, std::int64_t step,
              double grad_factor) override;

  /// Points a slot's entries at these parameters and gradients.
  void attach(model::AdapterTable& table, std::int64_t slot) override;
  [[nodiscard]] std::int64_t rank_max() const override { return layout_.rank_max; }

  [[nodiscard]] std::vector<StateTensor> export_tensors(bool weights_alone) const override;
  Status read_tensors(const StateSource& state) override;
  void take_tensors() override;
  void load_weights(const model::TensorSource& source) override;
  [[nodiscard]] std::shared_ptr<const model::AdapterWeights> snapshot() const override;
  [[nodiscard]] std::vector<model::HostAdapterTensor> host_adapter(DType dtype) const override;
  [[nodiscard]] model::FlatAdapter flat_adapter(DType dtype) const override;
  [[nodiscard]] std::int64_t flat_elements() const override { return layout_.elements; }

 private:
  void ready(std::int64_t) override {}  // one rank: nothing to reduce

  [[nodiscard]] std::vector<float> download(const kernels::Tensor& flat) const;
  void upload(const std::vector<float>& host, const kernels::Tensor& flat);
  void refresh_compute_copy();

  SessionParts parts_;
  model::AdapterLayout layout_;
  kernels::Arena adapter_arena_, gradient_arena_, optimizer_arena_;
  kernels::Tensor master_, gradient_, m_, v_, squared_norm_;
  kernels::Tensor compute_;                 ///< cd; the masters themselves when cd is f32
  std::array<std::vector<float>, 3> read_;  ///< a state's values until they are taken
  /// Host memory for the adapter that is published at the end, made and touched before: of 84 MB,
  /// touching took longer than copying.
  mutable std::vector<std::byte> room_;
};

}  // namespace tandem::worker::train
