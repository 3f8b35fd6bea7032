// The weights of a full fine-tune as the model.safetensors of a model of its own: one rank makes
// the file, each writes its pieces and compares them with what is read back. Any thread of a rank.
#pragma once

#include "worker/model/model_config.h"
#include "worker/train/train_session.h"

#include <functional>
#include <string>

namespace tandem::worker::train {

/// Called for each piece, where it is given: a large model takes its time.
using Beat = std::function<void()>;
/// An empty model.safetensors of a model's shape in `dtype`.
Status create_weights(const std::string& path, const model::ModelConfig& config, DType dtype);
/// One rank's pieces (TrainSession::export_weights), rounded to the file's dtype.
Status write_pieces(const std::string& path, const std::vector<StateTensor>& pieces,
                    const Beat& beat = {});
/// The largest difference between the pieces, rounded to `dtype`, and what `published` has in their
/// place.
double largest_difference(const std::vector<StateTensor>& pieces,
                          const model::TensorSource& published, DType dtype, const Beat& beat = {});

}  // namespace tandem::worker::train
