// The text side of an opened model: its tokenizer and chat template, ready for requests, training
// data and the data doctor. Pure functions; any thread.
#pragma once

#include "protocol/job_spec.h"
#include "protocol/messages.h"
#include "worker/data/dataset.h"
#include "worker/model/model_loader.h"

namespace tandem::worker::runtime {

/// Errors: those of the tokenizer and of the chat template, with the model's path.
Result<data::Encoder> make_encoder(const model::LoadedModel& model, const std::string& path);

/// Token ids of a request's input: tokens as they are, messages (or a plain prompt as one user
/// message) through the chat template, raw prompts encoded alone. Errors name what `model` lacks.
Result<std::vector<std::int32_t>> encode_input(const data::Encoder& encoder,
                                               const std::string& model,
                                               const protocol::PromptInput& input);

/// How a job's settings read its data.
data::DatasetOptions dataset_options(const protocol::TrainSettings& settings);

}  // namespace tandem::worker::runtime
