// The text side of an opened model: its tokenizer and chat template, ready for requests, training
// data and the data doctor. Pure functions; any thread.
#pragma once

#include "protocol/job_spec.h"
#include "worker/data/dataset.h"
#include "worker/model/model_loader.h"

namespace tandem::worker::runtime {

/// Errors: those of the tokenizer and of the chat template, with the model's path.
Result<data::Encoder> make_encoder(const model::LoadedModel& model, const std::string& path);

/// How a job's settings read its data.
data::DatasetOptions dataset_options(const protocol::TrainSettings& settings);

}  // namespace tandem::worker::runtime
