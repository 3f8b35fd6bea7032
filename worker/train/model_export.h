// A full fine-tune as a model of its own: a Hugging Face folder that transformers, and Tandem,
// load.
#pragma once

#include "worker/model/model_config.h"
#include "worker/train/train_session.h"

#include <functional>
#include <string>

namespace tandem::worker::train {

/// Writes the parameters of a whole state of a full fine-tune as model.safetensors in `dtype` (f32,
/// bf16 or f16) into `to` (made when missing), with the base folder's other files (configuration,
/// tokenizer, template) beside them; config.json names the new dtype. The weights' file comes last,
/// so a folder with one is complete. Errors: not_found (no config.json in `base`), corrupt (a
/// tensor that the model has is missing or has another shape), and those of the file system.
Status export_model(const std::string& base, const std::string& to,
                    const model::ModelConfig& config, const TrainState& state, DType dtype);

// -- the same by many ranks at once: one makes the file, each writes its pieces. `beat`, where it
// is given, is called for each piece: a large model takes its time
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
