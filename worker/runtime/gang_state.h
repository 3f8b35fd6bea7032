// States, data sets and adapters on their way between the ranks of a gang, as bytes of one program
// on one host. Pure functions; any thread.
#pragma once

#include "protocol/base/digest.h"
#include "protocol/job_spec.h"
#include "worker/data/dataset.h"
#include "worker/model/adapter_layout.h"
#include "worker/runtime/gang_wire.h"
#include "worker/train/train_session.h"

#include <memory>
#include <optional>
#include <string>

namespace tandem::worker::runtime {

/// What all ranks need to begin; the first one makes it.
struct GangPlan {
  std::string model_path;  ///< on this host, verified
  protocol::TrainSettings settings;
  std::shared_ptr<const data::Dataset> train, eval;  ///< eval may be null
  Digest base_model;                                 ///< whose checkpoint it is
  std::string checkpoint;  ///< a manifest, of which each rank reads what it needs; "": none
  [[nodiscard]] ByteVector encode() const;
  static GangPlan decode(std::span<const std::byte> bytes);
};

/// Where a trained model is written: a folder on the gang's host.
struct ModelPlace {
  std::string folder;
  DType dtype = DType::kF32;
  std::vector<std::int32_t> prompt;  ///< of the probe
  [[nodiscard]] ByteVector encode() const;
  static ModelPlace decode(std::span<const std::byte> bytes);
};

void encode_state(const train::TrainState& state, ByteWriter& to);
train::TrainState decode_state(ByteReader& from);

/// The values alone: every rank knows the layout.
ByteVector encode_adapter(const model::FlatAdapter& adapter);
model::FlatAdapter decode_adapter(const model::ModelConfig& config, const model::LoraConfig& lora,
                                  std::span<const std::byte> bytes);

/// The adapter of a whole LoRA state, in f32 or bf16. corrupt_error: a tensor is missing.
Result<model::FlatAdapter> adapter_of_state(const model::ModelConfig& config,
                                            const model::LoraConfig& lora,
                                            const train::TrainState& state, DType dtype);

/// Of the adapter's values in one rank's pieces of a state, rounded as it is published, the largest
/// difference from the published ones; infinite when a piece belongs nowhere.
double largest_difference(const train::TrainState& pieces, const model::FlatAdapter& published);

}  // namespace tandem::worker::runtime
